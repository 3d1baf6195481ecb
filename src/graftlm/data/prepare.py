"""A user's file to checked, split and tokenised rows, in one call that stops with every fault it finds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.data.candidates import encode_apart, encode_candidates, encode_paired, encode_scored_answers
from graftlm.data.checking import Example, Notes, check, check_overlap
from graftlm.data.labels import Labels, Scale, label_name
from graftlm.data.prompting import PromptTemplate, prompted
from graftlm.data.prompts import encode_prompts
from graftlm.data.reading import Rejected, Table, read_rows
from graftlm.data.recognise import Reading, recognise
from graftlm.data.splitting import default_share, split, split_document
from graftlm.data.tags import encode_tagged
from graftlm.data.targets import encode_targets
from graftlm.data.templates import Template
from graftlm.data.tokenising import (
    Cut,
    Item,
    Supervision,
    encode_chats,
    encode_documents,
    encode_labelled,
    encode_masked,
    encode_scored,
    longest_allowed,
    pack,
)
from graftlm.data.wording import counted, listed, number, percent
from graftlm.data.wording import rows as numbered
from graftlm.errors import DataError, Finding, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftlm.data.streaming import Stream

__all__ = ["ONLINE", "Prepared", "hold_out", "look", "prepare"]

_FEW_DOCUMENTS = 20  # below this, long texts are divided inside rather than from one another
_SHARE_OF_DOCUMENT = 0.05


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows ready for the collator, and all there is to say about them.

    `train` and `eval` hold items (see `tokenising`), each with its `example` (raw row, messages or texts). `labels` is
    None unless the task is classify or tag, `scale` unless it is regress, `template` unless answers are written,
    `prompt` (with a word for every label) unless rows were put into words by one. `notes` are findings that do not stop
    a run. `line` is for the terminal's `data` line, `supervision.line` for its `loss on` line, `eval_line` says what
    eval is.
    """

    task: str
    train: list[Item]
    eval: list[Item]
    labels: Labels | None
    scale: Scale | None
    template: Template | None
    prompt: PromptTemplate | None
    supervision: Supervision
    eval_supervision: Supervision
    notes: tuple[Finding, ...]
    rejected: tuple[Rejected, ...]
    #: Rows that lost tokens.
    cut: tuple[Cut, ...]
    reading: Reading
    line: str
    eval_line: str
    pad_id: int
    sha256: dict[str, str]
    #: Rows for a last test, which neither training nor its evaluations see.
    test: list[Item] = field(default_factory=list)
    #: How rows become items, for rows that come later.
    encoder: Any = field(default=None, compare=False)
    #: All training rows, where they are read while training; `train` are then the first of them.
    stream: Stream | None = None


