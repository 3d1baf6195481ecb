"""Turns questions and answers into the two sides of an encoder-decoder: what it reads, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.data.checking import Example, Notes
from graftlm.data.tokenising import Item, Supervision, longest_allowed
from graftlm.data.wording import counted, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_targets", "source_of"]


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
            # The last token ends a text; it stays when the text before it is cut.
            source, target = (ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in (source, target))
        items.append({"input_ids": source, "labels": target, "row": example.row, "example": example})
    if cut:
        message = f"{number(cut)} of {counted(len(items), 'row')} cut to {limit} tokens (longest {max(lengths)})"
        notes.note("D146", message, place)
    trained = sum(len(item["labels"]) for item in items)
    total = trained + sum(len(item["input_ids"]) for item in items)
    return items, Supervision(trained, total, cut, tuple(lengths), what="the target's tokens")
