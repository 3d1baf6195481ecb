"""Turns questions and answers into the two sides of an encoder-decoder: what it reads, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.data.checking import Example, Notes
from graftlm.data.tokenising import Item, Lengths, Supervision, longest_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_targets", "ends_within", "pieces_apart", "source_of"]


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
    lengths = Lengths(limit)
    for example in examples:
        source = list(tokenizer(source_of(example), verbose=False)["input_ids"])
        answer = str(example.messages[-1]["content"])
        target = list(tokenizer(text_target=answer, verbose=False)["input_ids"])
        if lengths.over(example, max(len(source), len(target))):
            source, target = (ends_within(ids, limit) for ids in (source, target))
        items.append({"input_ids": source, "labels": target, "row": example.row, "example": example})
    lengths.tell(len(items), notes, place)
    trained = sum(len(item["labels"]) for item in items)
    total = trained + sum(len(item["input_ids"]) for item in items)
    what, shown = "the target's tokens", tuple(pieces_apart(item, tokenizer) for item in items[:2])
    return items, Supervision(trained, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)


def pieces_apart(item: Item, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """What is read and what is written, decoded from their tokens, of which the latter are trained."""
    return (str(tokenizer.decode(item["input_ids"])) + " ", False), (str(tokenizer.decode(item["labels"])), True)


def ends_within(ids: list[int], limit: int | None) -> list[int]:
    """The tokens, at most `limit` of them; the last one ends a text and stays when the text before it is cut."""
    return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