def prepare(
    path: str | Path | Table | Mapping[str | Path, float],
    eval_path: str | Path | None = None,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    eval_share: float | None = None,
    max_rows: int | None = None,
    drop_bad_rows: bool = False,
    task: str = "auto",
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    seed: int = 0,
    template: str | Template | None = None,
    labels: Labels | None = None,
    scale: Scale | None = None,
    merge_labels: bool = False,
    waived: Collection[str] = (),
    instead: Mapping[str, str] | None = None,
    by_head: bool = False,
    apart: bool = False,
    packing: bool = False,
    prompt: PromptTemplate | None = None,
    group: str | None = None,
    test: str | Path | float | None = None,
    partial: bool = False,
) -> Prepared:
    """Reads, recognises, checks, splits and tokenises.

    Args:
        path: the training file, a folder of files, or rows that were read; or several files with their weights: of a
            source of weight 2.5 each training row is there twice and half of them a third time, drawn by the seed; of
            one of weight 0.5 half of them. Rows that are not drawn are listed in `Prepared.rejected`. Held-out rows
            have no weights.
        eval_path: a file with eval rows of the same columns; without it, `eval_share` of the training rows is held out.
        format: see `read_rows`.
        mapping: role to column, see `recognise`.
        eval_share: in [0, 1); None: 20 %, above 2 000 rows 5 %; 0: no eval rows.
        max_rows: read only the first rows of each file.
        drop_bad_rows: leave faulty rows out (they are in `Prepared.rejected`) instead of stopping.
        task: `auto`, or one of `recognise.TASKS`.
        tokenizer: of the base model.
        max_length: in tokens; None: what the tokenizer allows.
        seed: of the split.
        template: one that a run has stored, a built-in one's name or Jinja text, instead of the tokenizer's own.
        labels: of a trained adapter that is to be evaluated on these rows: they may then have a label once or one label
            only, and a label that is not among them is an error (D132).
        merge_labels: labels that differ only by case or space become one.
        scale: of a trained adapter that tells numbers, as `labels`.
        waived: codes of judgements that are not to stop the run (`codes.WAIVABLE`).
        instead: tasks that the base does in place of others where the task is `auto`; see `recognise`.
        by_head: choices and rewards are told by a head that reads question and answer as a pair, as encoders do.
        apart: the base reads questions and writes answers, as encoder-decoders do, instead of going on in one text.
        prompt: writes rows as questions, and labels as words; see `prompting`.
        group: a column; rows with the same value in it are all held out or all trained on.
        test: a file of rows for a last test, or a share of the training rows, which is held out before eval rows are.
        packing: the training rows are put one behind the other into rows of `max_length` tokens, without seeing one
            another.
        partial: `path` has the first rows only, and those left out of it are told elsewhere: texts are not divided to
            hold a part out, and a label may be there once.

    Raises:
        DataError: every fault of a stage at once; the stages are: both files read, columns recognised, rows checked,
            tokens counted.

    Example:
        >>> ready = prepare("faq.jsonl", tokenizer=tokenizer, max_length=512)                   # doctest: +SKIP
        >>> print(ready.supervision.line)                                                       # doctest: +SKIP
        loss on 18.9 % of tokens: assistant turns + end of turn
    """
    rows = _sorted(
        path, eval_path, format, mapping, eval_share, max_rows, drop_bad_rows, task, seed=seed, labels=labels,
        merge_labels=merge_labels, waived=waived, instead=instead, max_length=max_length, prompt=prompt,
        by_head=by_head, group=group, test=test, partial=partial,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
    )  # fmt: skip
    reading, notes, names = rows.reading, rows.notes, rows.names
    rejected = list(rows.rejected)
    known = rows.labels
    chosen: Template | None = None
    sets: list[tuple[list[Item], Supervision]] = []
    if reading.task == "regress":
        scale = scale or Scale.of([float(e.label) for e in rows.train])
    elif (
        known is None
        and reading.task in _WRITTEN
        and not (by_head and reading.task in _BY_HEAD)
        and not (apart and reading.task in _APART)
    ):
        chosen = _template(template, tokenizer, [*rows.train, *rows.held], notes)
    encode = _Encoder(
        reading.task,
        tokenizer,
        known,
        scale,
        chosen,
        notes,
        max_length,
        drop_bad_rows,
        apart and reading.task in _APART,
    )
    for part, name in ((rows.train, names[0]), (rows.held, names[1]), (rows.test, names[2])):
        items, supervision, out = encode(part, name) if part else ([], Supervision(), [])
        rejected += out if sets or not partial else []
        sets.append((items, supervision))
    if packing and reading.task in ("lm", "sft") and not notes.errors:
        sets[0] = _packed(*sets[0], longest_allowed(tokenizer, max_length))
    if not sets[0][0] and not notes.errors:
        notes.error("D142", "0 tokens would be trained: no row with two tokens is left", names[0])
    notes.settle()
    (items, supervision), (eval_items, eval_supervision), (test_items, _) = sets
    line = f"{rows.line}   {counted(rows.duplicates, 'duplicate')}, {number(supervision.cut_rows)} cut"
    if rejected:
        line += f", {number(len(rejected))} left out"
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Prepared(
        task=reading.task,
        train=items,
        eval=eval_items,
        labels=known,
        scale=scale if reading.task == "regress" else None,
        template=chosen,
        prompt=rows.prompt,
        supervision=supervision,
        eval_supervision=eval_supervision,
        notes=_once(notes.notes),
        rejected=tuple(rejected),
        cut=tuple(cut for _, told in sets[partial:] for cut in told.cut),
        reading=reading,
        line=line,
        eval_line=rows.eval_line,
        pad_id=pad_id,
        sha256=rows.sha256,
        test=test_items,
        encoder=encode,
    )


