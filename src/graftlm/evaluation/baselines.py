"""Baselines that a tuned classifier must beat: the commonest label, words alone, the frozen base with a head."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from graftlm.evaluation.losses import Collate, batches, evaluating
from graftlm.methods.regression import fit_logistic, fit_ridge
from graftlm.objectives import Classification

__all__ = [
    "majority_baseline",
    "probe_baseline",
    "probe_label_sets",
    "probe_numbers",
    "tfidf_baseline",
    "tfidf_label_sets",
    "tfidf_numbers",
]


def majority_baseline(train_labels: Sequence[int], rows: int) -> list[int]:
    """The commonest training label for each of `rows` rows."""
    return [Counter(train_labels).most_common(1)[0][0]] * rows


def tfidf_baseline(train_texts: Sequence[str], train_labels: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Logistic regression on TF-IDF of words and word pairs, its strength chosen by cross-validation."""
    known, wanted = _words(train_texts, texts)
    return _logistic(known, train_labels, wanted, scale=False)


def tfidf_label_sets(train_texts: Sequence[str], train_labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """As `tfidf_baseline`, a regression for each label: whether rows have it, [rows, labels]."""
    known, wanted = _words(train_texts, texts)
    return _each_label(known, train_labels, wanted, scale=False)


def tfidf_numbers(train_texts: Sequence[str], train_values: Sequence[float], texts: Sequence[str]) -> list[float]:
    """Ridge regression on TF-IDF of words and word pairs, its strength chosen by cross-validation."""
    from sklearn.linear_model import RidgeCV

    known, wanted = _words(train_texts, texts)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RidgeCV(alphas=(0.1, 1.0, 10.0), cv=min(4, len(train_texts)))
        return [float(value) for value in model.fit(known, train_values).predict(wanted)]


def probe_baseline(
    model: Any,
    train: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    collate: Collate,
    *,
    batch: int = 32,
) -> list[int]:
    """The frozen base with a trained head: logistic regression on the backbone's output, under the routing in force.

    The features are the final hidden states at the position that the head reads (last token of decoders, first of
    encoders) beside their mean over the row, standardised: a stronger head than the usual one, hence an honest rival.
    """
    labels = [int(item["labels"]) for item in train]
    known, wanted = (_features(model, part, collate, batch) for part in (train, rows))
    return _logistic(known, labels, wanted, scale=True)


def probe_label_sets(
    model: Any, train: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], collate: Collate
) -> np.ndarray:
    """As `probe_baseline` where a row may have several labels: whether it has each, [rows, labels]."""
    labels = np.asarray([item["labels"] for item in train]) > 0.5
    known, wanted = (_features(model, part, collate) for part in (train, rows))
    return _each_label(known, labels, wanted, scale=True)


def probe_numbers(
    model: Any,
    train: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    collate: Collate,
) -> list[float]:
    """As `probe_baseline` for numbers: ridge regression, its strength chosen by cross-validation."""
    known, wanted = (_features(model, part, collate) for part in (train, rows))
    model = fit_ridge(known, values)
    with threadpool_limits(1):
        return [float(value) for value in model.predict(wanted)]


def _words(train_texts: Sequence[str], texts: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF of words and word pairs, or of letters where there are no words, such as of ids."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(train_texts)
    except ValueError:
        words = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit(train_texts)
    return words.transform(train_texts), words.transform(texts)


def _each_label(known: Any, labels: np.ndarray, wanted: Any, *, scale: bool) -> np.ndarray:
    """A logistic regression for each label; one that all rows have, or none, is told so of every row."""
    told = [
        _logistic(known, column.astype(int).tolist(), wanted, scale=scale)
        if column.any() and not column.all()
        else [int(column.all())] * wanted.shape[0]
        for column in labels.T
    ]
    return np.asarray(told, dtype=bool).T


def _features(model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, batch: int = 32) -> np.ndarray:
    found = []
    with evaluating(model):
        for part in batches(items, batch):
            together = Classification().inputs({k: v.to(model.device) for k, v in collate(part).items()})
            hidden = model.base_model(**together)[0].float()
            mask = together["attention_mask"]
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            edge = hidden[torch.arange(len(hidden)), last] if _is_decoder(model) else hidden[:, 0]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found.append(torch.cat([edge, mean], 1).cpu().numpy())
    return np.concatenate(found)


def _is_decoder(model: Any) -> bool:
    # Heads of decoders score every position and keep the last: transformers calls that head `score`.
    return hasattr(model, "score")


def _logistic(features: Any, labels: Sequence[int], wanted: Any, *, scale: bool) -> list[int]:
    strengths = (0.001, 0.01, 0.1, 1.0) if scale else (1.0, 10.0, 100.0)
    model = fit_logistic(features, labels, strengths=strengths, scaled=scale)
    with threadpool_limits(1):
        return [int(label) for label in model.predict(wanted)]
