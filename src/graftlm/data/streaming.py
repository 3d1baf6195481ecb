"""Rows that are read while a run trains on them: of the training rows a chunk and a buffer are held, never all.

The first rows (the head) are read before, as those of any file are: by them columns and tokens are looked at, faults
told, and held-out rows taken. The rest is met on the way. A row that cannot be used there is left out, counted, and
told to whoever asked (`Stream.tell`); what was read is always what was used, what waits, what is held out, and what
was left out. The order follows from the seed, so a run that goes on reads again what it read before, without training.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.data.checking import Example, Notes, check
from graftlm.data.fetching import hub_rows
from graftlm.data.labels import Labels, Scale
from graftlm.data.prepare import Prepared, prepare
from graftlm.data.prompting import PromptTemplate, prompted
from graftlm.data.reading import Rejected, Table, file_digest, files_of, folder_digest, tables_of, within
from graftlm.data.recognise import Reading, recognise
from graftlm.data.tokenising import Cut, Item
from graftlm.data.wording import counted, listed, number
from graftlm.errors import DataError, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Counts", "Source", "Stream", "prepare_streamed"]

_HEAD_ROWS, _HEAD_BYTES = 1000, 8_000_000
_LABELLED = ("classify", "regress", "tag")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a stream's rows come from: a file, a folder, or `hub:owner/name[@revision]`."""

    name: str
    format: str = "auto"
    max_rows: int | None = None

    @property
    def path(self) -> Path:
        """The file or folder, or the name of a set on a hub."""
        return Path(self.name)

    def tables(self) -> Iterator[Table]:
        """The rows from the first on, in tables of some hundred; `Table.path` is the source's. Raises DataError."""
        if self.name.startswith("hub:"):
            yield from hub_rows(self.name, self.max_rows)
            return
        if not self.path.is_dir():
            yield from tables_of(self.path, self.format, self.max_rows)
            return
        left = self.max_rows
        for file in files_of(self.path, self.format):
            for table in tables_of(file, self.format, left):
                left = None if left is None else left - len(table)
                yield replace(
                    table,
                    path=self.path,
                    places=[within(self.path, file, place) for place in table.places],
                    rejected=[replace(r, place=within(self.path, file, r.place)) for r in table.rejected],
                )
            if left is not None and left <= 0:
                return

    def head(self) -> Table:
        """The first rows as one table, at most 1,000 of them or some megabytes."""
        rows, places, rejected, columns = [], [], list[Rejected](), dict[str, None]()
        size, last = 0, None
        for last in self.tables():
            rows += last.rows
            places += last.places
            rejected += last.rejected
            columns |= dict.fromkeys(last.columns)
            size += sum(len(str(value)) for row in last.rows for value in row.values())
            if len(rows) >= _HEAD_ROWS or size > _HEAD_BYTES:
                break
        if last is None or not rows:
            raise DataError(Finding("D104", f"no row in {self.name}"))
        return Table(self.path, last.format, self.digest(), tuple(columns), rows, places, rejected)

    def digest(self) -> str:
        """The SHA-256 of the file, or of the folder's files and their names; of a set on a hub, its commit."""
        if self.name.startswith("hub:"):
            from graftlm.data.fetching import hub_commit

            return hub_commit(self.name)
        if not self.path.is_dir():
            return file_digest(self.path)
        files = files_of(self.path, self.format)
        return folder_digest(self.path, ((file, file_digest(file)) for file in files))


@dataclass(slots=True)
class Counts:
    """What became of the rows of the first pass so far: `read` is the sum of the others.

    `waiting` are read and not yet drawn. `passes` are those begun, `drawn` the items handed out in all of them.
    """

    read: int = 0
    used: int = 0
    waiting: int = 0
    held_out: int = 0
    left_out: int = 0
    cut: int = 0
    passes: int = 0
    drawn: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def line(self) -> str:
        """`1,204 rows read: 1,150 used, 46 waiting, 5 held out, 3 left out (3 null 'output' [D120])`."""
        parts = [f"{number(self.used)} used"]
        parts += [
            f"{number(count)} {what}"
            for count, what in ((self.waiting, "waiting"), (self.held_out, "held out"), (self.left_out, "left out"))
            if count
        ]
        told = f"{counted(self.read, 'row')} read: {', '.join(parts)}"
        if self.reasons:
            told += f" ({listed([f'{number(n)} {why}' for why, n in self.reasons.most_common()], 3)})"
        if self.cut:
            told += f"; {number(self.cut)} cut"
        return told if self.passes < 2 else f"{told}; {number(self.passes)} passes"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        names = ("read", "used", "waiting", "held_out", "left_out", "cut", "passes", "drawn")
        return {name: getattr(self, name) for name in names} | {"reasons": dict(self.reasons.most_common(20))}


