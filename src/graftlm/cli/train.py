"""`graftlm train`: settings out of flags and a run file, one run, and where its report is."""

from __future__ import annotations

import json
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
    arguments=[("DATA", "file with the rows (CSV, TSV, JSONL, JSON, Parquet, text), bundled:messages or bundled:answers")],
    examples=[
        "graftlm train tickets.csv",
        "graftlm train faq.jsonl -m models/qwen --method 'lora(rank=8)' --epochs 2 -o runs/faq",
        "graftlm train -c run.yaml --set train.warmup=0.1",
        "graftlm train -o runs/faq --resume",
    ],
)
@_flags
@click.option("--resume", is_flag=True, help="Go on with the run in the folder -o that was stopped.")
@click.pass_obj
def verb(command: str, resume: bool, config: str | None, set: tuple[str, ...], **flags: str | None) -> None:
    """Train an adapter on DATA and report how well it does beside the untouched base.

    What is learnt goes by the columns: text and label make a classifier, prompt and completion (or messages) an
    assistant, text alone a writer in that style. Everything that is not given is decided and written down.
    """
    resolved = _resolved(resume, config, set, flags)
    from graftlm.training import train_resolved

    run = train_resolved(resolved, resume=resume, command=command)
    folder = Path(run.folder)
    task = run.task if hasattr(run, "task") else None
    following = "predict" if task == "classify" else "chat"
    report = folder / "report.html"
    if report.is_file():
        click.echo(f"report   {report}")
    click.echo(f"next     graftlm {following} {shlex.quote(str(folder))}")


def _resolved(resume: bool, config: str | None, sets: tuple[str, ...], flags: dict[str, str | None]) -> Resolved:
    data, out = flags["data"], flags["out"]
    if data is not None and data.lower().endswith((".yaml", ".yml")):
        raise UsageFault(Finding("L104", f"{data} looks like a run file, not like data", fix=f"-c {shlex.quote(data)}"))
    given = {key: value for key, value in flags.items() if value is not None}
    if resume and out is None and config is None:
        raise UsageFault(Finding("L103", "--resume needs the folder of the run", fix="--resume -o runs/NAME"))
    if resume and config is None and not sets and given.keys() == {"out"}:
        return resolve(python=_settings_of(Path(str(out))) | {"output": out})
    return resolve(Path(config) if config is not None else None, given, sets)


def _settings_of(folder: Path) -> dict[str, Any]:
    """The settings that the run in `folder` was given, so that resuming needs no flag but the folder."""
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        message = f"nothing to resume: {folder} has no run.json"
        raise UsageFault(Finding("L104", message, fix=f"graftlm train DATA -o {folder}")) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder / 'run.json'} cannot be read ({type(error).__name__})"
        raise UsageFault(Finding("L104", message, fix=f"graftlm train DATA -o {folder}-2")) from None
    return dict(settings)