def look(
    path: str | Path | Table | Mapping[str | Path, float],
    eval_path: str | Path | None = None,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    eval_share: float | None = None,
    max_rows: int | None = None,
    drop_bad_rows: bool = False,
    task: str = "auto",
    *,
    seed: int = 0,
    merge_labels: bool = False,
    waived: Collection[str] = (),
    group: str | None = None,
    test: str | Path | float | None = None,
    partial: bool = False,
) -> tuple[Finding, ...]:
    """What is worth knowing of the rows as far as it can be told without a tokenizer; the arguments are `prepare`'s.

    Raises:
        DataError: as `prepare`, whose stages these are up to the counting of tokens.

    Example:
        >>> look("tickets.csv")                                                                 # doctest: +SKIP
        (Finding(code='D130', message='3 rows occur more than once', ...),)
    """
    rows = _sorted(
        path, eval_path, format, mapping, eval_share, max_rows, drop_bad_rows, task, seed=seed,
        merge_labels=merge_labels, waived=waived, group=group, test=test, partial=partial,
    )  # fmt: skip
    return _once(rows.notes.notes)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sound rows of a file in two parts, before any token is counted."""

    reading: Reading
    line: str
    train: list[Example]
    held: list[Example]
    test: list[Example]
    #: Of the three parts.
    names: tuple[str, str, str]
    notes: Notes
    rejected: list[Rejected]
    duplicates: int
    labels: Labels | None
    prompt: PromptTemplate | None
    eval_line: str
    sha256: dict[str, str]


def _sorted(
    path: str | Path | Table | Mapping[str | Path, float],
    eval_path: str | Path | None,
    format: str,
    mapping: Mapping[str, str] | None,
    eval_share: float | None,
    max_rows: int | None,
    drop_bad_rows: bool,
    task: str,
    *,
    seed: int,
    merge_labels: bool,
    waived: Collection[str],
    labels: Labels | None = None,
    instead: Mapping[str, str] | None = None,
    max_length: int | None = None,
    prompt: PromptTemplate | None = None,
    by_head: bool = False,
    group: str | None = None,
    test: str | Path | float | None = None,
    partial: bool = False,
    count_tokens: Callable[[str], int] | None = None,
) -> _Rows:
    """Reads, recognises, checks and splits; see `prepare`."""
    _check_arguments(eval_path, eval_share, max_rows, max_length, test)
    weights = list(path.values()) if isinstance(path, Mapping) else [1.0]
    sources: list[str | Path | Table] = list(path) if isinstance(path, Mapping) else [path]
    test_path = None if isinstance(test, float) else test
    others = [place for place in (eval_path, test_path) if place is not None]
    tables = _read_all([*sources, *others], format, max_rows, drop_bad_rows)
    notes = Notes(waived)
    if prompt is not None:
        roles = mapping or {}
        told: dict[str, Any] = {"drop_bad_rows": drop_bad_rows, "instead": instead, "by_head": by_head}
        tables[0], task, mapping, prompt = prompted(tables[0], prompt, task, roles, notes, **told)
        tables[1:] = [prompted(table, prompt, task, roles, notes, **told)[0] for table in tables[1:]]
    readings = [recognise(tables[0], task, mapping, instead=instead)]
    readings += [recognise(table, readings[0].task, mapping) for table in tables[1 : len(sources)]]
    reading = readings[0]
    for table in tables[len(sources) :]:
        _check_same_columns(reading, tables[0], table)
        readings.append(reading)
    if group is not None:
        _check_group(group, tables[: len(sources)])
    checked = [
        check(
            table,
            reading,
            notes,
            drop_bad_rows=drop_bad_rows,
            merge_labels=merge_labels,
            count_tokens=count_tokens,
            # A source of several need not have every label.
            is_eval=order >= len(sources) or labels is not None or len(sources) > 1 or partial,
            group=group if order < len(sources) else None,
        )
        for order, (table, reading) in enumerate(zip(tables, readings, strict=True))
    ]
    train, bounds = _together([one.examples for one in checked[: len(sources)]], tables)
    if len(sources) > 1 and reading.task == "classify" and labels is None:
        _check_labels_together(train, notes)
    name = " + ".join(table.path.name for table in tables[: len(sources)])
    names = (
        name,
        tables[len(sources)].path.name if eval_path is not None else f"{name} (eval part)",
        tables[-1].path.name if test_path is not None else f"{name} (test part)",
    )
    tested = checked[-1].examples if test_path is not None else []
    told_apart = {"what": "test rows", "fix": "leave --test out, or give it a share: --test 0.1"}
    if test_path is not None:
        check_overlap(train, tested, notes, names[2], **told_apart)
    if eval_path is not None:
        held = checked[len(sources)].examples
        check_overlap(train, held, notes, names[1])
        check_overlap(held, tested, notes, names[2], where="eval", **told_apart)
        eval_line = f"eval {names[1]} = {counted(len(held), 'row')}"
    notes.settle()
    if isinstance(test, float):
        train, tested = hold_out(train, reading, test, seed, notes, name, group, fix="--set data.test=null")
    if eval_path is None:
        train, held = hold_out(train, reading, eval_share, seed, notes, name, group, whole=partial)
        eval_line = _eval_line(train, held)
    if tested:
        eval_line += f", test {counted(len(tested), 'row')}"

    rejected = [fault for result in checked[partial:] for fault in result.rejected]
    train, undrawn = _weighed(train, bounds, weights, seed, notes)
    rejected += undrawn
    known: Labels | None = None
    if reading.task in ("classify", "tag"):
        known = labels or _labels_in(train, reading.task)
        for part, place in zip((train, held, tested), names, strict=True):
            _check_known_labels(part, known, notes, place)
        notes.settle()
        train, held, tested = (
            [e for e in part if all(one in known for one in e.labels)] for part in (train, held, tested)
        )
    told_line = " + ".join(one.line for one in readings[: len(sources)])
    return _Rows(
        reading, told_line, train, held, tested, names, notes, rejected,
        sum(one.duplicates for one in checked[: len(sources)]), known, prompt, eval_line,
        {str(table.path): table.sha256 for table in tables},
    )  # fmt: skip


#: Tasks whose answers a chat template writes.
_WRITTEN = ("choice", "dpo", "grpo", "kto", "ppo", "reward", "rloo", "sft", "tfew")
#: Those that learn from rewards of answers that the model writes itself.
ONLINE = ("grpo", "ppo", "rloo")
#: Those of them for which a head on question and answer will do.
_BY_HEAD = ("choice", "reward")
#: Those that an encoder-decoder can do, question and answer apart.
_APART = ("choice", "dpo", "kto", "tfew")


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Rows to items, by task."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    labels: Labels | None
    scale: Scale | None
    template: Template | None
    notes: Notes
    max_length: int | None
    drop_bad_rows: bool
    apart: bool

    def __call__(self, rows: list[Example], place: str) -> tuple[list[Item], Supervision, list[Rejected]]:
        """Items of the rows, what is trained, and the rows left out; a row of no token is a fault (D142), too."""
        items, supervision, rejected = self._encoded(rows, place)
        items = [item for item in items if item.get("input_ids", True)]
        seen = {item["row"] for item in items} | {one.row for one in rejected}
        silent = [e for e in rows if e.row not in seen]
        if self.drop_bad_rows:
            rejected = [*rejected, *(Rejected(e.place, e.row, "no token to learn [D142]", e.raw) for e in silent)]
        elif silent and not self.notes.errors:
            message = f"{counted(len(silent), 'row')} with no token to learn ({numbered([e.row for e in silent])})"
            self.notes.error("D142", message, place, "--set data.drop_bad_rows=true")
        return items, supervision, rejected

    def _encoded(self, rows: list[Example], place: str) -> tuple[list[Item], Supervision, list[Rejected]]:
        told: dict[str, Any] = {"max_length": self.max_length, "place": place}
        if self.task == "lm":
            return *encode_documents(rows, self.tokenizer, max_length=self.max_length), []
        if self.task == "mlm":
            return *encode_masked(rows, self.tokenizer, max_length=self.max_length), []
        if self.task == "seq2seq":
            return *encode_targets(rows, self.tokenizer, self.notes, **told), []
        if self.labels is not None:
            encode = encode_tagged if self.task == "tag" else encode_labelled
            return *encode(rows, self.tokenizer, self.labels, self.notes, **told), []
        if self.scale is not None:
            return *encode_scored(rows, self.tokenizer, self.scale, self.notes, **told), []
        if self.apart:
            return *encode_apart(rows, self.tokenizer, self.notes, mismatched=self.task == "kto", **told), []
        if self.template is None:
            return *encode_paired(rows, self.tokenizer, self.notes, **told), []
        written = {**told, "drop_bad_rows": self.drop_bad_rows}
        if self.task == "sft":
            return encode_chats(rows, self.tokenizer, self.template, self.notes, **written)
        if self.task == "reward":
            return encode_scored_answers(rows, self.tokenizer, self.template, self.notes, **written)
        if self.task in ONLINE:
            return encode_prompts(rows, self.tokenizer, self.template, self.notes, **written)
        written["mismatched"] = self.task == "kto"
        return encode_candidates(rows, self.tokenizer, self.template, self.notes, **written)


def _template(
    template: str | Template | None, tokenizer: PreTrainedTokenizerBase, examples: list[Example], notes: Notes
) -> Template:
    """The one that a run has stored, or that was asked for, or the tokenizer's, or a built-in one."""
    if isinstance(template, Template):
        return template
    chosen = Template.of(tokenizer, choice=template, chat=_is_chat(examples))
    if chosen.name in ("plain", "turns") and template is None:
        message = f"the tokenizer has no chat template; built-in template '{chosen.name}' is used, it adds no tokens"
        notes.note("D149", message)
    return chosen


