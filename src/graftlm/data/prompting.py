"""Writes rows as questions by a prompt template (`{sentence} Sentiment:`), and their labels as words.

The table keeps its columns and gets those of a task that is known: `prompt` with `choices` and `answer` where labels
are chosen among as words (rank classification; Liu et al. 2022, section 3.1), with `completion` where they are written,
or `prompt` in place of the text where a head tells them. What follows knows nothing of templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftlm.data.checking import Faults, Notes
from graftlm.data.labels import Labels, label_name
from graftlm.data.reading import Rejected, Row, Table
from graftlm.data.recognise import ROLES, recognise
from graftlm.data.wording import listed
from graftlm.errors import DataError, Finding, nearest

__all__ = ["PromptTemplate", "prompted"]

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_CHOSEN, _WRITTEN, _BY_HEAD = ("choice", "tfew"), ("sft", "seq2seq"), ("classify", "regress", "lm", "mlm")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with columns in braces (`{{` and `}}` are braces of the text); `words`: labels and what is said of each.

    Example:
        >>> asked = PromptTemplate("{sentence} Sentiment:", {"0": "negative", "1": "positive"})
        >>> asked.fields, asked.written({"sentence": "A joy."})
        (('sentence',), 'A joy. Sentiment:')
    """

    text: str
    words: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = []
        lone = next((found[0] for found in _FIELD.finditer(self.text) if found[0] in ("{", "}")), None)
        if lone:
            faults.append(f"the prompt has a single '{lone}'; a brace of the text is written twice")
        elif not self.fields:
            faults.append("the prompt names no column: write one in braces, such as {sentence}")
        elif "" in self.fields:
            faults.append("the prompt has braces without the name of a column")
        twice = sorted({word for word in self.words.values() if list(self.words.values()).count(word) > 1})
        if twice:
            faults.append(f"labels with the same word: {listed(map(repr, twice))}")
        if any(not word.strip() for word in self.words.values()):
            faults.append("a label with an empty word")
        if faults:
            raise DataError([Finding("D166", fault) for fault in faults])

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that it names, each once."""
        return tuple(dict.fromkeys(found[1].strip() for found in _FIELD.finditer(self.text) if found[1] is not None))

    def written(self, row: Mapping[str, Any]) -> str:
        """The text with the row's values; every field must be there."""

        def fill(found: re.Match[str]) -> str:
            return found[0][0] if found[1] is None else str(row[found[1].strip()])

        return _FIELD.sub(fill, self.text)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `PromptTemplate(**...)` reads it."""
        return {"text": self.text, "words": dict(self.words)}


def prompted(
    table: Table,
    asked: PromptTemplate,
    task: str,
    mapping: Mapping[str, str],
    notes: Notes,
    *,
    drop_bad_rows: bool = False,
    instead: Mapping[str, str] | None = None,
    by_head: bool = False,
    may_be_empty: bool = False,
) -> tuple[Table, str, dict[str, str], PromptTemplate]:
    """The table with prompts, the task and the mapping that are then right, and the template with all of its words.

    `auto` is `choice` where labels have words (`classify` with `by_head`, as encoders have it, and what stands
    `instead` of `sft` on an encoder-decoder), else what the other columns are good for: `classify` with a label,
    `sft` with a completion, `lm` with neither. For `choice`, `tfew`, `sft` and `seq2seq` labels without words are said
    as they are. Faulty rows go to `notes`, or with `drop_bad_rows` to `Table.rejected`; that all are is an error (D104)
    unless the table `may_be_empty`.

    Raises:
        DataError: D166 a column that is not there; D110 to D112 as `recognise` does for labels and completions.
    """
    strange = [name for name in asked.fields if name not in table.columns]
    if strange:
        close = nearest(strange[0], table.columns, most=1)
        message = f"the prompt names {listed(map(repr, strange))}; columns: {listed(table.columns)}"
        fix = f"{{{close[0]}}} instead of {{{strange[0]}}}" if close else ""
        raise DataError(Finding("D166", message, table.path.name, fix))
    given = {role: column for role, column in mapping.items() if role not in ("text", "text2", "prompt")}
    have = {name.strip().lower() for name in table.columns if name not in asked.fields}
    labelled = "label" in given or any(name in have for name in ROLES["label"])
    answered = "completion" in given or any(name in have for name in ROLES["completion"])
    if task == "auto":
        if asked.words and not by_head:
            task = (instead or {}).get("sft", "choice")
        else:
            task = "classify" if labelled else "sft" if answered else "lm"
            task = (instead or {}).get(task, task)
    if task in _CHOSEN or (task in _WRITTEN and (asked.words or not answered)):
        reading = recognise(table, "classify", {"text": asked.fields[0], **given})
        return _with_words(table, asked, task, reading.columns["label"], notes, drop_bad_rows, may_be_empty)
    role = "text" if task in _BY_HEAD else "prompt"
    made, _ = _with_prompts(table, asked, None, notes, drop_bad_rows, may_be_empty)
    return made, task, given | {role: "prompt"}, asked


def _with_words(
    table: Table,
    asked: PromptTemplate,
    task: str,
    label: str,
    notes: Notes,
    drop_bad_rows: bool,
    may_be_empty: bool,
) -> tuple[Table, str, dict[str, str], PromptTemplate]:
    if not asked.words:
        names = Labels.of(row[label] for row in table.rows if _is_label(row.get(label))).names
        asked = replace(asked, words={name: name for name in names})
    made, labels = _with_prompts(table, asked, label, notes, drop_bad_rows, may_be_empty)
    words = list(asked.words.values())
    rows: list[Row] = []
    for row, name in zip(made.rows, labels, strict=True):
        word = asked.words[name]
        rows.append({**row, **({"completion": word} if task in _WRITTEN else {"choices": words, "answer": word})})
    added = ("completion",) if task in _WRITTEN else ("choices", "answer")
    columns = tuple(dict.fromkeys((*made.columns, *added)))
    mapping = {"prompt": "prompt"} | {name: name for name in added}
    return replace(made, rows=rows, columns=columns), task, mapping, asked


def _with_prompts(
    table: Table, asked: PromptTemplate, label: str | None, notes: Notes, drop_bad_rows: bool, may_be_empty: bool
) -> tuple[Table, list[str]]:
    """The sound rows with `prompt` filled in, and their labels by name, where `label` says in which column they are."""
    faults = Faults()
    rows: list[Row] = []
    places: list[str] = []
    labels: list[str] = []
    rejected = list(table.rejected)
    for at, (row, place) in enumerate(zip(table.rows, table.places, strict=True), 1):
        for name in asked.fields:
            value = row.get(name)
            if value is None:
                faults.add(at, "D120", f"null '{name}'" if name in row else f"no '{name}'")
            elif isinstance(value, (list, dict)):
                faults.add(at, "D121", f"{'a list' if isinstance(value, list) else 'an object'} in '{name}'")
            elif not str(value).strip():
                faults.add(at, "D122", f"empty '{name}'")
        name = ""
        if label is not None and not _is_label(row.get(label)):
            faults.add(at, "D120", f"no label in '{label}'")
        elif label is not None:
            name = label_name(row[label])
            if name not in asked.words:
                faults.add(at, "D167", f"a label without a word, '{name[:40]}'; words: {listed(asked.words, 4)}")
        if at in faults.reasons:
            rejected.append(Rejected(place, at, faults.reasons[at], row))
            continue
        rows.append({**row, "prompt": asked.written(row)})
        places.append(place)
        labels.append(name)
    if not drop_bad_rows:
        faults.report(notes, table.path.name)
        notes.settle()
    if not rows and not may_be_empty:
        raise DataError(Finding("D104", f"no row is left: all {len(rejected)} are faulty", table.path.name))
    columns = tuple(dict.fromkeys((*table.columns, "prompt")))
    return replace(table, rows=rows, places=places, rejected=rejected, columns=columns), labels


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int)) and bool(str(value).strip())
