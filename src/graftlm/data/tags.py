"""Turns words with tags into token ids: a word's tag stands at its first token, the others have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.data.checking import Example, Notes
from graftlm.data.labels import Labels
from graftlm.data.tokenising import IGNORED, Item, Lengths, Supervision, longest_allowed
from graftlm.data.wording import counted, percent
from graftlm.errors import DataError, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_tagged", "words_to_tokens"]


def words_to_tokens(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[dict[str, list[int]], list[int]]:
    """What the model reads of `words`, and for each word the position of its first token; cut words have none.

    A word that becomes no token (a control character) has position -1.
    """
    out = tokenizer(
        list(words), is_split_into_words=True, truncation=limit is not None, max_length=limit, verbose=False
    )
    first: dict[int, int] = {}
    for at, word in enumerate(out.word_ids()):
        if word is not None:
            first.setdefault(word, at)
    last = max(first, default=-1)
    kept = len(words) if limit is None or len(out["input_ids"]) < limit else last + 1
    names = ("input_ids", "token_type_ids")
    return {name: list(out[name]) for name in names if name in out}, [first.get(at, -1) for at in range(kept)]


def encode_tagged(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    notes: Notes,
    *,
    max_length: int | None = None,
    place: str = "",
) -> tuple[list[Item], Supervision]:
    """Rows with `words` and `tags`; items have `labels` at tokens and `positions`, each word's first token."""
    if not tokenizer.is_fast:
        raise DataError(Finding("D144", f"the tokenizer of {tokenizer.name_or_path} cannot tell words from tokens",
                                fix="use a base with a tokenizer.json"))  # fmt: skip
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    lost = 0
    tags: Counter[str] = Counter()
    for example in examples:
        read, positions = words_to_tokens(example.words, tokenizer, None)
        if lengths.over(example, len(read["input_ids"])):
            read, positions = words_to_tokens(example.words, tokenizer, limit)
        lost += len(example.words) - len(positions)
        marks = [IGNORED] * len(read["input_ids"])
        for at, tag in zip(positions, example.tags, strict=False):
            if at >= 0:
                marks[at] = labels.id(tag)
                tags[tag] += 1
        items.append({**read, "labels": marks, "positions": positions, "row": example.row, "example": example})
    lengths.tell(len(items), notes, place, f"cut to {limit} tokens: {counted(lost, 'word')} lost")
    words = sum(tags.values())
    total = sum(len(item["input_ids"]) for item in items)
    what = f"the first token of each word: {len(labels)} tags"
    if tags:
        most, times = tags.most_common(1)[0]
        what += f", the commonest {most} ({percent(times, words)})"
    shown = tuple(
        tuple(
            piece
            for word, tag, at in zip(item["example"].words, item["example"].tags, item["positions"], strict=False)
            for piece in ((f"{word}/", False), (tag, at >= 0), (" ", False))
        )
        for item in items[:2]
    )
    return items, Supervision(words, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)