def _packed(items: list[Item], told: Supervision, length: int | None) -> tuple[list[Item], Supervision]:
    """Items packed into rows, and what is then trained: not the first token of each text."""
    if not items:
        return items, told
    rows = pack(items, length or max(len(item["input_ids"]) for item in items))
    what = f"{told.what}, {counted(len(items), 'text')} packed into {counted(len(rows), 'row')}"
    return rows, replace(told, what=what)


def _labels_in(examples: list[Example], task: str) -> Labels:
    several = task == "classify" and any(isinstance(e.label, tuple) for e in examples)
    return Labels.of((one for e in examples for one in e.labels), several=several)


def _check_arguments(
    eval_path: str | Path | None,
    eval_share: float | None,
    max_rows: int | None,
    max_length: int | None,
    test: str | Path | float | None,
) -> None:
    findings: list[Finding] = []
    if isinstance(test, float) and not 0 < test < 1:
        message = f"test {test:g} is neither a file nor a share above 0 and below 1"
        findings.append(Finding("D133", message, fix="--test 0.1"))
    if eval_share is not None and not 0 <= eval_share < 1:
        fix = f"--set data.eval_share={eval_share / 100:g}" if 1 <= eval_share < 100 else "--set data.eval_share=0.05"
        findings.append(Finding("D133", f"eval_share is {eval_share:g}, wanted at least 0 and below 1", fix=fix))
    if eval_share and eval_path is not None:
        message = f"eval_share {eval_share:g} and eval_path {eval_path} exclude each other"
        findings.append(Finding("D133", message, fix="--set data.eval_share=null"))
    if max_rows is not None and max_rows < 1:
        findings.append(Finding("D104", f"max_rows is {max_rows}, wanted 1 or more", fix="--set data.max_rows=null"))
    if max_length is not None and max_length < 2:
        findings.append(Finding("D143", f"max_length is {max_length}, wanted 2 or more", fix="--max-length 512"))
    if findings:
        raise DataError(findings)


