"""`graftlm train`: settings out of flags and a run file, one run, and where its report is."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding
from graftlm.settings import FLAGS, Flag, Resolved, resolve

__all__ = ["verb"]

_METAVARS = {"a number": "NUMBER", "a whole number": "COUNT", "a file": "FILE", "name=value": "NAME=VALUE"}


def _option(flag: Flag) -> Callable[[Any], Any]:
    """The click option (or argument) for one flag; its value stays text, `resolve` reads and checks it."""
    if flag.is_argument:
        return click.argument(flag.key, required=False, metavar=f"[{flag.names[0]}]")
    text = flag.help + (f": {', '.join(flag.choices)}" if flag.choices else "")
    metavar = "NAME" if flag.choices else _METAVARS.get(flag.kind, "ROLE=COLUMN" if flag.key == "map" else "TEXT")
    return click.option(*flag.names, flag.key, metavar=metavar, multiple=flag.repeatable, help=text)


def _flags(function: Callable[..., Any]) -> Callable[..., Any]:
    for flag in reversed(FLAGS):
        function = _option(flag)(function)
    return function


@click.command(
    "train",
    cls=Verb,
    arguments=[
        ("DATA", "file with the rows (CSV, TSV, JSONL, JSON, Parquet, text), bundled:messages or bundled:answers")
    ],
    examples=[
        "graftlm train tickets.csv",
        "graftlm train faq.jsonl -m models/qwen --method 'lora(rank=8)' --epochs 2 -o runs/faq",
        "graftlm train -c run.yaml --set train.warmup=0.1",
        "graftlm train -o runs/faq --resume",
    ],
)
@_flags
@click.option(
    "--resume", is_flag=True, help="Go on with the stopped run in the folder -o; its own settings need not be repeated."
)
@click.pass_obj
def verb(command: str, /, resume: bool, config: str | None, set: tuple[str, ...], **flags: str | None) -> None:
    """Train an adapter on DATA and report how well it does beside the untouched base.

    What is learnt goes by the columns: text and label make a classifier, prompt and completion (or messages) an
    assistant, text alone a writer in that style. Everything that is not given is decided and written down.
    """
    resolved = _resolved(config, set, flags)
    from graftlm.training import train_resolved

    run = train_resolved(resolved, resume=resume, command=command)
    folder = shlex.quote(str(run.folder))
    if run.record.get("status") == "stopped":
        click.echo(f"next     graftlm train -o {folder} --resume")
    elif run.record.get("task") == "classify":
        click.echo(f"next     graftlm predict {folder} TEXT")
    else:
        click.echo(f"next     graftlm chat {folder} --vs base")


def _resolved(config: str | None, sets: tuple[str, ...], flags: dict[str, str | None]) -> Resolved:
    data = flags["data"]
    if data is not None and data.lower().endswith((".yaml", ".yml")):
        raise UsageFault(Finding("L104", f"{data} looks like a run file, not like data", fix=f"-c {shlex.quote(data)}"))
    given = {key: value for key, value in flags.items() if value is not None}
    return resolve(Path(config) if config is not None else None, given, sets)
