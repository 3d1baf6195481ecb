"""Classification: predictions with probabilities, and scores with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftlm.data import Collator, Labels
from graftlm.data.collating import length_of
from graftlm.evaluation.losses import Collate, batches, evaluating
from graftlm.objectives import Classification

__all__ = [
    "Prediction", "calibration", "class_probabilities", "classification_scores", "classify_texts",
    "label_probabilities", "macro_f1",
]  # fmt: skip

_DRAWS = 1000
_BINS = 10


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one text; `probabilities` has every label."""

    label: str
    probability: float
    probabilities: dict[str, float]


def class_probabilities(
    model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, *, batch: int = 32
) -> np.ndarray:
    """Probabilities [rows, classes] of every item under the routing in force; each row sums to 1."""
    logits = _logits(model, items, collate, batch)
    return np.asarray(torch.from_numpy(logits).softmax(-1).numpy())


def label_probabilities(
    model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, *, batch: int = 32
) -> np.ndarray:
    """Probabilities [rows, classes] that each label is there, whatever the others are."""
    return np.asarray(torch.from_numpy(_logits(model, items, collate, batch)).sigmoid().numpy())


def _logits(model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, batch: int) -> np.ndarray:
    order = sorted(range(len(items)), key=lambda at: length_of(items[at]))
    found = np.zeros((len(items), model.config.num_labels))
    with evaluating(model):
        for part in batches(order, batch):
            together = {k: v.to(model.device) for k, v in collate([items[at] for at in part]).items()}
            found[list(part)] = model(**Classification().inputs(together)).logits.float().cpu().numpy()
    return found


def classify_texts(
    model: Any,
    tokenizer: Any,
    labels: Labels,
    texts: Sequence[str | tuple[str, str]],
    *,
    max_length: int | None = None,
    batch: int = 32,
) -> list[Prediction]:
    """A prediction for each text, or pair of texts, by the adapters in force.

    Where a row may have several labels, `label` names those above one half, and `probability` is that of the likeliest.
    """
    cut = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    items = [dict(tokenizer(*((text,) if isinstance(text, str) else text), **cut)) for text in texts]
    collate = Collator(tokenizer.pad_token_id, max_length=max_length)
    tell = label_probabilities if labels.several else class_probabilities
    found = tell(model, items, collate, batch=batch)
    names = [labels.name(at) for at in range(len(labels))]
    predictions = []
    for row in found:
        label = names[int(row.argmax())]
        if labels.several:
            label = ", ".join(name for name, p in zip(names, row, strict=True) if p > 0.5)
        predictions.append(Prediction(label, float(row.max()), {n: float(p) for n, p in zip(names, row, strict=True)}))
    return predictions


def classification_scores(truth: Sequence[int], predicted: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy and macro-F1, each with a 95 % bootstrap interval over rows.

    Example:
        >>> classification_scores([0, 1, 1], [0, 1, 0], 2)["accuracy"]
        0.6666666666666666
    """
    truth_, predicted_ = np.asarray(truth), np.asarray(predicted)
    pairs = truth_ * classes + predicted_
    index = np.random.default_rng(0).integers(0, len(pairs), (_DRAWS, len(pairs)))
    every = np.stack([_confusion(pairs, classes), *(_confusion(pairs[draw], classes) for draw in index)])
    accuracy, f1 = np.einsum("nii->n", every) / every.sum((1, 2)), _macro_f1(every)
    scores: dict[str, float] = {}
    for name, values in (("accuracy", accuracy), ("macro_f1", f1)):
        low, high = np.quantile(values[1:], [0.025, 0.975])
        scores |= {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return scores


def calibration(truth: Sequence[int], probabilities: np.ndarray) -> dict[str, Any]:
    """How far the probabilities [rows, classes] can be believed.

    `ece` is the expected calibration error over ten equal bins of the likeliest class's probability (Naeini et al.
    2015), `brier` the Brier score (0 to 2), `nats` the mean negative log-likelihood. `bins` are (rows, mean
    probability, share right) of each bin that has rows.

    Example:
        >>> calibration([0, 1], np.array([[0.9, 0.1], [0.2, 0.8]]))["ece"]
        0.15
    """
    truth_ = np.asarray(truth)
    surest, right = probabilities.max(1), probabilities.argmax(1) == truth_
    place = np.minimum((surest * _BINS).astype(int), _BINS - 1)
    bins = [
        (int(inside.sum()), float(surest[inside].mean()), float(right[inside].mean()))
        for inside in (place == at for at in range(_BINS))
        if inside.any()
    ]
    of_truth = probabilities[np.arange(len(truth_)), truth_]
    wanted = np.eye(probabilities.shape[1])[truth_]
    return {
        "ece": round(sum(rows * abs(sure - share) for rows, sure, share in bins) / max(len(truth_), 1), 12),
        "brier": float(((probabilities - wanted) ** 2).sum(1).mean()),
        "nats": float(-np.log(np.maximum(of_truth, 1e-12)).mean()),
        "bins": bins,
    }


def macro_f1(truth: Sequence[int], predicted: Sequence[int], classes: int) -> float:
    """Macro-F1 over the classes that occur in either.

    Example:
        >>> macro_f1([0, 1, 1], [0, 1, 1], 2)
        1.0
    """
    pairs = np.asarray(truth) * classes + np.asarray(predicted)
    return float(_macro_f1(_confusion(pairs, classes)[None])[0])


def _confusion(pairs: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Macro-F1 of confusion matrices [n, true, predicted], over the classes that occur in either."""
    right = np.einsum("nii->ni", confusion)
    seen = confusion.sum(1) + confusion.sum(2)
    f1 = np.where(seen > 0, 2 * right / np.maximum(seen, 1), 0.0)
    return np.asarray(f1.sum(1) / np.maximum((seen > 0).sum(1), 1))
