"""The flags of a run, which every verb has that reads its settings, and the settings that they say."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from graftlm.cli.usage import UsageFault
from graftlm.errors import Finding, SettingsError
from graftlm.settings import FLAGS, Attempted, Flag, Resolved, attempt

__all__ = ["attempted_from", "resolved_from", "run_flags"]

_METAVARS = {"a number": "NUMBER", "a whole number": "COUNT", "a file": "FILE", "name=value": "NAME=VALUE"}

_PAIRS = {"map": "ROLE=COLUMN", "max_memory": "DEVICE=SIZE"}


def _option(flag: Flag) -> Callable[[Any], Any]:
    """The click option (or argument) for one flag; its value stays text, `resolve` reads and checks it."""
    if flag.is_argument:
        return click.argument(flag.key, required=False, metavar=f"[{flag.names[0]}]")
    if flag.kind == "true or false":
        return click.option(*flag.names, flag.key, flag_value="true", is_flag=True, default=None, help=flag.help)
    text = flag.help + (f": {', '.join(flag.choices)}" if flag.choices else "")
    metavar = "NAME" if flag.choices else _METAVARS.get(flag.kind, _PAIRS.get(flag.key, "TEXT"))
    return click.option(*flag.names, flag.key, metavar=metavar, multiple=flag.repeatable, help=text)


def run_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb all flags of a run; their values stay text, for `resolved_from` to read."""
    for flag in reversed(FLAGS):
        function = _option(flag)(function)
    return function


def resolved_from(config: str | None, sets: tuple[str, ...], flags: dict[str, str | None]) -> Resolved:
    """The settings that flags and run file say. Raises SettingsError; UsageFault for a run file in data's place."""
    attempted = attempted_from(config, sets, flags)
    if attempted.findings:
        raise SettingsError(attempted.findings)
    return attempted.resolved


def attempted_from(config: str | None, sets: tuple[str, ...], flags: dict[str, str | None]) -> Attempted:
    """The settings that flags and run file say, with their faults. Raises UsageFault for a run file in data's place."""
    data = flags["data"]
    if data is not None and data.lower().endswith((".yaml", ".yml")):
        raise UsageFault(Finding("L104", f"{data} looks like a run file, not like data", fix=f"-c {shlex.quote(data)}"))
    given = {key: value for key, value in flags.items() if value is not None}
    return attempt(Path(config) if config is not None else None, given, sets)
