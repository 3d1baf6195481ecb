"""Turns examples into token ids, knows for every token whether it is trained, and counts what was cut.

Items are plain dicts of lists, ready for `collating`: `input_ids`, `labels` (the token id where trained, -100 where
not; a class id for classification), `row`, and `example` for showing predictions. Labels stand at their own token: the
shift by one is the loss function's business. Text and mask come from `templates`; a token is trained if any of its
characters is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from graftlm.data.checking import Example, Notes
from graftlm.data.labels import Labels, Scale, label_name
from graftlm.data.reading import Rejected
from graftlm.data.templates import Passage, Span, Template, TemplateFault
from graftlm.data.wording import clip, counted, listed, number, percent, rows
from graftlm.errors import DataError, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Cut", "Item", "Lengths", "Supervision", "Template", "encode_chats", "encode_documents",
    "encode_labelled", "encode_masked", "encode_scored", "histogram", "longest_allowed", "pack", "pieces_of",
    "tell_of_questions", "trained_tokens",
]  # fmt: skip

Item = dict[str, Any]
IGNORED = -100
_ENDLESS = 10**6  # tokenizers without a length limit say so with a huge number
_STEP = 64  # suggested lengths are multiples of this
_DROP = "--set data.drop_bad_rows=true"


@dataclass(frozen=True, slots=True)
class Cut:
    """A row that lost tokens: where it stands, and how many tokens it had before."""

    place: str
    row: int
    tokens: int


@dataclass(slots=True)
class Lengths:
    """The tokens of each row before cutting, and the rows that are longer than `limit` (None: none is).

    Example:
        >>> lengths = Lengths(4)
        >>> example = Example(1, "faq.jsonl:1", {})
        >>> lengths.over(example, 9), lengths.over(example, 3), lengths.cut[0].tokens
        (True, False, 9)
    """

    limit: int | None
    every: list[int] = field(default_factory=list)
    cut: list[Cut] = field(default_factory=list)

    def over(self, example: Example, tokens: int) -> bool:
        """Take down a row of so many tokens; whether it must be cut."""
        self.every.append(tokens)
        if self.limit is None or tokens <= self.limit:
            return False
        self.cut.append(Cut(example.place, example.row, tokens))
        return True

    def tell(self, kept: int, notes: Notes, place: str, how: str = "") -> None:
        """Note how many of the `kept` rows were cut, and which (D146); `how` stands in place of the usual words."""
        if not self.cut:
            return
        which = rows(list(dict.fromkeys(cut.row for cut in self.cut)))
        how = how or f"cut to {self.limit} tokens"
        message = f"{number(len(self.cut))} of {counted(kept, 'row')} {how} ({which}; longest {max(self.every)})"
        notes.note("D146", message, place)


@dataclass(frozen=True, slots=True)
class Supervision:
    """What is trained: token counts after cutting, lengths before it, and two rows to look at.

    `lengths` are tokens of each row before cutting, `cut` the rows that were cut. `examples` are rows as
    (text, trained) pieces, decoded from the very tokens that are trained.
    """

    trained_tokens: int = 0
    total_tokens: int = 0
    cut: tuple[Cut, ...] = ()
    lengths: tuple[int, ...] = ()
    straddling_rows: int = 0
    what: str = "assistant turns + end of turn"
    examples: tuple[tuple[tuple[str, bool], ...], ...] = field(default=())

    @property
    def cut_rows(self) -> int:
        """How many rows were cut."""
        return len(self.cut)

    @property
    def line(self) -> str:
        """`loss on 18.9 % of tokens: assistant turns + end of turn`."""
        if not self.trained_tokens:
            return f"loss on {self.what}"
        return f"loss on {percent(self.trained_tokens, self.total_tokens)} of tokens: {self.what}"

    def marked(self, at: int, *, width: int = 200, left: str = "[[", right: str = "]]") -> str:
        """Example `at` in one line, trained pieces between marks, long pieces clipped to `width` characters."""
        pieces = ((clip(text, width), trained) for text, trained in self.examples[at])
        return "".join(f"{left}{text}{right}" if trained else text for text, trained in pieces)


def histogram(lengths: Sequence[int], limit: int | None = None, *, most: int = 24) -> dict[str, list[Any]]:
    """How many of `lengths` lie in each of about `most` bars of equal width: above `edges[i]`, up to `edges[i + 1]`.

    Where some are longer than `limit` one edge lies there, so that no bar holds both what is cut and what is not.

    Example:
        >>> histogram([3, 5, 9], 6, most=3)
        {'edges': [0.0, 3.0, 6.0, 9.0], 'counts': [1, 1, 1]}
    """
    if not lengths:
        return {"edges": [], "counts": []}
    longest = max(lengths)
    width = float(max(1, -(-longest // most)))
    if limit is not None and longest > limit:
        width = limit / max(1, round(limit / width))
    bars = [max(0, math.ceil(length / width - 1e-9) - 1) for length in lengths]
    counts = [bars.count(at) for at in range(max(bars) + 1)]
    return {"edges": [round(width * at, 6) for at in range(len(counts) + 1)], "counts": counts}


def longest_allowed(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """`max_length`, or what the tokenizer says its model can take, or None for no limit."""
    if max_length is not None:
        return max_length
    limit = tokenizer.model_max_length
    return int(limit) if limit and limit < _ENDLESS else None


def tell_of_questions(
    refused: Mapping[tuple[str, str], Sequence[Example]],
    lengths: Lengths,
    kept: int,
    notes: Notes,
    place: str,
    drop_bad_rows: bool,
) -> list[Rejected]:
    """Of rows that ask: those refused, by code and reason, are faults or returned; those cut lost a beginning."""
    rejected: list[Rejected] = []
    for (code, why), those in refused.items():
        if drop_bad_rows:
            rejected += [Rejected(e.place, e.row, f"{why} [{code}]", e.raw) for e in those]
        else:
            notes.error(code, f"{counted(len(those), 'row')} ({rows([e.row for e in those])}): {why}", place, _DROP)
    lengths.tell(kept, notes, place, f"have a question that lost its beginning to fit {lengths.limit} tokens")
    return rejected


def encode_chats(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    notes: Notes,
    *,
    max_length: int | None = None,
    drop_bad_rows: bool = False,
    place: str = "",
) -> tuple[list[Item], Supervision, list[Rejected]]:
    """Conversations as token ids with labels on assistant turns and their end only.

    Args:
        examples: with `messages`.
        tokenizer: a fast one, which tells the characters of each token.
        template: turns messages into text and says what is trained.
        notes: takes D136, D140 to D150.
        max_length: tokens; longer rows lose their end and are counted. None: the tokenizer's own limit.
        drop_bad_rows: rows that the template refuses, or whose answer is cut away, are left out and returned.
        place: the file's name for messages.

    Returns:
        Items, what is trained, and the rows left out.

    Raises:
        DataError: D144 at once; other faults wait in `notes`.
    """
    _need_offsets(tokenizer)
    limit = longest_allowed(tokenizer, max_length)
    rejected: list[Rejected] = []
    passages: list[tuple[Example, Passage]] = []
    refused: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        try:
            passages += [(example, passage) for passage in template.passages(example.messages)]
        except TemplateFault as fault:
            refused.setdefault((fault.code, str(fault)), []).append(example)
    for (code, why), those in refused.items():
        named = f"chat template '{template.name}' of {tokenizer.name_or_path or 'the tokenizer'}"
        said = "rewrites what comes before an answer" if code == "D140" else "refuses"
        if drop_bad_rows:
            rejected += [Rejected(e.place, e.row, f"chat template: {why} [{code}]", e.raw) for e in those]
        else:
            head = f"{named} {said} {counted(len(those), 'row')} ({rows([e.row for e in those])}): {why}"
            notes.error(code, head, place, "--set data.template=turns" if code == "D140" else _DROP)
    more = len(passages) - (len(examples) - sum(map(len, refused.values())))
    if more > 0:
        message = f"{counted(more, 'row')} more than in the file: the chat template rewrites earlier turns, so each"
        notes.note("D148", f"{message} assistant turn is trained as a row of its own", place)

    items: list[Item] = []
    lengths = Lengths(limit)
    straddling = 0
    headless: list[tuple[Example, int]] = []
    for (example, (_, spans)), (ids, offsets) in zip(
        passages, _tokens(tokenizer, [text for _, (text, _) in passages]), strict=True
    ):
        trained = trained_tokens(offsets, spans)
        if lengths.over(example, len(ids)):
            if any(trained) and not any(trained[1:limit]):
                headless.append((example, len(ids)))
                lengths.cut.pop()  # it is left out as a whole
                continue
            ids, trained = ids[:limit], trained[:limit]
        straddling += any(start < edge < end for edge, _ in spans for start, end in offsets)
        labels = [token if wanted else IGNORED for token, wanted in zip(ids, trained, strict=True)]
        items.append({"input_ids": ids, "labels": labels, "row": example.row, "example": example})
    if headless:
        _report_headless(
            headless, lengths.every, limit or 0, tokenizer, notes, place, rejected if drop_bad_rows else None
        )
    supervision = Supervision(
        trained_tokens=sum(label != IGNORED for item in items for label in item["labels"][1:]),
        total_tokens=sum(len(item["input_ids"]) for item in items),
        cut=tuple(lengths.cut),
        lengths=tuple(lengths.every),
        straddling_rows=straddling,
        examples=tuple(pieces_of(item, tokenizer) for item in items[:2]),
    )
    if items and not supervision.trained_tokens:
        total = number(supervision.total_tokens)
        notes.error("D142", f"0 of {total} tokens would be trained: chat template '{template.name}' marks none", place)
    if not template.end_of_turn and items:
        message = f"chat template '{template.name}' ends assistant turns with nothing: the model will not learn to stop"
        notes.note("D147", message, place)
    if straddling:
        message = f"{counted(straddling, 'row')} where the first token of an answer also holds the end of the prompt"
        notes.note("D150", f"{message}: when generating, the model sees other tokens there", place)
    if rejected:
        reasons = listed(dict.fromkeys(fault.reason for fault in rejected), 2)
        notes.note("D136", f"{counted(len(rejected), 'row')} left out: {reasons}", place)
    _note_control_tokens(examples, tokenizer, notes, place)
    lengths.tell(len(items), notes, place)
    return items, supervision, rejected


def encode_documents(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
) -> tuple[list[Item], Supervision]:
    """Documents as blocks of at most `max_length` tokens, every token trained.

    Each document gets the tokenizer's own special tokens and an end-of-sequence token; a block never spans two
    documents, so the last block of each is short. A last block of a single token has nothing to predict and is left
    out. Nothing is cut away otherwise.
    """
    limit = longest_allowed(tokenizer, max_length)
    encoded = tokenizer([e.texts[0] for e in examples], verbose=False)["input_ids"] if examples else []
    items: list[Item] = []
    lengths: list[int] = []
    for example, ids in zip(examples, encoded, strict=True):
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        lengths.append(len(ids))
        size = limit or max(len(ids), 1)
        blocks = [ids[at : at + size] for at in range(0, len(ids), size)]
        items += [
            {"input_ids": block, "labels": list(block), "row": example.row, "example": example}
            for block in blocks
            if len(block) > 1
        ]
    total = sum(len(item["input_ids"]) for item in items)
    supervision = Supervision(
        trained_tokens=total - len(items),
        total_tokens=total,
        lengths=tuple(lengths),
        what=f"every token but the first of each of {counted(len(items), 'block')}"
        + (f" of at most {number(limit)} tokens" if limit else ""),
        examples=tuple(pieces_of(item, tokenizer) for item in items[:2]),
    )
    return items, supervision


def encode_labelled(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    notes: Notes,
    *,
    max_length: int | None = None,
    place: str = "",
) -> tuple[list[Item], Supervision]:
    """Texts (one or two each) as token ids with the id of their class; longer ones are cut, the longer text first."""
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    for example, whole in zip(examples, _pairs(examples, tokenizer), strict=True):
        if lengths.over(example, len(whole["input_ids"])):
            whole = dict(tokenizer(*example.texts, truncation=True, max_length=limit, verbose=False))
        assert example.label is not None
        kept: Item = {name: whole[name] for name in ("input_ids", "token_type_ids") if name in whole}
        told: Any = labels.id(example.label) if not labels.several else None
        if labels.several:  # a number for each label: whether the row has it
            told = [float(name in example.label) for name in labels.names]
        items.append({**kept, "labels": told, "row": example.row, "example": example})
    lengths.tell(len(items), notes, place)
    total = sum(len(item["input_ids"]) for item in items)
    shown = tuple(
        pieces_told(item, tokenizer, ", ".join(map(label_name, item["example"].labels)) or "none of them")
        for item in items[:2]
    )
    if labels.several:
        every = sum(sum(item["labels"]) for item in items)
        what = f"each of {len(labels)} labels, {every / max(len(items), 1):.1f} of them a row"
        return items, Supervision(0, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)
    counts = [sum(item["labels"] == id for item in items) for id in range(len(labels))]
    most = max(range(len(labels)), key=counts.__getitem__, default=0)
    what = f"one label a row: {len(labels)} classes"
    if items:
        what += f", the largest {labels.name(most)} ({percent(counts[most], len(items))})"
    return items, Supervision(0, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)


def encode_scored(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    scale: Scale,
    notes: Notes,
    *,
    max_length: int | None = None,
    place: str = "",
) -> tuple[list[Item], Supervision]:
    """Texts (one or two each) with their number in standard units; longer ones are cut, the longer text first."""
    limit = longest_allowed(tokenizer, max_length)
    items: list[Item] = []
    lengths = Lengths(limit)
    for example, whole in zip(examples, _pairs(examples, tokenizer), strict=True):
        if lengths.over(example, len(whole["input_ids"])):
            whole = dict(tokenizer(*example.texts, truncation=True, max_length=limit, verbose=False))
        kept: Item = {name: whole[name] for name in ("input_ids", "token_type_ids") if name in whole}
        told = scale.standard(float(example.label))
        items.append({**kept, "labels": told, "row": example.row, "example": example})
    lengths.tell(len(items), notes, place)
    what = f"one number a row (mean {scale.mean:.3g}, standard deviation {scale.deviation:.3g})"
    total = sum(len(item["input_ids"]) for item in items)
    shown = tuple(pieces_told(item, tokenizer, f"{item['example'].label:g}") for item in items[:2])
    return items, Supervision(0, total, tuple(lengths.cut), tuple(lengths.every), what=what, examples=shown)


def encode_masked(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    share: float = 0.15,
) -> tuple[list[Item], Supervision]:
    """Documents as blocks of at most `max_length` tokens, each with the tokenizer's marks around it.

    Which tokens are hidden is decided where batches are made (`collating.MaskingCollator`); nothing is cut away.
    """
    limit = longest_allowed(tokenizer, max_length)
    before, after = _marks_around(tokenizer)
    encoded = tokenizer([e.texts[0] for e in examples], add_special_tokens=False, verbose=False) if examples else {}
    items: list[Item] = []
    lengths: list[int] = []
    for example, ids in zip(examples, encoded.get("input_ids", ()), strict=True):
        size = max((limit or len(ids) + len(before) + len(after)) - len(before) - len(after), 1)
        lengths.append(len(ids) + len(before) + len(after))
        for order, at in enumerate(range(0, len(ids), size)):
            block = [*before, *ids[at : at + size], *after]
            items.append({"input_ids": block, "block": order, "row": example.row, "example": example})
    total = sum(len(item["input_ids"]) for item in items)
    what = f"the {percent(round(100 * share), 100)} of tokens that are hidden, of {counted(len(items), 'block')}"
    shown = tuple(((str(tokenizer.decode(item["input_ids"])), False),) for item in items[:2])
    return items, Supervision(0, total, lengths=tuple(lengths), what=what, examples=shown)


def _marks_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    out = tokenizer("a", return_special_tokens_mask=True)
    ids, marks = out["input_ids"], out["special_tokens_mask"]
    first = marks.index(0) if 0 in marks else len(marks)
    last = len(marks) - marks[::-1].index(0) if 0 in marks else len(marks)
    return list(ids[:first]), list(ids[last:])


def pack(items: Sequence[Item], length: int) -> list[Item]:
    """Items one behind the other in rows of at most `length` tokens, each with positions that start anew.

    Every item goes, in order of falling length, into the fullest row that has room for it (best fit); the order of
    rows follows their first item. The first token of an item has no label: what stands before it is another text.
    """
    room: list[tuple[int, int]] = []  # (free tokens, row)
    packed: list[list[int]] = []
    for at in sorted(range(len(items)), key=lambda at: -len(items[at]["input_ids"])):
        size = len(items[at]["input_ids"])
        found = bisect_left(room, (size, 0))
        free, row = room.pop(found) if found < len(room) else (length, len(packed))
        if row == len(packed):
            packed.append([])
        packed[row].append(at)
        if free - size > 0:
            insort(room, (free - size, row))
    rows: list[Item] = []
    for members in sorted((sorted(row) for row in packed), key=lambda row: row[0]):
        parts = [items[at] for at in members]
        rows.append(
            {
                "input_ids": [token for part in parts for token in part["input_ids"]],
                "labels": [label for part in parts for label in (IGNORED, *part["labels"][1:])],
                "position_ids": [at for part in parts for at in range(len(part["input_ids"]))],
                "row": parts[0]["row"],
                "example": parts[0]["example"],
            }
        )
    return rows


def _pairs(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterable[dict[str, Any]]:
    columns = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    encoded = tokenizer(*columns, verbose=False) if examples else {}
    return ({name: values[at] for name, values in encoded.items()} for at in range(len(examples)))


def _need_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        message = f"the tokenizer of {tokenizer.name_or_path} cannot say which characters a token stands for"
        raise DataError(Finding("D144", message, fix="use a base with a tokenizer.json"))


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterable[tuple[list[int], list[Span]]]:
    if not texts:
        return []
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return zip(out["input_ids"], out["offset_mapping"], strict=True)


def trained_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token covers a trained character. Tokens and spans both ascend, so one pass is enough."""
    trained, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        trained.append(at < len(spans) and end > spans[at][0])
    return trained


