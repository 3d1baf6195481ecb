"""Reads a data file into rows, and says exactly where it is broken: JSONL, JSON, CSV, TSV, Parquet, plain text.

Every broken line of a file is reported at once. Nothing is guessed about the meaning of the columns here; that is
`recognise`. A plain text file becomes one row with one column `text`: a whole document. A folder is the rows of all its
data files, in the order of their names.

Example:
    >>> table = read_rows("faq.jsonl")                                                          # doctest: +SKIP
    >>> table.columns, table.places[0]                                                          # doctest: +SKIP
    (('question', 'answer'), 'faq.jsonl:1')
"""

from __future__ import annotations

import collections
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from graftlm.data.wording import clip, counted, kind_of, listed, number
from graftlm.errors import DataError, Finding, half_character, nearest

__all__ = [
    "FORMATS",
    "Rejected",
    "Row",
    "Table",
    "file_digest",
    "files_of",
    "folder_digest",
    "read_rows",
    "tables_of",
    "within",
]

Row = dict[str, Any]

FORMATS: dict[str, str] = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".md": "text",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tab": "tsv",
    ".tsv": "tsv",
    ".txt": "text",
}
"""File ending to format."""

_MAGIC = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive or an Excel file", b"%PDF": "PDF"}
_COUNTED_BYTES = 200_000_000  # a larger neighbour is named without its number of rows
_CARET_WIDTH = 72
_PART_CHARACTERS = 16_384  # of a text that is read while a run goes on


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out, with the reason; one line of `data/rejected.jsonl`."""

    place: str
    row: int
    reason: str
    raw: Any = None


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file; `places[i]` is where `rows[i]` stands in it, such as `faq.jsonl:17`."""

    path: Path
    format: str
    sha256: str
    columns: tuple[str, ...]
    rows: list[Row]
    places: list[str]
    rejected: list[Rejected] = field(default_factory=list)
    capped: bool = False

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(
    path: str | Path, format: str = "auto", max_rows: int | None = None, *, drop_bad_rows: bool = False
) -> Table:
    """All rows of a file (at most the first `max_rows`), each with its place.

    Args:
        path: a local file, or a folder with data files (also in folders within it; names that begin with a dot or an
            underscore are passed over).
        format: one of `FORMATS`' values; `auto` goes by the file's ending and, between JSON and JSONL, by content.
        max_rows: stop after so many rows; `Table.capped` tells whether there were more.
        drop_bad_rows: leave out lines that cannot be parsed; they are listed in `Table.rejected`.

    Raises:
        DataError: D101 to D109, D113, D114, with every broken line of the file, or of all files of a folder.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, format, max_rows, drop_bad_rows)
    _must_exist(path)
    kind = _format_of(path, format)
    if path.stat().st_size == 0:
        raise DataError(Finding("D104", "the file is empty", place=str(path)))
    reader = _Reader(path, max_rows, drop_bad_rows)
    if kind == "parquet":
        reader.digest = file_digest(path)
        _exhaust(reader.parquet())
    else:
        content = path.read_bytes()
        reader.digest = hashlib.sha256(content).hexdigest()
        text = _decoded(content, path, in_lines=kind in ("csv", "tsv", "jsonl"), drop_bad_rows=drop_bad_rows)
        if not text.strip():
            raise DataError(Finding("D104", "the file holds nothing but white space", place=str(path)))
        if kind in ("csv", "tsv"):
            lines = io.StringIO(text, newline="")
            _exhaust(reader.delimited(lines, _delimiter(text, kind)))
        elif kind == "text":
            reader.add({"text": text}, f"{path.name}:1")
        elif format == "jsonl" or (format == "auto" and _looks_like_lines(text, kind)):
            kind = "jsonl"
            # Not splitlines(): U+2028 and its like are ordinary characters inside a JSON string.
            _exhaust(reader.json_lines(io.StringIO(text, newline=None)))
            if reader.lines == 1 and reader.rows:
                _check_no_wrapper(reader.rows[0], path)
        else:
            kind = "json"
            reader.json_array(text)
    return reader.table(kind)


def tables_of(path: Path, format: str = "auto", max_rows: int | None = None, *, chunk: int = 256) -> Iterator[Table]:
    """The rows of a file in tables of at most `chunk` rows, read one after the other; never more than one is held.

    Broken lines do not stop it: they are in `Table.rejected`. A plain text comes in parts that end with a line. The
    tables have no `sha256`, and rows in `rejected` are numbered through the whole file.

    Raises:
        DataError: D101 to D104, D108, D113, and D117 for a JSON array, which has no rows before its end; D105 for a
            quoted text in a CSV file that is never closed.
    """
    _must_exist(path)
    kind = _format_of(path, format)
    if path.stat().st_size == 0:
        raise DataError(Finding("D104", "the file is empty", place=str(path)))
    reader = _Reader(path, max_rows, drop_bad_rows=True)
    if kind == "parquet":
        yield from reader.in_tables(reader.parquet(chunk), kind, chunk)
        return
    with path.open("rb") as file:
        head = file.read(1 << 16)
        begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind == "json" and (format == "json" or begins == b"["):
        message = "a JSON array has no rows before its end, so it cannot be read while a run goes on"
        raise DataError(Finding("D117", message, path.name, "save it as JSONL, one object a line"))
    table = kind in ("csv", "tsv")
    # Bytes that are no UTF-8 become lone surrogates, which the reader refuses line by line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="" if table else None) as lines:
        if kind == "text":
            yield from reader.in_tables(reader.parts(lines), kind, chunk)
        elif table:
            delimiter = _delimiter(head.decode("utf-8-sig", "replace"), kind)
            yield from reader.in_tables(reader.delimited(lines, delimiter), kind, chunk)
        else:
            yield from reader.in_tables(reader.json_lines(lines), "jsonl", chunk)


def _exhaust(steps: Iterator[None]) -> None:
    collections.deque(steps, maxlen=0)


def _delimiter(text: str, kind: str) -> str:
    """What parts the fields of the table that begins with `text`."""
    first = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    if kind == "tsv":
        return "\t"
    if "," not in first:  # spreadsheets of half of Europe write semicolons
        return next((sign for sign in ";\t" if sign in first), ",")
    return ","


_DROP = "--set data.drop_bad_rows=true"
#: Names under which files that are one object hold their rows.
_WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples", "train", "test", "validation")
_TOO_DEEP = "lists and objects inside one another, hundreds deep"
_PARTS = re.compile(r"(train|valid|validation|dev|eval|test)(?![a-z])", re.IGNORECASE)


def _read_folder(path: Path, format: str, max_rows: int | None, drop_bad_rows: bool) -> Table:
    """The rows of all data files of a folder. Raises as `read_rows`; D102 none there, D114 files that do not belong
    together.
    """
    files = files_of(path, format)
    tables: list[Table] = []
    findings: list[Finding] = []
    rows = 0
    for file in files:
        if max_rows is not None and rows >= max_rows:
            break
        try:
            left = None if max_rows is None else max_rows - rows
            tables.append(read_rows(file, format, left, drop_bad_rows=drop_bad_rows))
        except DataError as error:
            findings += error.findings
        else:
            rows += len(tables[-1])
    if findings:
        raise DataError(findings)
    kinds = {table.format for table in tables}
    return Table(
        path=path,
        format=kinds.pop() if len(kinds) == 1 else "several",
        sha256=folder_digest(path, ((table.path, table.sha256) for table in tables)),
        columns=tuple(dict.fromkeys(name for table in tables for name in table.columns)),
        rows=[row for table in tables for row in table.rows],
        places=[within(path, table.path, place) for table in tables for place in table.places],
        rejected=[replace(r, place=within(path, table.path, r.place)) for table in tables for r in table.rejected],
        capped=len(tables) < len(files) or any(table.capped for table in tables),
    )


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, files: Iterable[tuple[Path, str]]) -> str:
    """The SHA-256 of the names in `folder` of some files, and of their own, which are given."""
    whole = hashlib.sha256()
    for file, own in files:
        whole.update(f"{file.relative_to(folder).as_posix()}\0{own}\n".encode())
    return whole.hexdigest()


def within(folder: Path, file: Path, place: str) -> str:
    """A place in a file of `folder` with the folders between."""
    between = file.parent.relative_to(folder).as_posix()
    return place if between == "." else f"{between}/{place}"


def files_of(path: Path, format: str) -> list[Path]:
    """The data files of a folder that can be rows of one table, in the order of their names.

    Raises DataError: D102 there is none, D114 they do not belong together.
    """
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in FORMATS
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        and format in ("auto", FORMATS[file.suffix.lower()])
    ]
    if not found:
        kind = "data file" if format == "auto" else f"{format} file"
        raise DataError(Finding("D102", f"{path} is a folder without a {kind}", fix=f"known: {', '.join(FORMATS)}"))
    kinds = {FORMATS[file.suffix.lower()] for file in found}
    if "text" in kinds and len(kinds) > 1:
        table = sorted(kinds - {"text"})[0]
        message = f"{path} has tables and plain texts: {listed([file.name for file in found], 4)}"
        raise DataError(Finding("D114", message, fix=f"--set data.format={table}"))
    parts = {file: match[1].lower() for file in found if (match := _PARTS.match(file.stem))}
    train = [file for file, part in parts.items() if part == "train"]
    held = [file for file, part in parts.items() if part != "train"]
    if train and held:  # what is meant to be held out must not be learnt
        message = f"{path} has files to train on and files to evaluate on: {listed([f.name for f in parts], 4)}"
        raise DataError(Finding("D114", message, fix=f"{train[0]} --set data.eval_path={held[0]}"))
    return found


class _Reader:
    """Collects rows, places and faults of one file while a format's method walks through it."""

    def __init__(self, path: Path, max_rows: int | None, drop_bad_rows: bool) -> None:
        self.path, self.max_rows, self.drop_bad_rows = path, max_rows, drop_bad_rows
        self.rows: list[Row] = []
        self.places: list[str] = []
        self.faults: list[tuple[Finding, Rejected]] = []
        self.header: list[str] | None = None
        self.digest = ""
        self.lines = 0  # rows met, good or bad
        self.taken = 0  # good ones in tables that were handed over before
        self.capped = False

    @property
    def full(self) -> bool:
        """Whether `max_rows` are in, so that one more would only tell that there were more."""
        return self.max_rows is not None and self.taken + len(self.rows) >= self.max_rows

    def add(self, row: Row, place: str) -> None:
        self.lines += 1
        if self.full:
            self.capped = True
        else:
            self.rows.append(row)
            self.places.append(place)

    def fault(self, code: str, message: str, place: str, raw: Any, detail: tuple[str, ...] = (), fix: str = "") -> None:
        self.lines += 1
        self.faults.append(
            (Finding(code, message, place, fix, detail), Rejected(place, self.lines, f"{message} [{code}]", raw))
        )

    def table(self, kind: str) -> Table:
        if self.faults and not self.drop_bad_rows:
            of = f"({number(len(self.faults))} of {counted(self.lines, 'line')})"
            fix = f"mend the line, or leave such lines out with {_DROP}"
            raise DataError(
                Finding(f.code, f"{f.message} {of}", f.place, f.fix or fix, f.detail) for f, _ in self.faults
            )
        if not self.rows:
            raise DataError(Finding("D104", f"no row in {self.path}", fix="" if self.lines else "add rows"))
        columns = self.header or list(dict.fromkeys(name for row in self.rows for name in row))
        return Table(
            path=self.path,
            format=kind,
            sha256=self.digest,
            columns=tuple(columns),
            rows=self.rows,
            places=self.places,
            rejected=[rejected for _, rejected in self.faults],
            capped=self.capped,
        )

    def in_tables(self, steps: Iterator[None], kind: str, chunk: int) -> Iterator[Table]:
        """What `steps` bring in, in tables of at most `chunk` rows or faults."""
        for _ in steps:
            if len(self.rows) + len(self.faults) >= chunk:
                yield self._handed_over(kind)
        if self.rows or self.faults:
            yield self._handed_over(kind)

    def _handed_over(self, kind: str) -> Table:
        columns = self.header or list(dict.fromkeys(name for row in self.rows for name in row))
        rejected = [fault for _, fault in self.faults]
        table = Table(self.path, kind, "", tuple(columns), self.rows, self.places, rejected, self.capped)
        self.taken += len(self.rows)
        self.rows, self.places, self.faults = [], [], []
        return table

    def readable(self, text: str, place: str) -> bool:
        """Whether the text is UTF-8; else it is a fault."""
        if not half_character(text):
            return True
        self.fault("D106", "not UTF-8", place, text.encode("utf-8", "replace").decode())
        return False

    def parts(self, file: TextIO) -> Iterator[None]:
        """A plain text in parts that end with a line, where lines are not longer than a part."""
        begin = 1
        while text := file.read(_PART_CHARACTERS):
            text += file.readline(_PART_CHARACTERS)
            place = f"{self.path.name}:{begin}"
            begin += text.count("\n")
            if self.full:
                self.capped = True
                return
            if text.strip() and self.readable(text, place):
                self.add({"text": text}, place)
            yield

    def json_lines(self, lines: Iterable[str]) -> Iterator[None]:
        for at, ended in enumerate(lines, start=1):
            line = ended.removesuffix("\n")
            if not line.strip():
                continue
            if self.full:
                self.capped = True
                return
            place = f"{self.path.name}:{at}"
            if not line.isascii() and not self.readable(line, place):
                yield
                continue
            try:
                value = json.loads(line, object_pairs_hook=_once_each)
            except _TwiceError as twice:
                self.fault("D108", str(twice), place, line)
            except json.JSONDecodeError as error:
                self.fault("D105", _json_message(error), f"{place}:{error.colno}", line, _caret(line, error.colno))
            except RecursionError:
                self.fault("D105", _TOO_DEEP, place, line)
            else:
                self.json_value(value, place)
            yield

    def json_value(self, value: Any, place: str) -> None:
        try:
            half = _half(value)
        except RecursionError:  # the scanner goes deeper than this does
            self.fault("D105", _TOO_DEEP, place, json.dumps(list(value)[:8]))
            return
        if isinstance(value, dict) and half is not None:
            message = f"a text has half a character, {half!a}: the other half of a pair is missing"
            self.fault("D118", message, place, json.dumps(value))
        elif isinstance(value, dict):
            self.add(value, place)
        else:
            self.fault(
                "D109", f'found {kind_of(value)}, wanted an object such as {{"text": ..., "label": ...}}', place, value
            )

    def json_array(self, text: str) -> None:
        name, decoder = self.path.name, json.JSONDecoder(object_pairs_hook=_once_each)
        start = len(text) - len(text.lstrip())
        if text[start] != "[":
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise _broken_json(error, name) from None
            except RecursionError:
                raise DataError(Finding("D105", _TOO_DEEP, f"{name}:1")) from None
            if isinstance(value, dict):
                _check_no_wrapper(value, self.path)
            what = f"one object with {listed(value)}" if isinstance(value, dict) else kind_of(value)
            lists = [key for key, v in value.items() if isinstance(v, list)] if isinstance(value, dict) else []
            detail = (f"the rows may be under {listed(map(repr, lists))}: save that list as a file",) if lists else ()
            raise DataError(Finding("D109", f"found {what}, wanted an array of objects", name, detail=detail))
        at, line, counted_to = start + 1, 1 + text.count("\n", 0, start), start
        before = 0 if "\n" in text.strip() else line  # rows that share a line are told apart by their column
        try:
            while True:
                at = _skip(text, at)
                if text[at : at + 1] == "]":
                    break
                line += text.count("\n", counted_to, at)
                counted_to = at
                place = f"{name}:{line}" + (f":{at - text.rfind(chr(10), 0, at)}" if line == before else "")
                before = line
                try:
                    value, at = decoder.raw_decode(text, at)
                except _TwiceError as twice:
                    _, end = json.JSONDecoder().raw_decode(text, at)
                    self.fault("D108", str(twice), place, text[at:end])
                    at = end
                else:
                    if self.full:
                        self.capped = True
                        return
                    self.json_value(value, place)
                at = _skip(text, at)
                if text[at : at + 1] == ",":
                    at += 1
                elif text[at : at + 1] != "]":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, min(at, len(text.rstrip())))
            if text[at + 1 :].strip():
                raise json.JSONDecodeError("Extra data", text, _skip(text, at + 1))
        except json.JSONDecodeError as error:
            raise _broken_json(error, name) from None
        except RecursionError:
            raise DataError(Finding("D105", _TOO_DEEP, f"{name}:{line}")) from None

    def delimited(self, lines: Iterable[str], delimiter: str) -> Iterator[None]:
        name = self.path.name
        csv.field_size_limit(2**31 - 1)
        begun = ""  # the first line of the row that is being read

        def kept() -> Iterator[str]:
            nonlocal begun
            for line in lines:
                begun = begun or line
                yield line

        reader = csv.reader(kept(), delimiter=delimiter, strict=True)
        at = 0
        try:
            for cells in reader:
                begin, at, begun = at + 1, reader.line_num, ""
                if not cells:
                    continue
                if self.header is None:
                    self.header = _header([cell.strip() for cell in cells], f"{name}:{begin}")
                elif self.full:
                    self.capped = True
                    return
                elif not all(cell.isascii() or self.readable(cell, f"{name}:{begin}") for cell in cells):
                    pass
                elif len(cells) == len(self.header):
                    self.add(dict(zip(self.header, cells, strict=True)), f"{name}:{begin}")
                else:
                    wanted = f"{len(self.header)} ({listed(self.header)})"
                    message = f"found {counted(len(cells), 'field')}, wanted {wanted}"
                    if len(cells) > len(self.header) and delimiter == ",":
                        message += '; a text with a comma needs "quotes"'
                    self.fault("D107", message, f"{name}:{begin}", cells, (clip(delimiter.join(cells), _CARET_WIDTH),))
                yield
        except csv.Error as error:
            line = begun.rstrip("\r\n")
            message = "a quoted text is never closed" if "unexpected end" in str(error) else str(error)
            raise DataError(
                Finding("D105", message, f"{name}:{at + 1}", 'double a quote inside a quoted text: ""', (clip(line),))
            ) from None

    def parquet(self, at_once: int = 65_536) -> Iterator[None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file_:
                self.header = list(file_.schema_arrow.names)
                for batch in file_.iter_batches(at_once):
                    for row in batch.to_pylist():
                        self.add(row, f"{self.path.name} row {self.lines + 1}")
                        if self.capped:
                            return
                        yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(Finding("D113", clip(str(error), 100), str(self.path))) from None


def _must_exist(path: Path) -> None:
    if path.is_file():
        return
    folder = path.parent
    if not folder.is_dir():
        raise DataError(
            Finding(
                "D101", f"no file '{path}': there is no folder '{folder}'", detail=("data is read from local files",)
            )
        )
    names = _data_files(folder)
    close = nearest(path.name, names, most=1) or [name for name in names if Path(name).stem == path.stem][:1]
    if close:
        guess = folder / close[0]
        rows = _rows_in(guess)
        size = f" ({counted(rows, 'row')})" if rows is not None else ""
        raise DataError(Finding("D101", f"no file '{path}'. Did you mean {guess}{size}?", fix=str(guess)))
    beside = f"; in that folder: {listed(names, 5)}" if names else "; that folder has no data file"
    raise DataError(Finding("D101", f"no file '{path}'{beside}"))


def _data_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in FORMATS and file.is_file())


