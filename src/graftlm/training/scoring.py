"""The scores of a run: the adapter beside the untouched base and the baselines, on rows it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from graftlm.core import use
from graftlm.data import Collator, Labels, Template, prepare
from graftlm.errors import DataError, Finding
from graftlm.evaluation import (
    classification_scores,
    generate_texts,
    losses,
    majority_baseline,
    probe_baseline,
    text_scores,
    tfidf_baseline,
)
from graftlm.evaluation.classes import class_probabilities
from graftlm.objectives import CausalLM
from graftlm.training.opening import open_adapter

_BASELINE_ROWS = 2000

__all__ = ["evaluate", "score_classification", "score_text", "write_samples"]


def score_classification(
    model: Any,
    labels: Labels,
    held: Sequence[Any],
    collate: Collator,
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
        "confusion": confusion_matrix(truth, predicted, labels=range(len(names))).tolist(),
    }
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "label": names[want],
            "predicted": names[got],
            "probability": round(float(chances[got]), 4),
        }
        for item, want, got, chances in zip(held, truth, predicted, found, strict=True)
    ]
    return results, lines


def score_text(
    model: Any, objective: CausalLM, held: Sequence[Any], collate: Collator, *, adapter: str
) -> dict[str, Any]:
    """Results for run.json: loss per token of the adapter and of the untouched base."""
    tuned = losses(model, objective, held, collate)
    with use(model, None):
        base = losses(model, objective, held, collate)
    return {
        "eval_rows": len(held),
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
        asked: list[Any] = [list(item["example"].messages) for item in chosen]
        for messages in asked:
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        pairs = [
            (turns, str(item["example"].messages[-1]["content"]))
            for turns, item in zip(asked, chosen, strict=True)
            if turns
        ]
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


def _halves(text: str) -> tuple[str, str]:
    words = text.split()[:60]
    return " ".join(words[: len(words) // 2 or 1]), " ".join(words[len(words) // 2 or 1 :])


def _last_words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def evaluate(
    path: str | Path,
    data: str | Path | None = None,
    *,
    base: str | None = None,
    mapping: dict[str, str] | None = None,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """The scores of a run's (or an adapter's) model on `data`, or on the rows that the run held out.

    Every row of `data` is used. Raises DataError where the rows do not fit the adapter's task, RunError where the data
    of the run have changed.

    Example:
        >>> evaluate("runs/messages-1", "new.csv")["scores"][0]["macro_f1"]     # doctest: +SKIP
    """
    from graftlm.training.run import data_of, held_out_of  # that room scores with this one

    opened = open_adapter(path, base=base)
    if opened.adapter is None:
        raise DataError(Finding("U121", f"{path} is a base model: give a run or an adapter folder"))
    if data is None:
        if mapping or max_rows:
            raise DataError(Finding("U123", "mapping and max_rows are for a file with rows, and none is given"))
        prepared = held_out_of(Path(path), opened)
        held = prepared.eval
    else:
        prepared = prepare(
            data_of(str(data)),
            mapping=mapping,
            eval_share=0,
            max_rows=max_rows,
            task=opened.task,
            tokenizer=opened.tokenizer,
            max_length=opened.max_length,
            labels=opened.labels,
            template=opened.template,
        )
        held = prepared.train
    collate = Collator(opened.tokenizer.pad_token_id, max_length=opened.max_length)
    name = opened.adapter.method.parts[0].title
    if opened.task != "classify":
        return score_text(opened.model, CausalLM.of(opened.model), held, collate, adapter=name)
    assert opened.labels is not None
    # The baselines learn from the rows of the run; for other data they are not at hand.
    known = prepared.train if data is None else ()
    results, _ = score_classification(opened.model, opened.labels, held, collate, adapter=name, train=known)
    return results
