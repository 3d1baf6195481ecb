"""Turns rows with a question only into the tokens that an answer is written after.

Items hold `input_ids`, the question as the template writes it with a turn opened for the answer, `row` and `example`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.data.checking import Example, Notes
from graftlm.data.reading import Rejected
from graftlm.data.templates import Template, TemplateFault
from graftlm.data.tokenising import Item, Lengths, Supervision, longest_allowed, tell_of_questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_prompts"]


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    notes: Notes,
    *,
    max_length: int | None = None,
    drop_bad_rows: bool = False,
    place: str = "",
) -> tuple[list[Item], Supervision, list[Rejected]]:
    """Every row's question; one longer than `max_length` tokens loses its beginning (D146).

    Rows that the template refuses are a fault (D140, D141), or left out with `drop_bad_rows`.
    """
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    refused: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        try:
            ids = template.encode(tokenizer, example.messages)
        except TemplateFault as fault:
            refused.setdefault((fault.code, str(fault)), []).append(example)
            continue
        lengths.over(example, len(ids))
        items.append({"input_ids": ids if limit is None else ids[-limit:], "row": example.row, "example": example})
    rejected = tell_of_questions(refused, lengths, len(items), notes, place, drop_bad_rows)
    total = sum(len(item["input_ids"]) for item in items)
    what = "the tokens of answers that the model writes"
    shown = tuple(((str(tokenizer.decode(item["input_ids"])), False),) for item in items[:2])
    return items, Supervision(0, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown), rejected