def _read_all(paths: list[str | Path | Table], format: str, max_rows: int | None, drop_bad_rows: bool) -> list[Table]:
    """Every file, or the faults of all of them."""
    tables: list[Table] = []
    findings: list[Finding] = []
    for path in paths:
        if isinstance(path, Table):
            tables.append(path)
            continue
        try:
            tables.append(read_rows(path, format, max_rows, drop_bad_rows=drop_bad_rows))
        except DataError as error:
            findings += error.findings
    if findings:
        raise DataError(findings)
    return tables


def _check_same_columns(reading: Reading, train: Table, held: Table) -> None:
    """The eval file must have the columns that the training file was recognised by."""
    needed = [name for role in reading.columns if role != "system" for name in reading.sources(role)[:1]]
    missing = [name for name in needed if name not in held.columns]
    if missing:
        message = f"no column {listed(map(repr, missing))} as in {train.path.name}; columns: {listed(held.columns)}"
        raise DataError(Finding("D110", message, held.path.name, "give both files the same columns"))


def _check_group(group: str, tables: list[Table]) -> None:
    """Raise DataError where a table lacks the column that parts the rows."""
    findings = []
    for table in tables:
        if group not in table.columns:
            fix = f"--set data.group={(nearest(group, table.columns, most=1) or table.columns)[0]}"
            message = f"no column '{group}' to part the rows by; columns: {listed(table.columns)}"
            findings.append(Finding("D110", message, table.path.name, fix))
    if findings:
        raise DataError(findings)


