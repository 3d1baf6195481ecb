"""Pruning of the frozen base: entries of the weights that matter least count as zero; nothing is trained by it.

    W' = W * M,   M in {0, 1}

Scores: `magnitude` |w|, and `wanda` |w| times the norm of the input that it meets (Sun et al. 2023, "A Simple and
Effective Pruning Approach...", equation 1), which needs `attach(..., samples=...)`. They are compared within each
output row (Wanda's choice), within a tensor, over all weights together (`scope=global`: one threshold), or in groups of
m inputs of which n are kept (`pattern="2:4"`). With `initial` below `sparsity` the share of zeros rises along a cubic
between the shares `begin` and `end` of the run (Zhu and Gupta 2017), in steps of 1/128 of the way; scores are made
anew from the frozen weight at each, so that nothing is held but the masks (and an input norm a column for `wanda`). It
composes with other methods by `+`: their changes act beside the mask, and a merge of both adds them up, so entries that
a low-rank change touches are no zeros any more, unless it is asked to keep them (`adapter.merge(keep_zeros=True)`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from graftlm.core import Delta, Method, ParameterDelta, Part, Samples, Site, Survey, Targets, in_eval_mode, one_of
from graftlm.core.storage import is_across, plain_weight
from graftlm.methods.parameters import shape_of, weights_at

__all__ = ["Prune", "PruneDelta", "lowest"]

#: In how many steps a schedule goes from its first share to its last.
_STEPS = 128


@dataclass(frozen=True)
class Prune(Method):
    """Zero the entries of the targeted weights with the lowest scores.

    Example:
        >>> print(Prune(sparsity=0.5, score="wanda"))
        prune(score=wanda)
    """

    name: ClassVar[str] = "prune"
    title: ClassVar[str] = "pruning"
    starts_as_identity: ClassVar[bool] = False

    sparsity: float = 0.5
    score: str = "magnitude"
    scope: str = "row"
    pattern: str = ""
    initial: float | None = None
    begin: float = 0.0
    end: float = 0.75
    targets: Targets = "all-linear"
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()

    def __post_init__(self) -> None:
        kept, _, of = self.pattern.partition(":")
        numbers = not self.pattern or (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of))
        self.require(
            (0 < self.sparsity < 1, f"sparsity {self.sparsity} is not between 0 and 1", "sparsity=0.5"),
            one_of("score", self.score, ("wanda", "magnitude")),
            one_of("scope", self.scope, ("row", "tensor", "global")),
            (numbers, f"pattern {self.pattern!r} is not n:m with n below m", 'pattern="2:4"'),
            (
                self.initial is None or (0 <= self.initial <= self.sparsity and not self.pattern),
                f"initial {self.initial} is not between 0 and sparsity, or there is a pattern",
                "initial=0.0",
            ),
            (0 <= self.begin <= self.end <= 1, f"begin {self.begin} and end {self.end} are no shares", "end=0.75"),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The weights of the linear maps that `targets` name in `layers`."""
        found = survey.select(self.targets, layers=self.layers, exclude=self.exclude, kinds=("linear", "conv1d"))
        return weights_at(self, found)

    def build(self, site: Site, module: nn.Module) -> PruneDelta:
        """A mask for the weight at `site` that keeps every entry."""
        scheduled = self.initial is not None
        norms = scheduled and self.needs_samples
        return PruneDelta(shape_of(module), site.in_features if norms else None, module if scheduled else None)

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """The masks of the weights, by magnitude until something is measured."""
        deltas = super().build_all(sites, modules, values=values)
        if values:
            maps = [modules[site.path] for site in sites]
            self._set([(cast(PruneDelta, delta), each, None) for delta, each in zip(deltas, maps, strict=True)])
        return deltas

    def _set(self, given: Sequence[_Given], sparsity: float | None = None) -> None:
        """Put the masks of `sparsity` in place, or those of the start."""
        share = sparsity if sparsity is not None else self.sparsity if self.initial is None else self.initial
        if self.scope == "global" and not self.pattern:
            total = sum(delta.mask.numel() for delta, _, _ in given)
            threshold, ties = lowest(lambda: (_score(each) for each in given), int(share * total))
            for each in given:
                mask, ties = _above(_score(each), threshold, ties)
                each[0].mask.copy_(mask)
            return
        for each in given:
            across = is_across(each[1])  # rows are outputs, whatever way round the weight is stored
            score = _score(each)
            mask = _mask(score.T if across else score, share, self.scope, self.pattern)
            each[0].mask.copy_(mask.T if across else mask)

    @property
    def needs_samples(self) -> bool:
        """True for wanda."""
        return self.score == "wanda"

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> list[Tensor]:
        """The norm of each input of each map over all tokens of the samples, [in]."""
        totals = [torch.zeros(site.in_features) for site in sites]

        def note(number: int) -> Any:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                x = inputs[0].detach().float()
                totals[number] += x.reshape(-1, x.shape[-1]).square().sum(dim=0).cpu()

            return hook

        handles = [
            model.get_submodule(site.path).register_forward_pre_hook(note(number)) for number, site in enumerate(sites)
        ]
        try:
            with in_eval_mode(model), torch.no_grad():
                for batch in samples.batches:
                    samples.loss(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return [total.sqrt() for total in totals]

    def apply_measured(self, parts: Sequence[Part], measured: Any, model: nn.Module) -> None:
        """Put the masks of |w| times the norm of its input in place."""
        given: list[_Given] = []
        for part, norms in zip(parts, measured, strict=True):
            delta = cast(PruneDelta, part.delta)
            if delta.norms is not None:
                delta.norms.copy_(norms)
            given.append((delta, model.get_submodule(part.site.path), norms))
        self._set(given)

    def share(self, step: int, total: int) -> float:
        """The share of zeros after optimizer step `step` of `total`."""
        start = self.sparsity if self.initial is None else self.initial
        first, last = self.begin * total, self.end * total
        if step >= last:
            return self.sparsity
        if step <= first:
            return start
        way = 1 - (1 - (step - first) / (last - first)) ** 3
        return start + (self.sparsity - start) * int(way * _STEPS) / _STEPS

    def after_step(self, parts: Sequence[Part], step: int, total: int) -> None:
        """Follow the schedule, where there is one."""
        if self.initial is None or self.share(step, total) == self.share(step - 1, total):
            return
        deltas = [cast(PruneDelta, part.delta) for part in parts]
        self._set([(each, each.module, each.norms) for each in deltas], self.share(step, total))

    def bake(self, part: Part) -> Part:
        """The mask alone: what a schedule needs is dropped."""
        if self.initial is None:
            return part
        delta = PruneDelta(tuple(cast(PruneDelta, part.delta).mask.shape))
        delta.mask = cast(PruneDelta, part.delta).mask.clone()
        return Part(dataclasses.replace(self, initial=None), part.site, delta)


class PruneDelta(ParameterDelta):
    """A mask over one weight: True where an entry stays (stored as bytes).

    A scheduled one knows the module `at` which it acts, whose frozen weight it looks at again, and for `wanda` the
    norms of its `inputs`.
    """

    mask: Tensor
    norms: Tensor | None

    def __init__(self, shape: tuple[int, ...], inputs: int | None = None, module: nn.Module | None = None) -> None:
        super().__init__()
        self.at = (module,)  # in a tuple, so that it is no child
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("norms", None if inputs is None else torch.ones(inputs, dtype=torch.float32))

    @property
    def module(self) -> nn.Module:
        """The module at which a scheduled one acts."""
        (module,) = self.at
        assert module is not None
        return module

    def parameter(self, base: Tensor) -> Tensor:
        """The weight with zeros where the mask says so."""
        return base * self.mask

    def kept(self) -> Tensor:
        """The mask."""
        return self.mask


#: A mask, the map whose weight it is for, and the norms of its inputs where they count.
_Given = tuple[PruneDelta, nn.Module, Tensor | None]


def _score(given: _Given) -> Tensor:
    """|w|, or |w| times the norm of the input that it meets; float32, as the weight is held."""
    _, module, norms = given
    score = plain_weight(module).detach().float().abs().contiguous()
    if norms is None:
        return score
    norms = norms.to(score.device)
    return score * (norms[:, None] if is_across(module) else norms)


def lowest(scores: Callable[[], Iterable[Tensor]], count: int) -> tuple[float, int]:
    """The `count`-th lowest of all scores, and how many of its equals are among the `count` lowest.

    Scores are float32 and not negative; each call of `scores` gives them anew, so that one tensor is held at a time.
    They order as their bits do: the upper half of these is found in a first pass, the lower in a second.

    Example:
        >>> lowest(lambda: [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], 2)
        (2.0, 1)
    """
    if count < 1:
        return 0.0, 0
    upper = torch.zeros(2**15, dtype=torch.long)
    for score in scores():
        upper += (score.flatten().view(torch.int32) >> 16).bincount(minlength=2**15).cpu()
    before = upper.cumsum(0)
    high = int((before < count).sum())
    rest = count - int(before[high] - upper[high])
    lower = torch.zeros(2**16, dtype=torch.long)
    for score in scores():
        bits = score.flatten().view(torch.int32)
        lower += (bits[bits >> 16 == high] & 0xFFFF).bincount(minlength=2**16).cpu()
    before = lower.cumsum(0)
    low = int((before < rest).sum())
    value = torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32)
    return float(value), rest - int(before[low] - lower[low])


def _above(score: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """True for the entries to keep, where those below `threshold` go and the first `ties` of its equals; ties left."""
    mask = score > threshold
    equal = (score == threshold).flatten().nonzero().flatten()
    mask.view(-1)[equal[ties:]] = True
    return mask, max(0, ties - len(equal))


def _mask(score: Tensor, sparsity: float, scope: str, pattern: str) -> Tensor:
    """True for the entries to keep of `score` [out, in]."""
    if pattern:
        kept, of = (int(word) for word in pattern.split(":"))
        rows, columns = score.shape
        whole = columns - columns % of  # inputs behind the last whole group are kept
        groups = score[:, :whole].reshape(rows, -1, of)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter(2, groups.topk(kept, dim=2).indices, True)
        rest = torch.ones(rows, columns - whole, dtype=torch.bool, device=score.device)
        return torch.cat([mask.reshape(rows, whole), rest], dim=1)
    flat = score if scope == "row" else score.reshape(1, -1)
    gone = int(sparsity * flat.shape[1])
    mask = torch.ones_like(flat, dtype=torch.bool).scatter(1, flat.topk(gone, dim=1, largest=False).indices, False)
    return mask.reshape(score.shape)
