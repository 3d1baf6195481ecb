"""Pruning of the frozen base: entries of the weights that matter least count as zero; nothing is trained by it.

    W' = W * M,   M in {0, 1}

Scores: `magnitude` |w|, and `wanda` |w| times the norm of the input that it meets (Sun et al. 2023, "A Simple and
Effective Pruning Approach...", equation 1), which needs `attach(..., samples=...)`. They are compared within each
output row (Wanda's choice), within a tensor, or in groups of m inputs of which n are kept (`pattern="2:4"`). With
`initial` below `sparsity` the share of zeros rises along a cubic between the shares `begin` and `end` of the run (Zhu
and Gupta 2017); the scores are then kept until the adapter is saved. It composes with other methods by `+`: their
changes act beside the mask, and a merge of both adds them up, so entries that a low-rank change touches are no zeros
any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from graftlm.core import Method, ParameterDelta, Part, Samples, Site, Survey, Targets, in_eval_mode
from graftlm.methods.parameters import weight_of, weights_at

__all__ = ["Prune", "PruneDelta"]


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
            (
                self.score in ("magnitude", "wanda"),
                f"score {self.score!r} is neither magnitude nor wanda",
                "score=wanda",
            ),
            (self.scope in ("row", "tensor"), f"scope {self.scope!r} is neither row nor tensor", "scope=row"),
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
        """The mask of the weight at `site`, by magnitude until something is measured."""
        weight = weight_of(self, site, module)
        delta = PruneDelta(tuple(weight.shape), self.initial is not None)
        if not delta.mask.is_meta:
            self._begin(delta, site, weight.detach().float().abs())
        return delta

    def _begin(self, delta: PruneDelta, site: Site, score: Tensor) -> None:
        """Start from `score`, which a schedule keeps."""
        if delta.scores is not None:
            delta.scores.copy_(score)
        self._set(delta, site, score, self._first)

    @property
    def _first(self) -> float:
        return self.sparsity if self.initial is None else self.initial

    def _set(self, delta: PruneDelta, site: Site, score: Tensor, sparsity: float) -> None:
        """Put the mask of `sparsity` in place; rows are outputs, whatever way round the weight is stored."""
        across = site.kind == "conv1d"
        by_row = score.T if across else score
        mask = _mask(by_row, sparsity, self.scope, self.pattern)
        delta.mask.copy_(mask.T if across else mask)

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
        for part, norms in zip(parts, measured, strict=True):
            weight = weight_of(self, part.site, model.get_submodule(part.site.path)).detach().float().abs()
            norms = norms.to(weight.device)
            score = weight * (norms[:, None] if part.site.kind == "conv1d" else norms)
            self._begin(cast(PruneDelta, part.delta), part.site, score)

    def share(self, step: int, total: int) -> float:
        """The share of zeros after optimizer step `step` of `total`."""
        start, first, last = self._first, self.begin * total, self.end * total
        if step >= last:
            return self.sparsity
        if step <= first:
            return start
        return self.sparsity + (start - self.sparsity) * (1 - (step - first) / (last - first)) ** 3

    def after_step(self, parts: Sequence[Part], step: int, total: int) -> None:
        """Follow the schedule, where there is one."""
        if self.initial is None:
            return
        for part in parts:
            delta = cast(PruneDelta, part.delta)
            if delta.scores is not None:
                self._set(delta, part.site, delta.scores, self.share(step, total))

    def bake(self, part: Part) -> Part:
        """The mask alone: what a schedule needs is dropped."""
        if self.initial is None:
            return part
        delta = PruneDelta(tuple(cast(PruneDelta, part.delta).mask.shape), False)
        delta.mask = cast(PruneDelta, part.delta).mask.clone()
        return Part(dataclasses.replace(self, initial=None), part.site, delta)


class PruneDelta(ParameterDelta):
    """A mask over one weight: True where an entry stays (stored as bytes)."""

    mask: Tensor
    scores: Tensor | None

    def __init__(self, shape: tuple[int, ...], scheduled: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("scores", torch.zeros(shape, dtype=torch.float32) if scheduled else None)

    def parameter(self, base: Tensor) -> Tensor:
        """The weight with zeros where the mask says so."""
        return base * self.mask


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
