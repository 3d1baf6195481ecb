"""Texts and prompts to work on: from the words on the command line, a file that the data room reads, or standard input.

In a plain text file and on standard input every line that is not empty is one text.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from graftlm.cli.usage import UsageFault
from graftlm.data.checking import Notes, check
from graftlm.data.reading import FORMATS, Table, read_rows
from graftlm.data.recognise import ROLES, TEXT_PAIRS, Reading, recognise
from graftlm.data.wording import clip
from graftlm.errors import DataError, Finding, half_character

__all__ = ["data_settings", "prompts_of", "read_data_settings", "read_mapping", "texts_of"]

#: The flag whose values `read_data_settings` reads.
data_settings = click.option(
    "--set", "sets", multiple=True, metavar="NAME=VALUE",
    help="How the rows are read: data.format, drop_bad_rows, merge_labels, group, template.",
)  # fmt: skip


def read_mapping(text: str | None) -> dict[str, str] | None:
    """Role to column out of `role=column,role=column`. Raises SettingsError as for the flag of `train`."""
    if text is None:
        return None
    from graftlm.settings import resolve

    return dict(resolve(flags={"map": text}).settings.data.map)


def read_data_settings(sets: Sequence[str]) -> dict[str, Any]:
    """The settings of rows that a comparison takes, out of texts `data.name=value`.

    Raises SettingsError as for `--set` of `train`, UsageFault for settings that a comparison does not take.
    """
    from graftlm.comparison.settings import OF_DATA
    from graftlm.settings import resolve

    settings = resolve(sets=sets).settings if sets else None
    names = [text.partition("=")[0].strip() for text in sets]
    if strange := [name for name in names if name.removeprefix("data.") not in OF_DATA]:
        taken = ", ".join(f"data.{name}" for name in OF_DATA)
        raise UsageFault(Finding("L103", f"--set takes {taken} here, not {', '.join(strange)}"))
    keys = [name.removeprefix("data.") for name in names]
    return {key: getattr(settings.data, key) for key in keys} if settings is not None else {}


def texts_of(words: Sequence[str], *, mapping: dict[str, str] | None, asked: str) -> list[str | tuple[str, str]]:
    """The texts to label, or pairs of texts where the file has those.

    Args:
        words: one file, `-` for standard input, or the texts themselves; none means standard input.
        mapping: may name the column `text` of the file.
        asked: a command to paste, for the error where there is nothing.

    Raises:
        UsageFault, DataError: nothing to read, a file that is not there, rows without text.
    """
    path = _file_among(words)
    if path is None:
        return [*_given(words, asked)]
    if FORMATS.get(path.suffix.lower()) == "text" and mapping is None:
        return [*_lines(path)]
    table = read_rows(path)
    return _texts(table, mapping)


def prompts_of(words: Sequence[str], file: str | None, *, asked: str) -> list[Any]:
    """The prompts to answer: texts, or lists of messages where the file has conversations."""
    if file is None:
        return _given(words, asked)
    if words:
        raise UsageFault(Finding("L103", "prompts and --file exclude each other", fix=f"--file {file}"))
    path = Path(file)
    if path.is_file() and FORMATS.get(path.suffix.lower()) == "text":
        return _lines(path)
    table = read_rows(path)
    by_lower = {name.lower(): name for name in table.columns}
    chat = next((by_lower[name] for name in ROLES["messages"] if name in by_lower), None)
    if chat is not None:
        return [_asked(row.get(chat), place) for row, place in zip(table.rows, table.places, strict=True)]
    column = next((by_lower[name] for name in ROLES["prompt"] + ROLES["text"] if name in by_lower), None)
    if column is None and len(table.columns) == 1:
        column = table.columns[0]
    if column is None:
        message = f"no column with prompts among {', '.join(table.columns[:8])}"
        raise DataError(Finding("D110", message, str(path), fix="call the column prompt"))
    return _column(table, column)


def _file_among(words: Sequence[str]) -> Path | None:
    """The one file that `words` name, or None for texts. Raises UsageFault where it is neither clearly."""
    files = [word for word in words if len(word) < 1000 and _is_file(word)]
    if files and len(words) > 1:
        fix = "give one file, or texts only"
        raise UsageFault(Finding("L103", f"{files[0]} is a file, and there is more beside it", fix=fix))
    if len(words) == 1 and words[0].lower().endswith(tuple(FORMATS)) and " " not in words[0]:
        return Path(words[0])  # if it is not there, reading it will name the nearest
    return Path(files[0]) if files else None


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # a text may hold what no path can
        return False


def _given(words: Sequence[str], asked: str) -> list[str]:
    """The texts on the command line or standard input. Raises DataError for one whose bytes are no UTF-8."""
    texts = list(words) if words and list(words) != ["-"] else _lines_of_stdin(asked)
    for at, text in enumerate(texts, start=1):
        if half_character(text):
            raise DataError(Finding("D106", f"not UTF-8: {clip(ascii(text)[1:-1], 40)}", f"text {at}"))
    return texts


def _lines_of_stdin(asked: str) -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageFault(Finding("L106", "no text was given", fix=asked))
    try:
        lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(Finding("D106", f"not UTF-8: {error.reason}", "standard input")) from None
    if not lines:
        raise UsageFault(Finding("L106", "standard input is empty", fix=asked))
    return lines


def _lines(path: Path) -> list[str]:
    text = read_rows(path).rows[0]["text"]  # reads, decodes and refuses as for training
    return [line for line in text.splitlines() if line.strip()]


def _texts(table: Table, mapping: dict[str, str] | None) -> list[str | tuple[str, str]]:
    """The texts of a file, or its pairs; one with labels is understood as in training, the labels are left alone."""
    reading: Reading | None = None
    if mapping is None:
        for task in ("classify", "regress", "tag"):
            with contextlib.suppress(DataError):
                reading = reading or recognise(table, task)
        if reading is None and len(table.columns) == 1:
            return [*_column(table, table.columns[0])]
        both = [pair for pair in TEXT_PAIRS if set(pair) <= set(table.columns)]
        if reading is None and len(both) == 1:
            return [*zip(*(_column(table, name) for name in both[0]), strict=True)]
    elif "text2" in mapping:
        return [*zip(*(_column(table, mapping[role]) for role in ("text", "text2")), strict=True)]
    if reading is None:
        reading = recognise(table, "lm", mapping)
    if reading.task == "tag":
        return [" ".join(map(str, row.get(reading.columns["tokens"]) or [])) for row in table.rows]
    if "text2" in reading.columns:
        return [*zip(*(_column(table, reading.columns[role]) for role in ("text", "text2")), strict=True)]
    return [*_column(table, reading.columns["text"])]


def _column(table: Table, column: str) -> list[str]:
    """The texts of one column. Raises DataError with every row that has none."""
    notes = Notes()
    reading = Reading("lm", "documents", {"text": column}, (), "", table.columns)
    checked = check(table, replace(reading), notes)
    faults = [replace(finding, fix="fill in or remove these rows") for finding in notes.errors]
    if faults:
        raise DataError(faults)
    return [example.texts[0] for example in checked.examples]


def _asked(messages: Any, place: str) -> list[dict[str, str]]:
    """A conversation up to the last question."""
    turns = [_turn(message) for message in messages] if isinstance(messages, list) else []
    while turns and turns[-1] is not None and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or None in turns:
        wanted = 'wanted [{"role": "user", "content": ...}, ...]'
        raise DataError(Finding("D123", f"no conversation with a question; {wanted}", place))
    return [turn for turn in turns if turn is not None]


def _turn(message: Any) -> dict[str, str] | None:
    if not isinstance(message, dict):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content}
