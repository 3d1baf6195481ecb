"""Regression: predicted numbers, and how well they follow the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftlm.data import Collator, Scale
from graftlm.data.collating import length_of
from graftlm.evaluation.losses import Collate, batches, evaluating
from graftlm.evaluation.statistics import with_interval
from graftlm.objectives import Regression

__all__ = ["number_scores", "predicted_numbers", "tell_numbers"]


def predicted_numbers(
    model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, scale: Scale, *, batch: int = 32
) -> np.ndarray:
    """The number that the model tells of each item, under the routing in force."""
    order = sorted(range(len(items)), key=lambda at: length_of(items[at]))
    found = np.zeros(len(items))
    with evaluating(model):
        for part in batches(order, batch):
            together = {k: v.to(model.device) for k, v in collate([items[at] for at in part]).items()}
            found[list(part)] = model(**Regression().inputs(together)).logits[:, 0].float().cpu().numpy()
    return np.asarray(scale.mean + scale.deviation * found)


def tell_numbers(
    model: Any, tokenizer: Any, scale: Scale, texts: Sequence[str | tuple[str, str]], *, max_length: int | None = None
) -> list[float]:
    """A number for each text, or pair of texts, by the adapters in force."""
    items = [
        dict(
            tokenizer(
                *((text,) if isinstance(text, str) else text),
                truncation=max_length is not None,
                max_length=max_length,
                verbose=False,
            )
        )
        for text in texts
    ]
    collate = Collator(tokenizer.pad_token_id, max_length=max_length)
    return [float(value) for value in predicted_numbers(model, items, collate, scale)]


def number_scores(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, the first with its interval, and the root of the mean squared error.

    Correlations with something that never changes are 0.

    Example:
        >>> round(number_scores([1.0, 2.0, 3.0, 4.0], [1.1, 1.9, 3.2, 3.9])["pearson"], 3)
        0.993
    """
    wanted, given = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    scores = with_interval("pearson", [wanted, given], _correlation)
    from scipy.stats import rankdata

    scores["spearman"] = float(_correlation(rankdata(wanted), rankdata(given)))
    scores["rmse"] = float(np.sqrt(np.mean((wanted - given) ** 2)))
    return scores


def _correlation(one: np.ndarray, other: np.ndarray, axis: int = -1) -> Any:
    one, other = one - one.mean(axis, keepdims=True), other - other.mean(axis, keepdims=True)
    size = np.sqrt((one**2).sum(axis) * (other**2).sum(axis))
    return np.where(size > 1e-12, (one * other).sum(axis) / np.maximum(size, 1e-12), 0.0)
