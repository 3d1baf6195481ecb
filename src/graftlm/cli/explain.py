"""`graftlm explain`: what the code of an error means, and what is said with it.

The meanings are the rooms' `CODES`; they, the kind of error and the messages are read off the package's source, so
that nothing heavy is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click

import graftlm.errors as errors
from graftlm.cli.output import print_json, print_table
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding, GraftError, nearest

__all__ = ["Code", "known_codes", "verb"]

_CODE = re.compile(r"[A-Z]\d{3}")
_FAMILY = re.compile(r"Codes ([A-Z]\d)xx")


@dataclass(frozen=True)
class Code:
    """A code: its meaning in one line, its kind of error, the messages it comes with."""

    code: str
    meaning: str
    kind: str
    messages: tuple[str, ...]


@click.command(
    "explain",
    cls=Verb,
    arguments=[("CODE", "such as D111, as it stands in square brackets behind a message; without one, all are listed")],
    examples=["graftlm explain D111", "graftlm explain --json"],
)
@click.argument("code", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(code: str | None, as_json: bool) -> None:
    """Say what the code of an error means."""
    known = known_codes()
    if code is None:
        if as_json:
            print_json({name: found.meaning for name, found in known.items()})
        else:
            print_table(["code", "meaning"], [(name, found.meaning) for name, found in known.items()])
        return
    name = code.strip("[] ").upper()
    if name not in known:
        close = nearest(name, known, most=1)
        hint = f". Did you mean {close[0]}?" if close else ""
        raise UsageFault(Finding("L103", f"there is no code {code!r}{hint}", fix="graftlm explain"))
    found = known[name]
    if as_json:
        print_json({"code": name, "meaning": found.meaning, "kind": found.kind, "messages": list(found.messages)})
        return
    click.echo(f"{name}  {found.meaning}")
    if found.kind:
        click.echo(f"  {found.kind}")
    for message in found.messages[:6]:
        click.echo(f"  says: {message}")


@cache
def known_codes() -> dict[str, Code]:
    """Every code, in order."""
    families = dict(_families())
    meanings: dict[str, str] = {}
    messages: dict[str, list[str]] = {}
    for tree in _sources():
        meanings.update(_listed(tree))
        for code, message in _said(tree):
            messages.setdefault(code, [])
            if message and message not in messages[code]:
                messages[code].append(message)
    found = {}
    for code in sorted(meanings):
        kind = families.get(code[:2], families.get(code[0], ""))
        found[code] = Code(code, meanings[code], kind, tuple(messages.get(code, ())))
    return found


def _families() -> Iterator[tuple[str, str]]:
    """The first two characters of a code with what that kind of error is, from the errors' own words."""
    for kind in (*vars(errors).values(), UsageFault):
        if isinstance(kind, type) and issubclass(kind, GraftError) and kind is not GraftError:
            text = " ".join((kind.__doc__ or "").split())
            for family in _FAMILY.findall(text):
                meaning = _FAMILY.sub("", text).strip(" .")
                yield family, meaning
                yield family[0], meaning


def _sources() -> Iterator[ast.Module]:
    """The package's modules that speak of codes; read, not imported, so that nothing heavy is."""
    for file in sorted(Path(errors.__file__).parent.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if _CODE.search(text):
            yield ast.parse(text)


def _listed(tree: ast.Module) -> dict[str, str]:
    """The `CODES` of one module."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(name, ast.Name) and name.id == "CODES" for name in targets):
            assert isinstance(node, (ast.Assign, ast.AnnAssign))
            if isinstance(node.value, ast.Dict):
                return dict(ast.literal_eval(node.value))
    return {}


def _said(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every call that gives a code first, with its message; what is filled in is shown as `...`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            code = node.args[0].value
            if isinstance(code, str) and _CODE.fullmatch(code):
                yield code, _message(node.args[1]) if len(node.args) > 1 else ""


def _message(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return ""