def _rows_in(path: Path) -> int | None:
    """The number of rows of a healthy file, cheaply; None where only a full parse would tell."""
    try:
        kind = FORMATS[path.suffix.lower()]
        if kind == "parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(path).num_rows)
        if kind == "jsonl" and path.stat().st_size <= _COUNTED_BYTES:
            return sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
        if kind in ("csv", "tsv", "json") and path.stat().st_size <= _COUNTED_BYTES:
            return len(read_rows(path))
    except Exception:  # a suggestion must never become an error of its own
        return None
    return None


def _format_of(path: Path, format: str) -> str:
    known = sorted(set(FORMATS.values()))
    if format != "auto":
        if format in known:
            return format
        close = nearest(format, known, most=1)
        fix = f"--set data.format={close[0]}" if close else ""
        raise DataError(Finding("D103", f"unknown format '{format}'; known: auto, {', '.join(known)}", fix=fix))
    with path.open("rb") as file:
        head = file.read(64)
    kind = FORMATS.get(path.suffix.lower())
    magic = next((name for sign, name in _MAGIC.items() if head.startswith(sign)), None)
    if magic and (kind != "parquet" or magic != "Parquet"):
        fix = "--set data.format=parquet" if magic == "Parquet" else "unpack or save it as CSV, JSONL or Parquet"
        raise DataError(Finding("D103", f"the file is {magic}, not {kind or 'a data file'}", str(path), fix))
    if kind is None:
        ending = path.suffix or "no ending"
        guess = "jsonl" if head.lstrip()[:1] == b"{" else "json" if head.lstrip()[:1] == b"[" else "text"
        message = f"unknown kind of file ({ending}); known endings: {', '.join(sorted(FORMATS))}"
        raise DataError(Finding("D103", message, str(path), f"--set data.format={guess}"))
    return kind