def _together(parts: list[list[Example]], tables: list[Table]) -> tuple[list[Example], list[int]]:
    """The rows of all sources, numbered on, and the first number of each source."""
    train: list[Example] = []
    bounds: list[int] = []
    before = 0
    for examples, table in zip(parts, tables, strict=False):
        bounds.append(before + 1)
        train += [replace(e, row=before + e.row) if before else e for e in examples]
        before += len(table)
    return train, bounds


def _check_labels_together(examples: list[Example], notes: Notes) -> None:
    """What can only be said of the labels of all sources at once."""
    if len({isinstance(e.label, tuple) for e in examples}) > 1:
        notes.error("D121", "sources with one label a row beside sources with lists of labels")
    elif len({name for e in examples for name in e.labels}) < 2:
        notes.error("D128", "there are fewer than two labels in all sources: there is nothing to tell apart")


def _weighed(
    examples: list[Example], bounds: list[int], weights: list[float], seed: int, notes: Notes
) -> tuple[list[Example], list[Rejected]]:
    """Each source's rows as often as its weight says, in the order of the sources; and those not drawn at all."""
    if all(weight == 1 for weight in weights):
        return examples, []
    drawn: list[Example] = []
    undrawn: list[Rejected] = []
    for order, (first, weight) in enumerate(zip(bounds, weights, strict=True)):
        end = bounds[order + 1] if order + 1 < len(bounds) else None
        own = [e for e in examples if e.row >= first and (end is None or e.row < end)]
        times, rest = divmod(round(weight * len(own)), len(own)) if own else (0, 0)
        by_hash = sorted(own, key=lambda e: hashlib.sha256(f"{seed}:{e.place}:{e.key}".encode()).digest())
        more = {e.row for e in by_hash[:rest]}
        drawn += own * times + [e for e in own if e.row in more]
        left = [e for e in own if not times and e.row not in more]
        undrawn += [Rejected(e.place, e.row, f"not drawn: weight {weight:g} [D115]", e.raw) for e in left]
        used = times * len(own) + rest
        source = own[0].place.partition(":")[0] if own else f"source {order + 1}"
        notes.note("D115", f"weight {weight:g}: {counted(len(own), 'training row')} used {number(used)} times", source)
    return drawn, undrawn


