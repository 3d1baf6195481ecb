"""Losses of a model over rows, one sum a row, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftlm.core import in_eval_mode
from graftlm.data.collating import length_of
from graftlm.evaluation.statistics import mean_interval
from graftlm.objectives import Objective, Reference, settle

__all__ = ["RowLosses", "batches", "evaluating", "losses", "text_scores"]

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class RowLosses:
    """The summed loss of each evaluation batch and how many losses it holds, in the rows' order."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Loss per token (or per row), over everything."""
        return float(self.sums.sum() / max(self.counts.sum(), 1))

    def interval(self, *, level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
        """A bootstrap interval of the mean over rows; the same numbers give the same interval."""
        found = mean_interval(self.sums, self.counts, level=level, draws=draws)
        return found.low, found.high


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients and evaluation mode for the block; the mode is put back after."""
    with in_eval_mode(model), torch.inference_mode():
        yield


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items` in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def losses(
    model: Any,
    objective: Objective,
    items: Sequence[Mapping[str, Any]],
    collate: Collate,
    *,
    batch: int = 16,
    reference: Reference | None = None,
) -> RowLosses:
    """The loss of every row of `items` under the routing in force, computed in batches of similar length.

    `reference` is what objectives compare with that need it (DPO, KTO).
    """
    order = sorted(range(len(items)), key=lambda at: length_of(items[at]))
    sums, counts = np.zeros(len(items)), np.zeros(len(items), dtype=np.int64)
    with evaluating(model):
        for part in batches(order, batch):
            together = {k: v.to(model.device) for k, v in collate([items[at] for at in part]).items()}
            settle(model, objective, [together], reference)
            outputs = objective.outputs(model, together)
            for at, total, count in zip(part, *objective.row_losses(outputs, together), strict=True):
                sums[at], counts[at] = total, count
    return RowLosses(sums, counts)


def text_scores(found: RowLosses) -> dict[str, float]:
    """Loss in nats per token with its interval, and perplexity."""
    low, high = found.interval()
    return {"loss": found.mean, "loss_low": low, "loss_high": high, "perplexity": math.exp(min(found.mean, 80.0))}