@dataclass(slots=True)
class Stream:
    """The training items of a run, without end: a new pass over the rows begins where one is over.

    `buffer` items are held, of which the next one is drawn; with 1 the order is the file's. `tell` is called with each
    row that is left out or cut, once. Walking anew begins anew, with the same order and new `counts`.
    """

    source: Source
    reading: Reading
    #: Rows to items, as `prepare` does it.
    encode: Callable[[list[Example], Notes], tuple[list[Item], Sequence[Cut], list[Rejected]]]
    columns: tuple[str, ...]
    held: frozenset[str]
    seed: int
    buffer: int
    prompt: tuple[PromptTemplate, str, dict[str, str], dict[str, Any]] | None = None
    labels: Labels | None = None
    tell: Callable[[Rejected | Cut], None] = lambda _: None
    counts: Counts = field(default_factory=Counts)

    def __iter__(self) -> Iterator[Item]:
        self.counts = counts = Counts()
        while True:
            draw, before = random.Random(f"{self.seed}:{counts.passes}"), counts.drawn
            counts.passes += 1
            for item in _drawn(self._items(counts.passes == 1), self.buffer, draw):
                counts.drawn += 1
                if counts.passes == 1 and item["opens"]:
                    counts.used += 1
                    counts.waiting -= 1
                yield {**item, "pass": counts.passes - 1}
            if counts.drawn == before:
                raise DataError(Finding("D104", f"no row of {self.source.name} can be used: {counts.line}"))

    def examples(self) -> Iterator[tuple[list[Example], list[Rejected], int]]:
        """The sound rows chunk by chunk, the others, and how many there were; rows are numbered through."""
        before = 0
        for table in self.source.tables():
            found = len(table) + len(table.rejected)
            table = replace(table, columns=self.columns, capped=False)
            notes = Notes()
            if self.prompt is not None:
                asked, task, mapping, told = self.prompt
                table = prompted(table, asked, task, mapping, notes, drop_bad_rows=True, may_be_empty=True, **told)[0]
            checked = check(table, self.reading, notes, drop_bad_rows=True, is_eval=True)
            sound = [replace(e, row=before + e.row) for e in checked.examples]
            out = [replace(r, row=before + r.row) for r in checked.rejected[len(table.rejected) :]]
            yield sound, [*table.rejected, *out], found
            before += found

    def _known(self, example: Example) -> bool:
        return self.labels is None or all(name in self.labels for name in example.labels)

    def _items(self, first: bool) -> Iterator[Item]:
        for sound, rejected, found in self.examples():
            examples = [e for e in sound if e.key not in self.held]
            strange = [e for e in examples if not self._known(e)]
            rejected += [Rejected(e.place, e.row, "a label that was not known before [D132]", e.raw) for e in strange]
            unknown = {e.row for e in strange}
            examples = [e for e in examples if e.row not in unknown]
            items, cut, out = self.encode(examples, Notes()) if examples else ([], (), [])
            rejected += out
            seen = {item["row"] for item in items}
            if first:
                self.counts.read += found
                self.counts.held_out += len(sound) - len(examples) - len(strange)
                self.counts.left_out += len(rejected)
                self.counts.waiting += len(seen)
                self.counts.cut += len(cut)
                for one in rejected:
                    self.counts.reasons[one.reason] += 1
                    self.tell(one)
                for row in cut:
                    self.tell(row)
            last = None
            for item in items:
                yield {**item, "opens": item["row"] != last}
                last = item["row"]


def _drawn(items: Iterable[Item], size: int, draw: random.Random) -> Iterator[Item]:
    """Every item once, each drawn from the `size` that come first of those that are left."""
    held: list[Item] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        at = draw.randrange(size)
        yield held[at]
        held[at] = item
    draw.shuffle(held)
    yield from held


