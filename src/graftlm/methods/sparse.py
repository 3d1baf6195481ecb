"""Sparse fine-tuning: a chosen few entries of the weights are trained, the rest stay (Sung et al. 2021, "FISH mask").

    W' = W + scatter(index, value),   k entries in all, chosen once by score (`graftlm.methods.scoring`)

Only the indices (int32 where they fit) and the values are held and optimised, so a step's memory beyond the forward
is that of k numbers; masking gradients instead would keep full-size moments and decay what is not chosen. Start:
values zero. Parameters: k = int(fraction * N) over the N entries of the targeted weights (`scope=global`), or of each
tensor by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from graftlm.core import Delta, Method, ParameterDelta, Part, Samples, Site, Survey, Targets, device_at
from graftlm.methods.parameters import weight_of, weights_at
from graftlm.methods.scoring import FROM_DATA, SCORES, best, scores_from_data

__all__ = ["Sparse", "SparseDelta"]


@dataclass(frozen=True)
class Sparse(Method):
    """Train the entries of the targeted weights with the highest scores.

    Scores from data (`gradient`, `snip`, `empirical-fisher`, `fisher`) need `attach(..., samples=...)`; a run gives
    some of its training rows.

    Example:
        >>> print(Sparse(fraction=0.01, score="fisher"))
        sparse(fraction=0.01,score=fisher)
    """

    name: ClassVar[str] = "sparse"
    title: ClassVar[str] = "sparse fine-tuning"
    learning_rate: ClassVar[float] = 1e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)

    fraction: float = 0.005
    score: str = "magnitude"
    scope: str = "global"
    targets: Targets = "all-linear"
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()

    def __post_init__(self) -> None:
        self.require(
            (0 < self.fraction <= 1, f"fraction {self.fraction} is not in (0, 1]", "fraction=0.005"),
            (self.score in SCORES, f"score {self.score!r} is none of {', '.join(SCORES)}", "score=fisher"),
            (self.scope in ("global", "tensor"), f"scope {self.scope!r} is neither global nor tensor", "scope=global"),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The weights of the linear maps that `targets` name in `layers`."""
        found = survey.select(self.targets, layers=self.layers, exclude=self.exclude, kinds=("linear", "conv1d"))
        return weights_at(self, found)

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A delta for each weight; its entries are chosen here, or by `apply_measured` for scores from data."""
        weights = [weight_of(self, site, modules[site.path]) for site in sites]
        numel = [weight.numel() for weight in weights]
        if not values or self.score in FROM_DATA:
            # How many fall to each tensor is known later; an even share stands for it.
            with torch.device("meta" if not values else "cpu"):
                counts = [max(1, int(self.fraction * each)) for each in numel]
                found = [SparseDelta(torch.arange(count), each) for count, each in zip(counts, numel, strict=True)]
        else:
            scores = [torch.rand(w.shape) if self.score == "random" else w.detach().float().abs() for w in weights]
            found = [SparseDelta(i, n) for i, n in zip(self._chosen(scores), numel, strict=True)]
        return [
            delta.to(device_at(modules, site.path)) if values else delta
            for site, delta in zip(sites, found, strict=True)
        ]

    def _chosen(self, scores: Sequence[Tensor]) -> list[Tensor]:
        if self.scope == "tensor":
            return [best([score], max(1, int(self.fraction * score.numel())))[0] for score in scores]
        return best(scores, max(1, int(self.fraction * sum(score.numel() for score in scores))))

    @property
    def needs_samples(self) -> bool:
        """True for scores from data."""
        return self.score in FROM_DATA

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> list[Tensor]:
        """The chosen flat indices of each weight."""
        weights = [weight_of(self, site, model.get_submodule(site.path)) for site in sites]
        return self._chosen(scores_from_data(model, weights, self.score, samples))

    def apply_measured(self, parts: Sequence[Part], measured: Any, model: nn.Module) -> None:
        """Give each delta its entries."""
        del model
        for part, index in zip(parts, measured, strict=True):
            cast(SparseDelta, part.delta).choose(index)


class SparseDelta(ParameterDelta):
    """Trained values at chosen flat indices of one weight."""

    sizes_from_state: ClassVar[bool] = True
    index: Tensor

    def __init__(self, index: Tensor, numel: int) -> None:
        super().__init__()
        self.kind = torch.int32 if numel < 2**31 else torch.int64
        self.register_buffer("index", index.to(self.kind))
        self.value = nn.Parameter(torch.zeros(index.shape, dtype=torch.float32, device=index.device))

    def adopt(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take as many entries as a stored state has."""
        if "index" in shapes and shapes["index"] != tuple(self.index.shape):
            self.choose(torch.zeros(shapes["index"], dtype=torch.int64, device=self.index.device))

    def choose(self, index: Tensor) -> None:
        """Train the entries at `index` instead, from zero."""
        device = self.index.device
        self.index = index.to(device, self.kind)
        self.value = nn.Parameter(
            torch.zeros(index.shape, dtype=torch.float32, device=device), requires_grad=self.value.requires_grad
        )

    def parameter(self, base: Tensor) -> Tensor:
        """The weight with the values added at their places."""
        flat = base.detach().reshape(-1)
        return flat.index_add(0, self.index.long(), self.value.to(base.dtype)).view(base.shape)
