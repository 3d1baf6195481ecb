"""Sparse fine-tuning: a chosen few entries of the weights are trained, the rest stay (Sung et al. 2021, "FISH mask").

    W' = W + scatter(index, value),   k entries in all, chosen once by score (`graftlm.methods.scoring`)

Only the indices (int32 where they fit) and the values are held and optimised, so a step's memory beyond the forward
is that of k numbers; masking gradients instead would keep full-size moments and decay what is not chosen. Where few
entries change, the map stays as it is and the change is a sparse product beside it, so that no changed weight and no
gradient of a whole weight is ever built. Start: values zero. Parameters: k = int(fraction * N) over the N entries of
the targeted weights (`scope=global`), or of each tensor by itself; or as many as have a score of `threshold` or more.
With `unit=layer` or `unit=head` whole layers or attention heads are chosen by the mean score of their entries: a share
of `fraction`, at least one. A head is its rows of the query, key and value maps and its columns of the output map;
query heads that share a key-value head are one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Delta, Method, ParameterDelta, Part, Samples, Site, Survey, Targets, device_at, one_of
from graftlm.core.storage import is_across, plain_weight
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import shape_of, weights_at
from graftlm.methods.scoring import FROM_DATA, SCORES, best, scores_from_data

__all__ = ["Sparse", "SparseDelta"]

_UNITS = ("entry", "head", "layer")
_OF_HEADS = ("query", "key", "value", "output")
#: A weight of fewer than one changed entry in so many is multiplied beside the map where that saves a product.
_SPARSE = 8
#: How many entries of a weight are built in the time of one multiplication by a chosen entry.
_BUILT = 4


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
    threshold: float | None = None
    unit: str = "entry"
    score: str = "magnitude"
    scope: str = "global"
    targets: Targets = "all-linear"
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()

    def __post_init__(self) -> None:
        self.require(
            (0 < self.fraction <= 1, f"fraction {self.fraction} is not in (0, 1]", "fraction=0.005"),
            one_of("score", self.score, SCORES),
            one_of("scope", self.scope, ("global", "tensor")),
            one_of("unit", self.unit, _UNITS),
            (
                self.unit == "entry" or self.scope == "global",
                f"scope={self.scope} has no meaning with unit={self.unit}, which is chosen among all",
                "scope=global",
            ),
            (
                self.threshold is None or 0 < self.threshold < math.inf,
                f"threshold {self.threshold} is not above 0",
                "threshold=0.01",
            ),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The weights of the linear maps that `targets` name in `layers`."""
        found = survey.select(self.targets, layers=self.layers, exclude=self.exclude, kinds=("linear", "conv1d"))
        weights = weights_at(self, found)
        return [self._with_heads(site, survey) for site in weights] if self.unit == "head" else weights

    def _with_heads(self, site: Site, survey: Survey) -> Site:
        """`site` with the heads of its attention call, whose path is its `entry`. Raises MethodError without one."""
        near = [call for call in survey.attentions if call.layer == site.layer and call.stack == site.stack]
        near = near or [call for call in survey.attentions if call.layer == site.layer]
        call = max(near, key=lambda each: _shared(each.path, site.path), default=None)
        wide = site.in_features if site.role == "output" else site.out_features
        heads = 0 if call is None else call.kv_heads if site.role in ("key", "value") else call.heads
        if call is None or site.role not in _OF_HEADS or wide != heads * call.head_width:
            raise MethodError(
                Finding(
                    "T164",
                    f"{self.name}: unit=head wants query, key, value and output maps, and {site.path} is "
                    f"{site.role or 'none'}" + (", several in one" if site.role == "qkv" else ""),
                    fix="targets=attention" if site.role != "qkv" else "unit=layer",
                )
            )
        return replace(site, heads=call.heads, kv_heads=call.kv_heads, head_width=call.head_width, entry=call.path)

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A delta for each weight; its entries are chosen here, or by `apply_measured` for scores from data."""
        maps = [modules[site.path] for site in sites]
        if not values or self.score in FROM_DATA:
            # How many fall to each tensor is known later; an even share stands for it.
            with torch.device("meta" if not values else "cpu"):
                chosen = [torch.arange(max(1, int(self.fraction * math.prod(shape_of(each))))) for each in maps]
        else:
            chosen = self._chosen(map(self._score, maps), sites, maps)
        found = [
            SparseDelta(index, shape_of(each), across=is_across(each)) for index, each in zip(chosen, maps, strict=True)
        ]
        return [
            delta.to(device_at(modules, site.path)) if values else delta
            for site, delta in zip(sites, found, strict=True)
        ]

    def _score(self, module: nn.Module) -> Tensor:
        """The score without data of every entry of a map's weight."""
        return torch.rand(shape_of(module)) if self.score == "random" else plain_weight(module).detach().float().abs()

    def _chosen(self, scores: Iterable[Tensor], sites: Sequence[Site], maps: Sequence[nn.Module]) -> list[Tensor]:
        """The flat indices of what is trained in each weight, for its score, one after the other.

        Raises MethodError where the threshold leaves nothing.
        """
        if self.unit != "entry":
            return self._units(scores, sites, maps)
        if self.threshold is not None:
            found, highest = [], 0.0
            for score in scores:
                found.append((score.flatten() >= self.threshold).nonzero().flatten())
                highest = max(highest, float(score.max()))
            self._some(any(map(len, found)), highest)
            return found
        if self.scope == "tensor":
            return [best([score], max(1, int(self.fraction * score.numel())))[0] for score in scores]
        return best(scores, max(1, int(self.fraction * sum(math.prod(shape_of(each)) for each in maps))))

    def _units(self, scores: Iterable[Tensor], sites: Sequence[Site], maps: Sequence[nn.Module]) -> list[Tensor]:
        """The entries of the best layers or heads by their mean score."""
        totals: dict[tuple[str, int], tuple[float, int]] = {}
        across = [is_across(each) for each in maps]
        for site, turned, score in zip(sites, across, scores, strict=True):
            for number, part in enumerate(_blocks(score, site, self.unit, turned)):
                total, count = totals.get(key := _unit_of(site, number, self.unit), (0.0, 0))
                totals[key] = (total + float(part.double().sum()), count + part.numel())
        means = {key: total / count for key, (total, count) in totals.items()}
        ranked = sorted(means, key=lambda key: -means[key])
        if self.threshold is None:
            chosen = set(ranked[: max(1, int(self.fraction * len(ranked)))])
        else:
            chosen = {key for key in ranked if means[key] >= self.threshold}
            self._some(bool(chosen), means[ranked[0]])
        found = []
        for site, turned, each in zip(sites, across, maps, strict=True):
            places = torch.arange(math.prod(shape := shape_of(each))).view(shape)
            own = [
                part.flatten()
                for number, part in enumerate(_blocks(places, site, self.unit, turned))
                if _unit_of(site, number, self.unit) in chosen
            ]
            found.append(torch.cat(own).sort().values if own else places.new_empty(0))
        return found

    def _some(self, any_: bool, best_: float) -> None:
        if not any_:
            raise MethodError(
                Finding(
                    "T163",
                    f"{self.name}: no score of a {self.unit} reaches {self.threshold:g}, the best is {best_:.4g}",
                    fix=f"threshold={best_ / 2:.2g}, or fraction={self.fraction:g} without threshold",
                )
            )

    @property
    def needs_samples(self) -> bool:
        """True for scores from data."""
        return self.score in FROM_DATA

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> list[Tensor]:
        """The chosen flat indices of each weight."""
        maps = [model.get_submodule(site.path) for site in sites]
        return self._chosen(scores_from_data(model, maps, self.score, samples), sites, maps)

    def apply_measured(self, parts: Sequence[Part], measured: Any, model: nn.Module) -> None:
        """Give each delta its entries."""
        del model
        for part, index in zip(parts, measured, strict=True):
            cast(SparseDelta, part.delta).choose(index)


