"""What a data file is to a run: task, columns, lengths, labels, duplicates, and two rows with what is trained."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from graftlm.cli.output import colourful, harmless, print_table
from graftlm.data.checking import Notes, check
from graftlm.data.labels import label_name
from graftlm.data.prepare import Prepared, hold_out, prepare
from graftlm.data.reading import Table, read_rows
from graftlm.data.recognise import recognise
from graftlm.data.wording import clip, counted, number, percent
from graftlm.errors import GraftError

__all__ = ["describe_data", "show_data"]

_SHOWN_PAIRS = 20
_PIECE = 200  # characters of a run of tokens that are shown
_TRAINED, _PLAIN = "\x1b[32m", "\x1b[0m"


def describe_data(
    path: Path,
    *,
    task: str,
    model: str,
    mapping: Mapping[str, str] | None,
    max_length: int | None,
    eval_path: Path | None = None,
) -> tuple[dict[str, Any], GraftError | None]:
    """What there is to say of the file, as plain JSON, and the error that training on it would stop with, if any.

    Raises:
        DataError: the file cannot be read or its columns are not understood, so that there is nothing to tell.
        ModelError: no such `model`.
    """
    table = read_rows(path)
    reading = recognise(table, task, mapping)
    found: dict[str, Any] = {
        "kind": "data",
        "path": str(path),
        "format": table.format,
        "sha256": table.sha256,
        "rows": len(table),
        "columns": list(table.columns),
        "task": reading.task,
        "roles": reading.columns,
        "unused": list(reading.unused),
    }
    try:
        prepared = prepare(
            path, mapping=mapping, task=task, eval_share=0, tokenizer=_tokenizer(model), max_length=max_length
        )
    except GraftError as error:
        labels = _counts(table, reading.columns.get("label"))
        return found | {"labels": labels, "faults": [_plain(f) for f in error.findings]}, error
    return found | _told(prepared, table) | _alike(prepared, table, eval_path), None


def show_data(found: Mapping[str, Any]) -> None:
    """Print what `describe_data` gave."""
    roles = " ".join(f"{role}={column}" for role, column in found["roles"].items())
    unused = f"  (not used: {', '.join(found['unused'])})" if found["unused"] else ""
    click.echo(harmless(f"data     {found['path']}  {found['format']}  {counted(found['rows'], 'row')}"))
    click.echo(harmless(f"task     {found['task']}  {roles}{unused}"))
    if "tokens" in found:
        tokens = found["tokens"]
        click.echo(
            f"tokens   {tokens['shortest']} to {tokens['longest']} a row, median {tokens['median']}, "
            f"95 % up to {tokens['p95']}; {number(found['cut_rows'])} cut, {counted(found['duplicates'], 'duplicate')}"
        )
        click.echo(harmless(found["loss_on"].replace("loss on", "loss on ", 1)))
    if near := found.get("near_duplicates"):
        such = f", such as {near['pairs'][0][1]} of {near['pairs'][0][0]}" if near["pairs"] else ""
        click.echo(f"alike    {counted(near['rows'], 'row')} nearly the same as an earlier one{such}")
    if leak := found.get("leakage"):
        where = harmless(leak["eval"])
        click.echo(
            f"leakage  of {counted(leak['rows'], 'row')} ({where}) {number(leak['same'])} also in train, "
            f"{number(leak['near'])} nearly so"
        )
    for note in found.get("notes", []):
        click.echo(harmless(f"note     {note['place']} {note['message']} [{note['code']}]".replace("     [", " [")))
    if found.get("labels"):
        click.echo()
        rows = [(name, number(rows), percent(rows, found["rows"])) for name, rows in found["labels"].items()]
        print_table(["label", "rows", "share"], rows, right=(1, 2))
    for at, example in enumerate(found.get("examples", []), 1):
        click.echo(f"\nexample {at}")
        click.echo(_shown(example))


def _tokenizer(model: str) -> Any:
    from graftlm.models import load_tokenizer, resolve_base

    return load_tokenizer(resolve_base(model))


def _told(prepared: Prepared, table: Table) -> dict[str, Any]:
    lengths = sorted(prepared.supervision.lengths)
    label = prepared.reading.columns.get("label")
    shown: list[Any] = [
        [{"text": text, "trained": trained} for text, trained in pieces] for pieces in prepared.supervision.examples
    ]
    return {
        "tokens": {
            "total": prepared.supervision.total_tokens,
            "trained": prepared.supervision.trained_tokens,
            "shortest": lengths[0],
            "median": round(median(lengths)),
            "p95": round(quantiles(lengths, n=20)[-1]) if len(lengths) > 1 else lengths[0],
            "longest": lengths[-1],
        },
        "loss_on": prepared.supervision.line,
        "cut_rows": prepared.supervision.cut_rows,
        "duplicates": _duplicates(prepared),
        "labels": _counts(table, label),
        "notes": [_plain(note) for note in prepared.notes],
        "examples": shown,
        "faults": [],
    }


def _alike(prepared: Prepared, table: Table, eval_path: Path | None) -> dict[str, Any]:
    """Rows that are nearly the same, and rows held out (those of a file, or as train would) that train has too."""
    from graftlm.data.near import near_duplicates

    examples = list({item["row"]: item["example"] for item in prepared.train}.values())
    pairs = near_duplicates([example.key for example in examples])
    told: dict[str, Any] = {
        "near_duplicates": {
            "rows": len(pairs),
            "pairs": [[examples[one].row, examples[other].row] for one, other in pairs[:_SHOWN_PAIRS]],
        }
    }
    if eval_path is not None:
        notes = Notes()
        held = check(read_rows(eval_path), prepared.reading, notes, is_eval=True).examples
        notes.settle()
        train, name = examples, str(eval_path)
    else:
        train, held = hold_out(examples, prepared.reading, None, 0, Notes(), table.path.name)
        name = "as train holds them out"
    known = {example.key for example in train}
    both = near_duplicates([example.key for example in (*train, *held)])
    same = sum(example.key in known for example in held)
    near = sum(one < len(train) <= other for one, other in both)
    told["leakage"] = {"eval": name, "rows": len(held), "same": same, "near": near}
    return told


def _duplicates(prepared: Prepared) -> int:
    keys = {item["row"]: item["example"].key for item in prepared.train}
    return len(keys) - len(set(keys.values()))


def _counts(table: Table, label: str | None) -> dict[str, int] | None:
    """Rows of each label, the commonest first; a row with several labels counts for each."""
    if label is None:
        return None
    count: Counter[str] = Counter()
    for row in table.rows:
        value = row.get(label)
        several = value if isinstance(value, list) else [value]
        count.update({"(none)" if one in (None, "") else label_name(one) for one in several or [None]})
    return dict(count.most_common())


def _plain(finding: Any) -> dict[str, str]:
    return {"code": finding.code, "place": finding.place, "message": finding.message, "fix": finding.fix}


def _shown(example: Any) -> str:
    """A row with what is trained in colour on a terminal, in double brackets elsewhere."""
    left, right = (_TRAINED, _PLAIN) if colourful(sys.stdout) else ("[[", "]]")
    pieces = [(harmless(clip(piece["text"], _PIECE)), piece["trained"]) for piece in example]
    return "  " + "".join(f"{left}{text}{right}" if trained else text for text, trained in pieces)