def prepare_streamed(
    source: Source,
    eval_path: str | Path | None = None,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    drop_bad_rows: bool = False,
    task: str = "auto",
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    buffer: int = 1000,
    labels: Labels | None = None,
    scale: Scale | None = None,
    waived: Sequence[str] = (),
    instead: Mapping[str, str] | None = None,
    by_head: bool = False,
    prompt: PromptTemplate | None = None,
    **options: Any,
) -> Prepared:
    """As `prepare`, of which the arguments are; `Prepared.train` is the head, and `Prepared.stream` gives all rows.

    Without `eval_path` a fifth of the head is held out. Faults of the head are told at once, as those of any file are,
    or left out with `drop_bad_rows`. For tasks with labels or numbers all rows are read once before, for these alone.

    Raises:
        DataError: as `prepare`; D117 for what cannot be read so.
    """
    head = source.head()
    asked = None
    looked, told_task, roles = head, task, dict(mapping or {})
    if prompt is not None:
        told: dict[str, Any] = {"instead": instead, "by_head": by_head}
        asked = (prompt, task, roles, told)
        looked, told_task, roles, prompt = prompted(
            head, prompt, task, roles, Notes(waived), drop_bad_rows=drop_bad_rows, **told
        )
        asked = (prompt, told_task, dict(mapping or {}), told)
    reading = recognise(looked, told_task, roles, instead=instead)
    stream = Stream(source, reading, lambda *_: ([], (), []), head.columns, frozenset(), seed, buffer, asked)
    if reading.task in _LABELLED and labels is None and scale is None:
        labels, scale = _surveyed(stream)
    prepared = prepare(
        head, eval_path, format, mapping, drop_bad_rows=drop_bad_rows, task=task, tokenizer=tokenizer, seed=seed,
        labels=labels, scale=scale, waived=waived, instead=instead, by_head=by_head, prompt=prompt, partial=True,
        **options,
    )  # fmt: skip
    encoder = replace(prepared.encoder, drop_bad_rows=True)

    def encode(examples: list[Example], notes: Notes) -> tuple[list[Item], Sequence[Cut], list[Rejected]]:
        items, supervision, out = replace(encoder, notes=notes)(examples, source.path.name)
        return items, supervision.cut, out

    stream.encode, stream.labels = encode, prepared.labels
    if eval_path is None:
        stream.held = frozenset(item["example"].key for item in prepared.eval)
    size = counted(len(head), "row")
    line = prepared.line.replace(size, f"read while training, {size} looked at", 1)
    eval_line = prepared.eval_line.replace(" = ", " of the first rows = ") if eval_path is None else prepared.eval_line
    return replace(prepared, line=line, eval_line=eval_line, stream=stream)


def _surveyed(stream: Stream) -> tuple[Labels | None, Scale | None]:
    """The labels, or the scale of the numbers, of all rows. Raises DataError (D126, D128) for labels that do not do."""
    task, name = stream.reading.task, stream.source.path.name
    count, mean, squares = 0, 0.0, 0.0
    names: Counter[Any] = Counter()
    several = False
    for sound, _, _ in stream.examples():
        for example in sound:
            if task == "regress":  # Welford 1962: mean and squares in one pass
                count, apart = count + 1, float(example.label) - mean
                mean += apart / count
                squares += apart * (float(example.label) - mean)
            else:
                several = several or isinstance(example.label, tuple)
                names.update(example.labels)
    if task == "regress":
        deviation = (squares / count) ** 0.5 if count else 0.0
        return None, Scale(mean, deviation if deviation > 0 else 1.0)
    found = Labels.of(names, several=several and task == "classify")
    alike = Counter(" ".join(one.lower().split()) for one in found.names)
    if task == "classify" and (twice := [one for one, times in alike.items() if times > 1]):
        message = f"labels differ only by case or space: {listed(twice, 4)}"
        raise DataError(Finding("D126", message, name, "write each label one way, or leave --stream out"))
    if len(found) < 2:
        told = found.names[0] if len(found) else "none"
        raise DataError(Finding("D128", f"every row has the label '{told}': there is nothing to tell apart", name))
    return found, None
