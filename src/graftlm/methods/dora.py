"""DoRA: the direction of a weight adapted by LoRA, its magnitude trained beside (Liu et al. 2024, "DoRA: Weight-...").

    y = m * (W + s B A) x / ||W + s B A|| + b          (equation 5; the norm of each row, m in R^out)

The norm counts as a constant for gradients (section 4.3). Start: A and B as LoRA's, m = ||W||, so that the model is the
same. With n = m / ||W + s B A|| and the base's own output W x + b, what is added is (n - 1) W x + n s B A x, and the
norm needs no dense W + s B A:

    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T     for a row w of W and b of B

With dropout, both terms read the dropped input, as in the authors' code. Parameters: r (in + out) + out a site.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Base, LinearDelta, LowRank, Site
from graftlm.errors import Finding
from graftlm.methods.lora import LoRA, draw, weight_at

__all__ = ["DoRA", "DoRADelta"]


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA for the direction of each row, a trained number for its length.

    The settings are LoRA's; `bias` and starts from the weights do not go with it, nor do embeddings and experts.

    Example:
        >>> print(DoRA(rank=8, targets="query,value"))
        dora(rank=8,targets='query,value')
    """

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    learning_rate: ClassVar[float] = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            (not self.bias, "bias=True does not go with it", "bias=False"),
            (self.start in ("default", "gaussian"), f"start={self.start} does not go with it", "start=default"),
        )

    def misfits(self, site: Site) -> list[Finding]:
        """Embeddings and experts, whose rows are looked up or chosen, so that there is no output to rescale."""
        if site.kind in ("linear", "conv1d"):
            return []
        what = "an embedding" if site.kind == "embedding" else "a stack of experts"
        return [
            Finding(
                "T130",
                f"{self.name}: {site.key} is {what}, and the norm is taken of linear maps",
                fix=f"exclude={site.path.rpartition('.')[2]}, or method lora there",
            )
        ]

    def build(self, site: Site, module: nn.Module) -> DoRADelta:
        """A fresh change of direction, and the lengths of the rows of the weight at `site`."""
        rank, scale = self.rank_at(site.path), self.scale_at(site.path)
        delta = DoRADelta(site.in_features, site.out_features, rank, scale, self.dropout, self.start)
        if not delta.lora_A.is_meta:
            with torch.no_grad():
                delta.lora_magnitude_vector.copy_(_squares(weight_at(site, module, self.name)).sqrt())
        return delta


class DoRADelta(LinearDelta):
    """The change (n - 1) W x + n s B A x at one linear map, n = m / ||W + s B A|| by rows."""

    def __init__(
        self, width_in: int, width_out: int, rank: int, scale: float, dropout: float, start: str = "default"
    ) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, width_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(width_out, rank, dtype=torch.float32))
        self.lora_magnitude_vector = nn.Parameter(torch.ones(width_out, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout) if dropout else None
        self._known: tuple[Any, Tensor] | None = None  # the squared norms of a weight's rows, by what tells it apart
        draw(self.lora_A, start, rank)

    def wake(self) -> None:
        """Start with B as A is."""
        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def add_over(self, x: Tensor, base: Base) -> Tensor:
        """(n - 1) W x + n s B A x for x of shape [..., in]; W x is the base's output without its bias."""
        if self.dropout is not None and self.training:
            x = self.dropout(x)
            plain = base.map(x)
        else:
            plain = base.output if base.bias is None else base.output - base.bias
        n = self._lengths(base)
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale
        return (n - 1).to(plain.dtype) * plain + n.to(change.dtype) * change

    def low_rank_over(self, weight: Tensor, stored: nn.Parameter) -> LowRank | None:
        """n (W x + s B A x), while nothing is dropped: with dropout the base reads the dropped input too."""
        if self.dropout is not None and self.training:
            return None
        with torch.no_grad():
            squares = self._squares(stored, lambda: weight)
            mapped = F.linear(self.lora_A.to(weight.dtype), weight)
        gain = self._gain(squares, mapped)
        return LowRank(self.lora_A, self.lora_B, self.scale, gain=gain)

    def _lengths(self, base: Base) -> Tensor:
        """n for the weight of `base`."""
        with torch.no_grad():
            squares = self._squares(base.stored, base.weight)
            if base.stored is not None and base.stored.is_floating_point():
                weight = base.weight()
                mapped = F.linear(self.lora_A.to(weight.dtype), weight)
            else:  # W A^T as the module itself computes it: nothing is dequantised as a whole
                mapped = base.map(self.lora_A.to(base.output.dtype))
        return self._gain(squares, mapped)

    def _gain(self, squares: Tensor, mapped: Tensor) -> Tensor:
        """n = m / ||W + s B A||, float32 [out]; only m gets a gradient. A row of zeros keeps n = 1.

        `squares` are those of ||w||, [out], and `mapped` is A W^T [rank, out].
        """
        with torch.no_grad():
            gram = self.lora_A @ self.lora_A.T
            cross = (mapped.T.float() * self.lora_B).sum(1)
            own: Tensor = ((self.lora_B @ gram) * self.lora_B).sum(1)
            norm = (squares + 2 * self.scale * cross + self.scale**2 * own).clamp_min(0).sqrt()
        return self._over(norm)

    def _over(self, norm: Tensor) -> Tensor:
        tiny = torch.finfo(norm.dtype).tiny
        return torch.where(norm > 0, self.lora_magnitude_vector / norm.clamp_min(tiny), torch.ones_like(norm))

    def _squares(self, owner: nn.Parameter | None, weight: Callable[[], Tensor]) -> Tensor:
        """The squared norm of each row of the weight, kept as long as it is the very same weight, unchanged."""
        if owner is None or owner.is_inference() or not isinstance(owner, nn.Parameter):
            return _squares(weight())
        version = (owner._version, owner.data_ptr(), owner.dtype)
        # A freed weight's address is soon another's: the weight itself is remembered, without keeping it alive.
        if self._known is None or self._known[0][0]() is not owner or self._known[0][1] != version:
            self._known = ((weakref.ref(owner), version), _squares(weight()))
        return self._known[1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy acts on another weight, and a weak reference cannot be stored.
        return {**self.__dict__, "_known": None}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m (W + s B A) / ||W + s B A|| by rows; the bias stays."""
        turned = weight + self.scale * (self.lora_B @ self.lora_A)
        return self._over(_squares(turned).sqrt())[:, None] * turned, bias


def _squares(weight: Tensor) -> Tensor:
    """The squared norm of each row of `weight` [out, in], float32 [out]."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norm.square()
