"""Turns rows with a question and several answers into sequences: for preferences, choices and judged answers.

Items hold `sequences`, one for each answer: `input_ids`, and `labels` on the answer's tokens and the end of its turn.
`target` is what the row says: the right answer's place, or 1 where the only answer is wanted and 0 where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftlm.data.checking import Example, Notes
from graftlm.data.reading import Rejected
from graftlm.data.targets import ends_within, pieces_apart
from graftlm.data.templates import Template, TemplateFault
from graftlm.data.tokenising import (
    IGNORED,
    Item,
    Lengths,
    Supervision,
    longest_allowed,
    pieces_of,
    pieces_told,
    tell_of_questions,
    trained_tokens,
)
from graftlm.errors import DataError, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_apart", "encode_candidates", "encode_paired", "encode_scored_answers"]


def encode_candidates(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    notes: Notes,
    *,
    max_length: int | None = None,
    drop_bad_rows: bool = False,
    place: str = "",
    mismatched: bool = False,
    what: str = "the answers + end of turn",
) -> tuple[list[Item], Supervision, list[Rejected]]:
    """Every answer of a row after its question, as the template writes them, with labels on the answer only.

    A question that is too long loses its beginning, so that all answers of a row are told after the same words; rows
    whose answers do not fit by themselves are a fault (D165), or left out with `drop_bad_rows`.

    Args:
        examples: with `messages` and `answers`.
        tokenizer: a fast one.
        template: writes question and answer.
        notes: takes D140, D141, D146, D165.
        max_length: tokens of a sequence; None: the tokenizer's own limit.
        drop_bad_rows: leave faulty rows out and return them.
        place: the file's name for messages.
        mismatched: each row also gets the next row's answer to its own question, as KTO wants it.
        what: what the loss is on, in words.
    """
    if not tokenizer.is_fast:
        message = f"the tokenizer of {tokenizer.name_or_path} cannot say which characters a token stands for"
        raise DataError(Finding("D144", message, fix="use a base with a tokenizer.json"))
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    refused: dict[tuple[str, str], list[Example]] = {}
    for example, answers in _with_others(examples, mismatched):
        try:
            sequences = [_answered(example, answer, tokenizer, template) for answer in answers]
        except TemplateFault as fault:
            refused.setdefault((fault.code, str(fault)), []).append(example)
            continue
        longest = max(len(ids) for ids, _ in sequences)
        if lengths.over(example, longest):
            shorter = _without_beginning(sequences, limit or 0)
            if shorter is None:
                why = f"an answer is longer than max_length {limit}"
                refused.setdefault(("D165", why), []).append(example)
                lengths.cut.pop()  # it is left out as a whole
                continue
            sequences = shorter
        made = [
            {"input_ids": ids, "labels": [i if wanted else IGNORED for i, wanted in zip(ids, trained, strict=True)]}
            for ids, trained in sequences
        ]
        target = int(example.label) if example.label is not None else 0
        items.append({"sequences": made, "target": target, "row": example.row, "example": example})
    rejected = tell_of_questions(refused, lengths, len(items), notes, place, drop_bad_rows)
    own = [sequence for item in items for sequence in item["sequences"]]
    supervision = Supervision(
        trained_tokens=sum(label != IGNORED for sequence in own for label in sequence["labels"][1:]),
        total_tokens=sum(len(sequence["input_ids"]) for sequence in own),
        cut=tuple(lengths.cut),
        lengths=tuple(lengths.every),
        what=what,
        examples=tuple(_shown(item, tokenizer) for item in items[:2]),
    )
    return items, supervision, rejected


def encode_apart(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    notes: Notes,
    *,
    max_length: int | None = None,
    place: str = "",
    mismatched: bool = False,
) -> tuple[list[Item], Supervision]:
    """Questions and answers on the two sides of an encoder-decoder: sequences with labels of their own length.

    Both sides are cut to `max_length` and counted; the arguments are those of `encode_candidates`.
    """
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    for example, answers in _with_others(examples, mismatched):
        source = list(tokenizer(example.text, verbose=False)["input_ids"])
        targets = [list(tokenizer(text_target=answer, verbose=False)["input_ids"]) for answer in answers]
        lengths.over(example, max(map(len, [source, *targets])))
        source, *targets = (ends_within(ids, limit) for ids in (source, *targets))
        made = [{"input_ids": source, "labels": target} for target in targets]
        label = int(example.label) if example.label is not None else 0
        items.append({"sequences": made, "target": label, "row": example.row, "example": example})
    lengths.tell(len(items), notes, place)
    own = [sequence for item in items for sequence in item["sequences"]]
    trained = sum(len(sequence["labels"]) for sequence in own)
    total = trained + sum(len(sequence["input_ids"]) for sequence in own)
    shown = tuple(pieces_apart(item["sequences"][_right(item)], tokenizer) for item in items[:2])
    what = "the answers' tokens"
    return items, Supervision(trained, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)


def _right(item: Item) -> int:
    """The place of the sequence that is to be learnt: of choices the right one, else the first."""
    example = item["example"]
    return int(item["target"]) if len(example.answers) > 1 and example.label is not None else 0


def _shown(item: Item, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """The sequence to be learnt in pieces; of a judged answer also that it is not wanted."""
    pieces = pieces_of(item["sequences"][_right(item)], tokenizer)
    unwanted = item["example"].label is False
    return (*pieces, (" (not wanted)", False)) if unwanted else pieces


def _with_others(examples: Sequence[Example], mismatched: bool) -> Iterator[tuple[Example, list[str]]]:
    """Each row with its answers, and the next row's answer too where mismatched ones are wanted."""
    for at, example in enumerate(examples):
        other = [examples[(at + 1) % len(examples)].answers[0]] if mismatched else []
        yield example, [*example.answers, *other]