def _shared(one: str, other: str) -> int:
    """How many names two paths have in common from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _blocks(weight: Tensor, site: Site, unit: str, across: bool) -> Sequence[Tensor]:
    """The parts of a weight that belong to one unit each: one for layers; for heads by key-value head."""
    if unit == "layer":
        return (weight,)
    by_row = weight.T if across else weight
    return by_row.tensor_split(site.kv_heads, dim=1 if site.role == "output" else 0)


def _unit_of(site: Site, number: int, unit: str) -> tuple[str, int]:
    """What tells a unit from others: a layer of a stack, or a head of an attention call."""
    if unit == "head":
        return site.entry, number
    return (site.path, -1) if site.layer is None else (site.stack, site.layer)


class SparseDelta(ParameterDelta):
    """Trained values at chosen flat indices of one weight, stored [out, in], or `across` as [in, out]."""

    sizes_from_state: ClassVar[bool] = True
    index: Tensor

    def __init__(self, index: Tensor, shape: tuple[int, ...], *, across: bool = False) -> None:
        super().__init__()
        self.shape, self.across = shape, across
        self.kind = torch.int32 if math.prod(shape) < 2**31 else torch.int64
        self.register_buffer("index", index.to(self.kind))
        self.value = nn.Parameter(torch.zeros(index.shape, dtype=torch.float32, device=index.device))
        self._kept: tuple[Any, ...] = (None,)

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

    def adds(self, x: Tensor, rows: bool) -> bool:
        """Whether `add` is cheaper than a changed weight for an input `x` [..., in].

        For some `rows` of a batch a changed weight means a product of their own with it, and for training the gradient
        of all of it; for all rows, only that it is built.
        """
        entries, total = self.index.numel(), math.prod(self.shape)
        if rows or torch.is_grad_enabled():
            return entries * _SPARSE < total
        return entries * (x.numel() // x.shape[-1]) * _BUILT < total

    def as_entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The chosen entries, unless they are many."""
        if self.index.numel() * _SPARSE >= math.prod(self.shape):
            return None
        outputs, inputs = self.index.long() // self.shape[1], self.index.long() % self.shape[1]
        return (inputs, outputs, self.value.detach()) if self.across else (outputs, inputs, self.value.detach())

    def add(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """What the values add to the map's output, [..., out], for its input x [..., in]."""
        del weight
        starts, outputs, inputs, order = self._layout()
        value = (self.value if order is None else self.value.index_select(0, order)).to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) == 1:
            # In one dimension: along the last of two it takes ten times as long.
            token = flat[0]
            change = token.new_zeros(len(starts)).index_add(0, outputs, token.index_select(0, inputs) * value)
        else:
            # A bag for each output: the sum of its inputs' columns, weighted by its values.
            change = F.embedding_bag(inputs, flat.T.contiguous(), starts, per_sample_weights=value, mode="sum").T
        return change.view(*x.shape[:-1], -1)

    def _layout(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Where each output's entries start, and each entry's output and input, by output; its place if another."""
        index = self.index
        known = (index, None if index.is_inference() else index._version, index.device)
        if self._kept[0] is not index or self._kept[1:3] != known[1:] or known[1] is None:
            index = index.long()
            width = self.shape[1]
            outputs, inputs = index // width, index % width
            if self.across:
                outputs, inputs = inputs, outputs
            order = None
            if bool((outputs[1:] < outputs[:-1]).any()):
                order = outputs.argsort(stable=True)
                outputs, inputs = outputs[order], inputs[order]
            counts = outputs.new_zeros(self.shape[1 if self.across else 0])
            counts.index_add_(0, outputs, torch.ones_like(outputs))
            small = (tensor.to(self.kind) for tensor in (counts.cumsum(0) - counts, outputs, inputs))
            self._kept = (*known, (*small, order))
        found: tuple[Tensor, Tensor, Tensor, Tensor | None] = self._kept[3]
        return found
