r"""Parallel adapters: a small bottleneck beside a sublayer (He et al. 2021, "Towards a Unified View of...").

    y = F(x) + s (W_up relu(W_down x + b_1) + b_2),   x the sublayer's own input, F the sublayer

The scaled parallel adapter of section 4.5, by default beside the feed-forward parts with s = 4. x is what the sublayer
itself reads: in models that normalise before their sublayers the normalised stream (`adapters` reads the stream there,
before the norm). The change is added behind the sublayer and before its residual add.

Start: W_up and the biases zero, W_down uniform in +-1/sqrt(d): the change starts at zero (authors' code). Parameters:
m (in + out) + m + out a site. There is no merged form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from graftlm.core import BottleneckMaps, BranchDelta, Method, Site, Survey, Targets, one_of
from graftlm.methods.bottleneck import ACTIVATIONS, Bottleneck, branch_sites, width_checks, width_of

__all__ = ["ParallelAdapter", "ParallelDelta"]


@dataclass(frozen=True)
class ParallelAdapter(Method):
    """Bottleneck adapters beside sublayers, scaled (He et al. 2021).

    `width` is that of the bottleneck; `reduction` says it as a fraction of the model's width instead, and goes first.
    `targets` are `ffn`, `attention` or `cross`, with `encoder/` or `decoder/` before them if need be.

    Example:
        >>> print(ParallelAdapter(width=512, targets="ffn,attention"))
        parallel(width=512,targets='ffn,attention')
    """

    name: ClassVar[str] = "parallel"
    title: ClassVar[str] = "Parallel adapter"
    learning_rate: ClassVar[float] = 3e-4
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 3e-3)

    width: int = 64
    reduction: int | None = None
    scale: float = 4.0
    targets: Targets = "ffn"
    activation: str = "relu"
    dropout: float = 0.0
    layers: str | int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.require(
            *width_checks(self.width, self.reduction),
            (self.scale > 0, f"scale {self.scale} is not above 0", "scale=4"),
            one_of("activation", self.activation, ACTIVATIONS),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.1"),
        )  # fmt: skip

    def sites(self, survey: Survey) -> list[Site]:
        """The sublayers that `targets` name in `layers`. Raises MethodError for targets that name none."""
        return branch_sites(self.name, survey, "sublayer", self.targets, self.layers)

    def build(self, site: Site, module: nn.Module) -> ParallelDelta:  # noqa: ARG002
        """A fresh bottleneck for `site`."""
        width = width_of(site.in_features, self.width, self.reduction)
        return ParallelDelta(site.in_features, width, site.out_features, self.activation, self.dropout, self.scale)


class ParallelDelta(BranchDelta):
    """A bottleneck beside a sublayer: it reads the sublayer's input and adds to its output."""

    reads_input: ClassVar[bool] = True
    reads_mask: ClassVar[bool] = False

    def __init__(
        self, width_in: int, width: int, width_out: int, activation: str, dropout: float, scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.parallel = Bottleneck(width_in, width, width_out, activation, dropout)

    def wake(self) -> None:
        """Start with a W_up that is not zero."""
        self.parallel.wake()

    def branch(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """y + s A(x) for the sublayer's input x and output y, both [rows, tokens, width] or [tokens, width]."""
        return y + self.change(x, y)

    def as_bottleneck(self) -> BottleneckMaps | None:
        """The scaled bottleneck."""
        return self.parallel.maps(self.scale)

    def change(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """What is added to y, of its shape."""
        change: Tensor = self.parallel(x) * self.scale
        return change
