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
from graftlm.methods.regression import fit_logistic
from graftlm.objectives import Classification

__all__ = ["majority_baseline", "probe_baseline", "tfidf_baseline", "tfidf_numbers"]


def majority_baseline(train_labels: Sequence[int], rows: int) -> list[int]:
    """The commonest training label for each of `rows` rows."""
    return [Counter(train_labels).most_common(1)[0][0]] * rows


def tfidf_baseline(train_texts: Sequence[str], train_labels: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Logistic regression on TF-IDF of words and word pairs, its strength chosen by cross-validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(train_texts)
    except ValueError:  # no words at all, such as ids
        words = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit(train_texts)
    return _logistic(words.transform(train_texts), train_labels, words.transform(texts), scale=False)


def tfidf_numbers(train_texts: Sequence[str], train_values: Sequence[float], texts: Sequence[str]) -> list[float]:
    """Ridge regression on TF-IDF of words and word pairs, its strength chosen by cross-validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeCV

    try:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(train_texts)
    except ValueError:  # no words at all, such as ids
        words = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit(train_texts)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RidgeCV(alphas=(0.1, 1.0, 10.0), cv=min(4, len(train_texts)))
        return [
            float(value)
            for value in model.fit(words.transform(train_texts), train_values).predict(words.transform(texts))
        ]


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


def _features(model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, batch: int) -> np.ndarray:
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