def hold_out(
    examples: list[Example],
    reading: Reading,
    share: float | None,
    seed: int,
    notes: Notes,
    place: str,
    group: str | None = None,
    fix: str = "--set data.eval_share=null",
    *,
    whole: bool = False,
) -> tuple[list[Example], list[Example]]:
    """Train and held-out examples of one file; arguments are `prepare`'s. Too few rows go to `notes`, with `fix`.

    Of fewer than 20 documents the ends are held out, or with `whole` some of them as they are.
    """
    if share == 0:
        return examples, []
    if reading.kind == "documents" and len(examples) < _FEW_DOCUMENTS and group is None and not whole:
        halves = [(e, *split_document(e.texts[0], _SHARE_OF_DOCUMENT if share is None else share)) for e in examples]
        train = [replace(e, texts=(head,)) for e, head, _ in halves]
        return train, [replace(e, texts=(tail,)) for e, _, tail in halves if tail]
    labels = [label_name(e.label) for e in examples] if reading.kind in ("labelled", "judged") else []
    if reading.kind == "choices" and len({e.answers for e in examples}) == 1:  # the choices are labels
        labels = [str(e.label) for e in examples]
    if any(isinstance(e.label, tuple) for e in examples):
        labels = []  # rows with several labels belong to no one stratum
    wanted = default_share(len(examples)) if share is None else share
    groups = [str(e.raw[group]) for e in examples] if group is not None else None
    inside, held = split([e.key for e in examples], labels or None, share=wanted, seed=seed, groups=groups)
    if not held:
        message = f"{counted(len(examples), 'row')} cannot be divided into train and eval (every text, or label, once)"
        if share is not None:
            notes.error("D133", message, place, fix)
            notes.settle()
        notes.note("D133", f"{message}: no eval rows", place)
    elif groups is not None:
        _tell_uneven(labels, held, wanted, len(examples), str(group), notes, place)
    return [examples[at] for at in inside], [examples[at] for at in held]


def _tell_uneven(
    labels: list[str], held: list[int], share: float, rows: int, group: str, notes: Notes, place: str
) -> None:
    """Note what whole groups have made of the share that was wanted, and of the labels."""
    told = []
    if abs(len(held) - share * rows) > max(1, 0.25 * share * rows):
        asked = percent(round(share * rows), rows)
        told.append(f"{counted(len(held), 'row')} ({percent(len(held), rows)}) where {asked} was wanted")
    if missing := sorted(set(labels) - {labels[at] for at in held} if labels else ()):
        told.append(f"no row of {listed(map(repr, missing), 4)}")
    if told:
        notes.note("D137", f"groups of '{group}' stay whole, so that {' and '.join(told)} are held out", place)


def _eval_line(train: list[Example], held: list[Example]) -> str:
    """How much was held out: in rows, or in characters where texts were divided inside."""
    if not held:
        return "no eval rows"
    if {e.row for e in held} & {e.row for e in train}:
        part, rest = (sum(len(text) for e in side for text in e.texts) for side in (held, train))
        return f"eval {percent(part, part + rest)} = the end of {'each' if len(held) > 1 else 'the'} text"
    return f"eval {percent(len(held), len(held) + len(train))} = {counted(len(held), 'row')}"


def _is_chat(examples: list[Example]) -> bool:
    """Whether any row is more than one question and its answer."""
    single = (["user"], ["user", "assistant"])
    return any([m["role"] for m in e.messages] not in single for e in examples)


def _check_known_labels(examples: list[Example], labels: Labels, notes: Notes, place: str) -> None:
    strange = [e for e in examples if any(one not in labels for one in e.labels)]
    if strange:
        unknown = sorted({label_name(one) for e in strange for one in e.labels if one not in labels})
        message = (
            f"{counted(len(strange), 'eval row')} with labels unknown to training: {listed(map(repr, unknown), 5)}"
        )
        notes.error("D132", message, place, "correct them, or waive D132 to leave those rows out")


def _once(notes: list[Finding]) -> tuple[Finding, ...]:
    return tuple(dict.fromkeys(notes))