def pieces_of(item: Item, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """A row as runs of tokens with the same mask, each decoded."""
    runs: list[tuple[list[int], bool]] = []
    for at, (token, label) in enumerate(zip(item["input_ids"], item["labels"], strict=True)):
        trained = at > 0 and label != IGNORED
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return tuple((str(tokenizer.decode(ids)), trained) for ids, trained in runs)


def pieces_told(item: Item, tokenizer: PreTrainedTokenizerBase, told: str) -> tuple[tuple[str, bool], ...]:
    """A row that is read as a whole, decoded, and what is to be told of it."""
    return (f"{tokenizer.decode(item['input_ids'])} -> ", False), (told, True)


def _report_headless(
    headless: list[tuple[Example, int]],
    lengths: list[int],
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
    notes: Notes,
    place: str,
    rejected: list[Rejected] | None,
) -> None:
    if rejected is not None:
        why = f"the whole answer is beyond max_length {limit} [D143]"
        rejected += [Rejected(e.place, e.row, f"{why}: {n} tokens", e.raw) for e, n in headless]
        return
    longest = max(lengths)
    wanted = math.ceil(longest / _STEP) * _STEP
    most = longest_allowed(tokenizer, None)
    fits = most is None or longest <= most
    fix = f"--max-length {wanted if most is None else min(wanted, most)}" if fits else _DROP
    message = (
        f"{number(len(headless))} of {counted(len(lengths), 'row')} lose their whole answer at --max-length {limit} "
        f"(median {round(median(lengths))}, longest {longest})"
    )
    if not fits:
        message += f"; the tokenizer's own limit is {most}"
    notes.error("D143", message, place, fix)


def _note_control_tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, notes: Notes, place: str
) -> None:
    """Says where a text would be read as control tokens: a `</s>` in HTML ends the sequence for the model."""
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    found: dict[str, list[int]] = {}
    for example in examples:
        content = "\n".join(str(message.get("content", "")) for message in example.messages)
        for token in special:
            if token in content:
                found.setdefault(token, []).append(example.row)
    for token, where in found.items():
        message = f"{counted(len(where), 'row')} with '{token}' in the text, which is read as the control token"
        notes.note("D145", f"{message} ({rows(where)})", place)
