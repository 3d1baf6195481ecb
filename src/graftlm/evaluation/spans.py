"""Tagging: a tag for each word, and the F1 of whole spans as shared tasks count them (seqeval)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftlm.data import Collator, Labels
from graftlm.data.collating import length_of
from graftlm.data.tags import words_to_tokens
from graftlm.errors import EnvironmentFault, Finding
from graftlm.evaluation.losses import Collate, batches, evaluating
from graftlm.evaluation.statistics import with_interval
from graftlm.objectives import Tagging

__all__ = ["commonest_tags", "f1_of", "need_span_metrics", "predicted_tags", "span_counts", "span_scores", "tag_words"]


def predicted_tags(
    model: Any, items: Sequence[Mapping[str, Any]], collate: Collate, labels: Labels, *, batch: int = 32
) -> list[list[str]]:
    """The tag of every word of each item, told at the word's first token; words that were cut away get none."""
    order = sorted(range(len(items)), key=lambda at: length_of(items[at]))
    found: list[list[str]] = [[] for _ in items]
    with evaluating(model):
        for part in batches(order, batch):
            some = [items[at] for at in part]
            together = {k: v.to(model.device) for k, v in collate(some).items()}
            best = model(**Tagging().inputs(together)).logits.argmax(-1).cpu()
            start = together["attention_mask"].argmax(1).tolist()  # rows may be padded on the left
            for row, at in enumerate(part):
                places = items[at]["positions"]
                found[at] = [labels.name(int(best[row, start[row] + p])) if p >= 0 else _none(labels) for p in places]
    return found


def _none(labels: Labels) -> str:
    return "O" if "O" in labels else labels.name(0)


def tag_words(
    model: Any, tokenizer: Any, labels: Labels, rows: Sequence[Sequence[str]], *, max_length: int | None = None
) -> list[list[str]]:
    """A tag for each word of each row, by the adapters in force."""
    items = []
    for words in rows:
        read, positions = words_to_tokens(words, tokenizer, max_length)
        items.append({**read, "positions": positions})
    collate = Collator(tokenizer.pad_token_id, max_length=max_length)
    return predicted_tags(model, items, collate, labels)


def commonest_tags(train: Sequence[Any], rows: Sequence[Any]) -> list[list[str]]:
    """The tag that each word had most often in training, O for words that are new: a baseline without a model."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for item in train:
        for word, tag in zip(item["example"].words, item["example"].tags, strict=True):
            seen[word][tag] += 1
    known = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [[known.get(word, "O") for word in item["example"].words] for item in rows]


def span_scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 of spans with its interval, precision, recall, and the share of words with the right tag.

    Spans are those of BIO tags as the CoNLL script reads them; tags without a prefix are one span for each run of
    words. Words without a prediction count as wrong.

    Example:
        >>> round(span_scores([["B-a", "I-a", "O"]], [["B-a", "O", "O"]])["accuracy"], 2)
        0.67
    """
    counts = span_counts(truth, predicted)
    pairs = [
        pair for rows in zip(truth, _of_equal_length(truth, predicted), strict=True) for pair in zip(*rows, strict=True)
    ]
    both, told, true = counts.sum(0)
    return with_interval("span_f1", list(counts.T), f1_of) | {
        "precision": float(both / told) if told else 0.0,
        "recall": float(both / true) if true else 0.0,
        "accuracy": sum(want == got for want, got in pairs) / max(len(pairs), 1),
    }


def span_counts(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each row the spans that were told rightly, that were told, and that are true, [rows, 3].

    Example:
        >>> span_counts([["B-a", "O"], ["O"]], [["B-a", "B-a"], ["B-a"]]).tolist()
        [[1.0, 2.0, 1.0], [0.0, 1.0, 0.0]]
    """
    get_entities = _entities()
    counts = np.zeros((len(truth), 3))
    for at, (want, got) in enumerate(zip(truth, _of_equal_length(truth, predicted), strict=True)):
        true, told = set(get_entities(_prefixed(want))), set(get_entities(_prefixed(got)))
        counts[at] = len(true & told), len(told), len(true)
    return counts


def _of_equal_length(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[list[str]]:
    """The predictions with O where words have none."""
    return [[*(got[: len(want)]), *["O"] * (len(want) - len(got))] for want, got in zip(truth, predicted, strict=True)]


def need_span_metrics() -> None:
    """Raise EnvironmentFault where the library that reads tags into spans is not installed."""
    _entities()


def _entities() -> Any:
    """seqeval's reading of tags into spans. Raises EnvironmentFault where it is not installed."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError:
        message = "scores of tags need seqeval, which is not installed"
        raise EnvironmentFault(Finding("E130", message, fix="pip install 'graftlm[scores]'")) from None
    return get_entities


def f1_of(both: np.ndarray, told: np.ndarray, true: np.ndarray, axis: int = -1) -> Any:
    """F1 of rows' counts: found and true, found, true; 0 where there is nothing."""
    return 2 * both.sum(axis) / np.maximum(told.sum(axis) + true.sum(axis), 1)


def _prefixed(tags: Sequence[str]) -> list[str]:
    """BIO tags as they are; plain ones (part of speech) with a prefix, so that runs of one tag become spans."""
    if any(tag[:2] in ("B-", "I-") for tag in tags) or all(tag == "O" for tag in tags):
        return list(tags)
    return [tag if tag == "O" else f"I-{tag}" for tag in tags]