def _decoded(content: bytes, path: Path, *, in_lines: bool, drop_bad_rows: bool) -> str:
    """The file as text; bytes that are no UTF-8 become lone surrogates where the reader then leaves their line out."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        if in_lines and drop_bad_rows and not wide:
            return content.decode("utf-8-sig", "surrogateescape")
        at, found = error.start, f"byte 0x{content[error.start]:02x}"
    line = content.count(b"\n", 0, at) + 1
    place = f"{path.name}:{line}"
    message = f"not UTF-8: {found} at offset {number(at)}"
    lines = [] if wide else [line for line in content.split(b"\n") if not line.isascii()]
    odd = sum(not _is_utf8(line) for line in lines)
    if odd < len(lines):  # converting the file would spoil the others
        other = counted(len(lines) - odd, "line")
        message += f"; {counted(odd, 'line')} of this kind, and {other} with other letters in UTF-8"
        fix = f"mend them, or leave them out with {_DROP}" if in_lines else "mend them"
        raise DataError(Finding("D106", message, place, fix))
    guess = "UTF-16" if wide else "WINDOWS-1252"
    new = path.with_name(f"{path.stem}.utf8{path.suffix}")
    fix = f"iconv -f {guess} -t UTF-8 '{path}' > '{new}'"
    raise DataError(Finding("D106", f"{message}; perhaps {guess}", place, fix))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


class _TwiceError(ValueError):
    """A JSON object has one name twice, so that one of two values would be lost."""


def _once_each(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = dict.fromkeys(repr(name) for name in names if names.count(name) > 1)
        raise _TwiceError(f"one name twice in an object: {listed(twice)}")
    return row


def _check_no_wrapper(row: Row, path: Path) -> None:
    """Raise D109 where the only object of a file is no row but has the rows in it, as `{"data": [...]}` does."""
    for name, value in row.items():
        if name.lower() in _WRAPPERS and isinstance(value, list) and any(isinstance(one, dict) for one in value):
            message = f"the only object has {counted(len(value), 'object')} under {name!r}, wanted the rows themselves"
            fix = f"jq -c '.[\"{name}\"][]' '{path}' > '{path.with_name(path.stem + '.rows.jsonl')}'"
            raise DataError(Finding("D109", message, path.name, fix, ("save that list as a file of its own",)))


def _looks_like_lines(text: str, kind: str) -> bool:
    """Whether lines start objects of their own: JSONL, whatever the file is called."""
    starts = [line.lstrip()[:1] for line in text.split("\n") if line.strip()]
    return starts[0] != "[" and (kind == "jsonl" or 2 * starts.count("{") > len(starts))


def _header(names: list[str], place: str) -> list[str]:
    findings = []
    empty = [at for at, name in enumerate(names, start=1) if not name]
    if empty:
        hint = ("pandas writes its index so: to_csv(..., index=False)",) if empty == [1] else ()
        which = f"column{'s' if len(empty) > 1 else ''} {listed(empty)} of {len(names)}"
        findings.append(Finding("D108", f"{which} without a name", place, "name or remove it", hint))
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        findings.append(Finding("D108", f"one column name twice: {listed(map(repr, twice))}", place, "rename one"))
    if findings:
        raise DataError(findings)
    return names


def _half(value: Any) -> str | None:
    """The first half character in a text of `value`."""
    if isinstance(value, str):
        return half_character(value)
    inside = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((half for each in inside if (half := _half(each)) is not None), None)


def _skip(text: str, at: int) -> int:
    match = re.compile(r"\s*").match(text, at)
    return match.end() if match else at


def _json_message(error: json.JSONDecodeError) -> str:
    message = error.msg[0].lower() + error.msg[1:]
    return message.removesuffix(" starting at").removesuffix(" at")


def _broken_json(error: json.JSONDecodeError, name: str) -> DataError:
    line = error.doc.split("\n")[error.lineno - 1]
    place = f"{name}:{error.lineno}:{error.colno}"
    return DataError(Finding("D105", _json_message(error), place, detail=_caret(line, error.colno)))


def _caret(line: str, column: int) -> tuple[str, str]:
    """The part of a line around a column (1-based) and a caret below that column."""
    start = max(0, min(column - _CARET_WIDTH // 2, len(line) - _CARET_WIDTH))
    shown = line[start : start + _CARET_WIDTH].replace("\t", " ").rstrip("\r")
    head, tail = "…" if start else "", "…" if start + _CARET_WIDTH < len(line) else ""
    return head + shown + tail, " " * (len(head) + column - 1 - start) + "^"
