r"""Series adapters: a small bottleneck behind a sublayer, with a residual around it.

    A(h) = W_up act(W_down h + b_1) + b_2

| variant | where | what goes on | act |
|---|---|---|---|
| `houlsby` | behind (cross-)attention and the feed-forward part, before the residual add | y + A(y) | gelu |
| `pfeiffer` | behind the add of the feed-forward part; x = LN(s) where a norm follows | s + A(x) | relu |
| `lin` | there too, behind a LayerNorm of its own | s + A(LN(x)) | relu |

- Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1: behind the sublayer's dropout.
  Where that is no module of the model, the adapter stands before it.
- Pfeiffer et al. 2020, "AdapterFusion". With norms behind the adds, as in BERT, the block gives LN(s + A(LN(s))).
- Lin et al. 2020, "Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning", section 3;
  "Adapter-L" in the LoRA paper.

Start: W_up and the biases zero and W_down uniform in +-1/sqrt(d), so that the model starts as it was. Houlsby et al.
draw both maps from a normal distribution with deviation 1e-3, cut off at two deviations; that is
`start=near-identity`. They also train every norm: add `+modules(norm)`. Parameters: 2 m d + m + d a site, 2 d more for
the LayerNorm of `lin`. There is no merged form.
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import BottleneckMaps, BranchDelta, Method, Site, Survey, one_of
from graftlm.methods.bottleneck import ACTIVATIONS, STARTS, Bottleneck, branch_sites, width_checks, width_of

__all__ = ["SeriesAdapter", "SeriesDelta"]

_VARIANTS = {
    "houlsby": ("sublayer", ("attention", "ffn"), "gelu"),
    "pfeiffer": ("stream", ("ffn",), "relu"),
    "lin": ("stream", ("ffn",), "relu"),
}


@dataclass(frozen=True)
class SeriesAdapter(Method):
    """Bottleneck adapters behind sublayers (Houlsby et al. 2019; Pfeiffer et al. 2020; Lin et al. 2020).

    `width` is that of the bottleneck; `reduction` says it as a fraction of the model's width instead, and goes first.
    `layers` leaves layers out, as AdapterDrop does (Rücklé et al. 2021): `layers="4:"` has none in the first four.
    `activation` and `start` are the variant's own unless given; the norms are trained too by `+modules(norm)`.

    Example:
        >>> print(SeriesAdapter(reduction=16, variant="pfeiffer"))
        series(reduction=16,variant=pfeiffer)
    """

    name: ClassVar[str] = "series"
    title: ClassVar[str] = "Series adapter"
    learning_rate: ClassVar[float] = 3e-4
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 3e-3)

    width: int = 64
    reduction: int | None = None
    variant: str = "houlsby"
    activation: str | None = None
    dropout: float = 0.0
    start: str = "identity"
    layers: str | int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.require(
            *width_checks(self.width, self.reduction),
            one_of("variant", self.variant, _VARIANTS),
            one_of("activation", "gelu" if self.activation is None else self.activation, ACTIVATIONS),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.1"),
            one_of("start", self.start, STARTS),
        )  # fmt: skip

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]  # it depends on a setting
        """Whether the maps behind the bottleneck start at zero."""
        return self.start == "identity"

    def sites(self, survey: Survey) -> list[Site]:
        """The sublayers, or the stream behind the feed-forward parts, in `layers`. Raises MethodError without any."""
        kind, targets, _ = _VARIANTS[self.variant]
        return branch_sites(self.name, survey, kind, targets, self.layers)

    def build(self, site: Site, module: nn.Module) -> SeriesDelta:  # noqa: ARG002
        """A fresh bottleneck for `site`."""
        activation = self.activation or _VARIANTS[self.variant][2]
        width = width_of(site.out_features, self.width, self.reduction)
        return SeriesDelta(site.out_features, width, activation, self.dropout, self.start, self.variant)


class SeriesDelta(BranchDelta):
    """A bottleneck behind a sublayer of `features`; it reads what its variant reads, and adds to what goes on."""

    reads_mask: ClassVar[bool] = False

    def __init__(self, features: int, width: int, activation: str, dropout: float, start: str, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.series = Bottleneck(features, width, features, activation, dropout, start)
        self.norm_weight = self.norm_bias = None
        if variant == "lin":
            self.norm_weight = nn.Parameter(torch.ones(features, dtype=torch.float32))
            self.norm_bias = nn.Parameter(torch.zeros(features, dtype=torch.float32))

    def wake(self) -> None:
        """Start with a W_up that is not zero."""
        self.series.wake()

    def branch(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """y + A(y) behind a sublayer, y + A(x) on a stream y that the model's norm makes x of."""
        return y + self.change(x, y)

    def as_bottleneck(self) -> BottleneckMaps | None:
        """The bottleneck, where it reads y as it is."""
        return self.series.maps() if self.variant == "houlsby" else None

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to y, of its shape [rows, tokens, width]."""
        read = y if self.variant == "houlsby" else x
        if self.norm_weight is not None and self.norm_bias is not None:
            read = F.layer_norm(read, read.shape[-1:], self.norm_weight.to(y.dtype), self.norm_bias.to(y.dtype))
        change: Tensor = self.series(read)
        return change
