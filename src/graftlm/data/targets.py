"""Turns questions and answers into the two sides of an encoder-decoder: what it reads, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.data.checking import Example, Notes
from graftlm.data.tokenising import Item, Supervision, longest_allowed
from graftlm.data.wording import counted, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_targets", "ends_within", "source_of", "tell_of_cuts"]


def source_of(example: Example) -> str:
    """What the encoder reads of a row: all that comes before the answer."""
    return "\n".join(str(message["content"]) for message in example.messages[:-1])


def encode_targets(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    notes: Notes,
    *,
    max_length: int | None = None,
    place: str = "",
) -> tuple[list[Item], Supervision]:
    """Items with `input_ids` and `labels` of their own length; both sides are cut to `max_length` and counted."""
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths: list[int] = []
    cut = 0
    for example in examples:
        source = list(tokenizer(source_of(example), verbose=False)["input_ids"])
        answer = str(example.messages[-1]["content"])
        target = list(tokenizer(text_target=answer, verbose=False)["input_ids"])
        lengths.append(max(len(source), len(target)))
        if limit is not None and lengths[-1] > limit:
            cut += 1
            source, target = (ends_within(ids, limit) for ids in (source, target))
        items.append({"input_ids": source, "labels": target, "row": example.row, "example": example})
    tell_of_cuts(cut, len(items), limit, lengths, notes, place)
    trained = sum(len(item["labels"]) for item in items)
    total = trained + sum(len(item["input_ids"]) for item in items)
    return items, Supervision(trained, total, cut, tuple(lengths), what="the target's tokens")


def ends_within(ids: list[int], limit: int | None) -> list[int]:
    """The tokens, at most `limit` of them; the last one ends a text and stays when the text before it is cut."""
    return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def tell_of_cuts(cut: int, count: int, limit: int | None, lengths: Sequence[int], notes: Notes, place: str) -> None:
    """Note how many of `count` rows were cut, if any were (D146)."""
    if cut:
        message = f"{number(cut)} of {counted(count, 'row')} cut to {limit} tokens (longest {max(lengths)})"
        notes.note("D146", message, place)
