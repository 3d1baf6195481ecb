"""`graftlm methods`: the catalogue of methods, each with its line and its settings."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click

from graftlm.cli.output import print_json, print_table
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding, MethodError, nearest

__all__ = ["verb"]


@click.command(
    "methods",
    cls=Verb,
    arguments=[("NAME", "one method, told of at length")],
    examples=["graftlm methods", "graftlm methods lora", "graftlm methods --json"],
)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(name: str | None, as_json: bool) -> None:
    """List the methods with their settings; a run names one as in --method 'lora(rank=8)+head'."""
    from graftlm.methods import find_method, method_names

    names = method_names()
    if name is not None and name not in names:
        close = nearest(name, names, most=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names)}"
        raise UsageFault(Finding("L103", f"no method {name!r}. {hint}", fix=close[0] if close else ""))
    told: list[dict[str, Any]] = []
    faults: list[Finding] = []
    for key in names if name is None else [name]:
        try:
            told.append(_described(key, find_method(key)))
        except MethodError as error:  # of a package; the others are shown all the same
            faults += error.findings
    if as_json:
        print_json(told)
    elif name is None:
        print_table(
            ["method", "what it does", "settings"],
            [(each["name"], each["line"], _settings_text(each["settings"])) for each in told],
        )
    elif told:
        _tell(told[0])
    if faults:
        raise MethodError(faults)


def _described(name: str, kind: Any) -> dict[str, Any]:
    text = inspect.getdoc(kind) or ""
    head, _, rest = text.partition("\n\n")
    low, high = kind.learning_rate_range
    return {
        "name": name,
        "line": " ".join(head.split()),
        "text": rest.partition("Example:")[0].strip(),
        "settings": {f.name: _default(f) for f in dataclasses.fields(kind)},
        "learning_rate": kind.learning_rate,
        "learning_rate_range": [low, high],
    }


def _default(setting: dataclasses.Field[Any]) -> Any:
    from graftlm.core import Method

    if setting.default is not dataclasses.MISSING:
        value: Any = setting.default
    else:
        value = setting.default_factory() if setting.default_factory is not dataclasses.MISSING else None
    if isinstance(value, Method):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_written(value)}" for key, value in settings.items()) or "none"


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value).replace("'", "")


def _tell(method: dict[str, Any]) -> None:
    low, high = method["learning_rate_range"]
    click.echo(f"{method['name']}: {method['line']}")
    if method["text"]:
        click.echo(f"\n{method['text']}")
    click.echo(f"\nlearning rate {method['learning_rate']:g} (usually {low:g} to {high:g})")
    for key, value in method["settings"].items():
        click.echo(f"  {key} = {_written(value)}")