def _answered(
    example: Example, answer: str, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[int], list[bool]]:
    """Token ids of the question with this answer, and which of them are the answer's."""
    text, spans = template.passages([*example.messages, {"role": "assistant", "content": answer}])[-1]
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(out["input_ids"]), trained_tokens(out["offset_mapping"], spans[-1:])


def _without_beginning(
    sequences: list[tuple[list[int], list[bool]]], limit: int
) -> list[tuple[list[int], list[bool]]] | None:
    """The sequences without the first tokens of their question, the same number in each; None where it is too short."""
    away = max(len(ids) for ids, _ in sequences) - limit
    question = min(trained.index(True) if True in trained else len(trained) for _, trained in sequences)
    if away > question - 1:
        return None
    return [(ids[away:], trained[away:]) for ids, trained in sequences]


def encode_paired(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    notes: Notes,
    *,
    max_length: int | None = None,
    place: str = "",
) -> tuple[list[Item], Supervision]:
    """Every answer beside its question, as encoders read two texts; longer pairs are cut, the longer text first."""
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    for example in examples:
        whole = [tokenizer(example.text, answer, verbose=False) for answer in example.answers]
        if lengths.over(example, max(len(one["input_ids"]) for one in whole)):
            whole = [
                tokenizer(example.text, answer, truncation=True, max_length=limit, verbose=False)
                for answer in example.answers
            ]
        names = ("input_ids", "token_type_ids")
        sequences = [{name: list(one[name]) for name in names if name in one} for one in whole]
        target = int(example.label) if example.label is not None else 0
        items.append({"sequences": sequences, "target": target, "row": example.row, "example": example})
    lengths.tell(len(items), notes, place)
    total = sum(len(s["input_ids"]) for item in items for s in item["sequences"])
    several = sorted({len(item["sequences"]) for item in items})
    what = "the head's number for each answer" + (f": {several[0]} to {several[-1]} a row" if several[1:] else "")
    shown = tuple(
        pieces_told(item["sequences"][_right(item)], tokenizer, f"the right one of {len(item['sequences'])}")
        for item in items[:2]
        if len(item["sequences"]) > 1
    )
    return items, Supervision(0, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)


def encode_scored_answers(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    notes: Notes,
    **options: Any,
) -> tuple[list[Item], Supervision, list[Rejected]]:
    """As `encode_candidates`, for a head that gives whole sequences a number: no token has a label."""
    items, supervision, rejected = encode_candidates(examples, tokenizer, template, notes, **options)
    for item in items:
        for sequence in item["sequences"]:
            del sequence["labels"]
    shown = tuple(pieces_told(item["sequences"][0], tokenizer, "the better answer") for item in items[:2])
    what = "the head's number for each answer"
    return items, replace(supervision, trained_tokens=0, examples=shown, what=what), rejected
