"""LayerScale: learned vectors that scale what the sublayers add to the stream (Touvron et al. 2021).

"Going deeper with Image Transformers", section 2, equation (4):

    x' = x + l * attention(norm(x)),   x'' = x' + m * feedforward(norm(x'))

where l and m hold a factor for each dimension. The paper starts them near zero and trains everything; here they start
at one, so that the pre-trained model computes what it did, and nothing else is trained. Both act on the output of a
sublayer's last map, W h + b, so they can be merged: W <- diag(l) W, b <- l * b. Parameters: 2 d a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import LinearDelta, Method, Site, Survey, Targets

__all__ = ["LayerScale", "LayerScaleDelta"]


@dataclass(frozen=True)
class LayerScale(Method):
    """Scale what attention and feed-forward parts add, by a learned factor for each dimension.

    Example:
        >>> print(LayerScale(targets="down", layers="-4:"))
        layerscale(targets=down,layers='-4:')
    """

    name: ClassVar[str] = "layerscale"
    title: ClassVar[str] = "LayerScale"
    learning_rate: ClassVar[float] = 3e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-4, 1e-1)

    targets: Targets = ("output", "down")
    layers: str | int | Sequence[int] | None = None

    def sites(self, survey: Survey) -> list[Site]:
        """The maps that `targets` name in `layers`."""
        return survey.select(self.targets, layers=self.layers, kinds=("linear", "conv1d"))

    def build(self, site: Site, module: nn.Module) -> LayerScaleDelta:
        """A fresh vector of ones, as wide as the map's output."""
        return LayerScaleDelta(site.out_features)


class LayerScaleDelta(LinearDelta):
    """The vector at one map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def after(self, y: Tensor) -> Tensor:
        """The output y of shape [..., out], scaled."""
        return y * self.scale.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scaled rows of W, [out, in] whatever the module stores, and the scaled bias."""
        return weight * self.scale[:, None], None if bias is None else bias * self.scale
