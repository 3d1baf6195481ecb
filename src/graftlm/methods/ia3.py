r"""Learned vectors, (IA)^3, that scale keys, values and inner feed-forward activations (Liu et al. 2022).

"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3:

    k = l_k o (W_k x + b_k),   v = l_v o (W_v x + b_v),   y = W_2 (l_ff o h) + b_2

where h is what the feed-forward part holds between its two maps: gamma(W_1 x), or gamma(W_1 x) o (V x) where it is
gated (the authors' code scales V x there, which is the same thing). Start: all vectors one. Parameters: out of a key or
value map, in of a second feed-forward map; d_k + d_v + d_ff a block, and d_k + d_v more for cross-attention.

Merged: W_k <- diag(l_k) W_k, b_k <- l_k o b_k, the same for values; W_2 <- W_2 diag(l_ff).

On a fused map (qkv) only the parts of keys and values are scaled. Experts in 3-D parameters are no linear maps: in such
layers keys and values are scaled, and the experts are left as they are. PEFT's default tables differ from the paper for
many models (OPT without values; Qwen, Gemma, Phi, BART with queries for keys; BERT with the input of the attention's
output map; GPT-2 with queries too); here the paper's sites are the default everywhere, and `targets` and `feedforward`
say any other choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import LinearDelta, Method, Site, Survey, Targets
from graftlm.core.sites import is_named, selectors

__all__ = ["IA3", "IA3Delta"]


@dataclass(frozen=True)
class IA3(Method):
    """Scale keys, values and inner feed-forward activations by learned vectors.

    `targets` are the maps whose output is scaled, `feedforward` those whose input is; a map named by both has its input
    scaled, as in PEFT. Either may be empty. Where a model has no second feed-forward map of its own (experts in 3-D
    parameters), the default `feedforward` means none.

    Example:
        >>> print(IA3(targets="value"))
        ia3(targets=value)
    """

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "(IA)^3"
    learning_rate: ClassVar[float] = 1e-2  # the T-Few recipe has 3e-3, for 11B and more steps
    learning_rate_range: ClassVar[tuple[float, float]] = (5e-4, 5e-2)

    targets: Targets = ("key", "value")
    feedforward: Targets = ("down",)
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()

    def __post_init__(self) -> None:
        self.require((bool(self.targets or self.feedforward), "neither targets nor feedforward name a map", "ia3"))

    def sites(self, survey: Survey) -> list[Site]:
        """The maps that `targets` and `feedforward` name in `layers`, in the order of the model."""
        inner = self.feedforward
        if tuple(selectors(inner)) == ("down",) and self.targets and not survey.with_role("down"):
            inner = ()
        names = [*selectors(self.targets), *selectors(inner)]
        return survey.select(names, layers=self.layers, exclude=self.exclude, kinds=("linear", "conv1d"))

    def build(self, site: Site, module: nn.Module) -> IA3Delta:
        """A fresh vector of ones for `site`, on the side that the settings say."""
        del module
        if is_named(self.feedforward, site):
            return IA3Delta(1, site.in_features)
        return IA3Delta(site.out_features, 1)


class IA3Delta(LinearDelta):
    """The vector at one map: of shape [out, 1] it scales the output, of shape [1, in] the input (PEFT's shapes)."""

    def __init__(self, width_out: int, width_in: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(width_out, width_in, dtype=torch.float32))
        self.inner = width_out == 1

    def before(self, x: Tensor) -> Tensor:
        """The input x of shape [..., in], scaled where the vector is an inner one."""
        return x * self.ia3_l.view(-1).to(x.dtype) if self.inner else x

    def after(self, y: Tensor) -> Tensor:
        """The output y of shape [..., out], scaled where the vector is an outer one."""
        return y if self.inner else y * self.ia3_l.view(-1).to(y.dtype)

    def as_scaling(self) -> Tensor:
        """The vector, on whichever side it is."""
        return self.ia3_l.view(-1)

    def acts(self, step: str) -> bool:
        """Which side of the map this vector is on: an outer one may act at a part of a fused map."""
        return step == ("before" if self.inner else "after")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scaled columns of W, or its scaled rows and bias."""
        return weight * self.ia3_l, bias if self.inner or bias is None else bias * self.ia3_l.view(-1)
