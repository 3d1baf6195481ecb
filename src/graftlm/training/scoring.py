"""The scores of a run: the adapter beside the untouched base and the baselines, on rows it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from graftlm.core import use
from graftlm.data import Labels, Template
from graftlm.evaluation import (
    classification_scores,
    generate_texts,
    losses,
    majority_baseline,
    probe_baseline,
    text_scores,
    tfidf_baseline,
)
from graftlm.evaluation.classes import calibration, class_probabilities
from graftlm.evaluation.losses import Collate, RowLosses
from graftlm.objectives import Objective

_BASELINE_ROWS = 2000

__all__ = ["questions_of", "score_classification", "score_text", "text_results", "write_samples"]


def score_classification(
    model: Any,
    labels: Labels,
    held: Sequence[Any],
    collate: Collate,
    *,
    adapter: str,
    train: Sequence[Any] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results for run.json and one line a prediction; baselines where training rows are given."""
    truth = [int(item["labels"]) for item in held]
    found = class_probabilities(model, held, collate)
    predicted = [int(at) for at in found.argmax(1)]
    rivals: list[tuple[str, str, list[int]]] = [("tuned", f"tuned: {adapter}", predicted)]
    if train:
        # Baselines are cheap yardsticks: a few thousand rows settle them.
        train = train[:_BASELINE_ROWS]
        known = [int(item["labels"]) for item in train]
        with use(model, None):
            rivals.append(("probe", "frozen base + trained head", probe_baseline(model, train, held, collate)))
        texts = [[item["example"].text for item in part] for part in (train, held)]
        rivals.append(("tfidf", "TF-IDF + logistic regression", tfidf_baseline(texts[0], known, texts[1])))
        rivals.append(("majority", "always the commonest label", majority_baseline(known, len(held))))
    names = [labels.name(at) for at in range(len(labels))]
    precision, recall, f1, rows = precision_recall_fscore_support(
        truth, predicted, labels=range(len(names)), zero_division=0
    )
    results = {
        "task": "classify",
        "labels": names,
        "eval_rows": len(held),
        "scores": [
            {"name": name, "title": title} | classification_scores(truth, guess, len(names))
            for name, title, guess in rivals
        ],
        "per_label": [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, rows, strict=True)
        ],
        "calibration": calibration(truth, found),
        "confusion": confusion_matrix(truth, predicted, labels=range(len(names))).tolist(),
    }
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "label": names[want],
            "predicted": names[got],
            "probability": round(float(chances[got]), 4),
            "nats": round(float(-np.log(max(chances[want], 1e-12))), 4),
        }
        for item, want, got, chances in zip(held, truth, predicted, found, strict=True)
    ]
    return results, lines


def score_text(
    model: Any, objective: Objective, held: Sequence[Any], collate: Collate, *, adapter: str
) -> dict[str, Any]:
    """Results for run.json: loss per token of the adapter and of the untouched base."""
    tuned = losses(model, objective, held, collate)
    with use(model, None):
        base = losses(model, objective, held, collate)
    return text_results(tuned, base, adapter=adapter)


def text_results(tuned: RowLosses, base: RowLosses, *, adapter: str) -> dict[str, Any]:
    """Results for run.json out of the losses of the adapter and of the untouched base on the same rows."""
    return {
        "eval_rows": len(tuned.sums),
        "eval_tokens": int(tuned.counts.sum()),
        "scores": [
            {"name": "tuned", "title": f"tuned: {adapter}"} | text_scores(tuned),
            {"name": "base", "title": "untouched base"} | text_scores(base),
        ],
    }


def write_samples(
    model: Any, tokenizer: Any, template: Template | None, held: Sequence[Any], count: int, **options: Any
) -> list[dict[str, str]]:
    """Answers of base and adapter to the first `count` held-out prompts, beside the reference."""
    chosen = held[:count]
    if template is not None:
        pairs: list[Any] = questions_of(chosen)
    else:
        pairs = [_halves(item["example"].text) for item in chosen]
    if not pairs:
        return []
    prompts = [prompt for prompt, _ in pairs]
    tuned = generate_texts(model, tokenizer, template, prompts, **options)
    with use(model, None):
        base = generate_texts(model, tokenizer, template, prompts, **options)
    return [
        {"prompt": _last_words(prompt), "reference": reference, "base": b, "tuned": t}
        for (prompt, reference), b, t in zip(pairs, base, tuned, strict=True)
    ]


def questions_of(rows: Sequence[Any]) -> list[tuple[list[Any], str]]:
    """The messages before each row's last answer, and that answer; rows that ask nothing are left out."""
    found = []
    for item in rows:
        messages = list(item["example"].messages)
        answer = str(messages[-1]["content"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            found.append((messages, answer))
    return found


def _halves(text: str) -> tuple[str, str]:
    words = text.split()[:60]
    return " ".join(words[: len(words) // 2 or 1]), " ".join(words[len(words) // 2 or 1 :])


def _last_words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
