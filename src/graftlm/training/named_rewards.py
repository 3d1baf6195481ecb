"""Rewards by name: what can be told of one without running any code, and without torch."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path

from graftlm.errors import Finding, SettingsError

__all__ = ["is_check", "look_at_reward", "wrong_reward"]

_FIX = "--reward 'regex:^Yes', match:COLUMN, FILE.py:FUNCTION or model:FOLDER"


def is_check(text: str | None) -> bool:
    """Whether the reward is a check that runs no code and reads no other model."""
    return text is not None and text.startswith(("regex:", "match:"))


def look_at_reward(text: str | None, columns: Sequence[str] | None = None) -> None:
    """Raise SettingsError (U140) where `text` names no reward that can be had; no code is run.

    `columns` are those of the rows, where they are known.

    Example:
        >>> look_at_reward("regex:^Yes")
    """
    kind, _, rest = (text or "").partition(":")
    if text is None:
        raise wrong_reward("no reward is given: what is a good answer?")
    if kind == "python":  # a function that was given in Python
        return
    if kind == "regex" and rest:
        try:
            re.compile(rest)
        except re.error as error:
            raise wrong_reward(f"{rest!r} is no regular expression: {error}") from None
    elif kind == "match" and rest:
        if columns is not None and rest not in columns:
            raise wrong_reward(f"match:{rest}: the rows have no such column, only {', '.join(columns)}")
    elif kind == "model" and rest:
        _look_at_model(Path(rest).expanduser())
    else:
        place, colon, name = text.rpartition(":")
        if not colon or not place.endswith(".py"):
            raise wrong_reward(f"{text!r} is no reward")
        _look_at_function(Path(place).expanduser(), name)


def _look_at_model(folder: Path) -> None:
    for place in (folder / "run.json", folder / "adapter_config.json"):
        if place.is_file():
            break
    else:
        raise wrong_reward(f"{folder} holds no run and no adapter")
    if place.name == "run.json":
        try:
            learnt = json.loads(place.read_text(encoding="utf-8")).get("task")
        except (OSError, ValueError, AttributeError):
            return  # told when it is opened
        if learnt is not None and learnt != "reward":
            raise wrong_reward(f"{folder} learnt {learnt}, not reward")


def _look_at_function(path: Path, name: str) -> None:
    if not path.is_file():
        raise wrong_reward(f"there is no file {path}")
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise wrong_reward(f"{path} is no Python: {error}") from None
    functions = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    # Names may also come by an import, an assignment or inside an `if`: only what names none at all is wrong.
    names = {node.id for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)} | set(functions)
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
    if name not in names and "*" not in names:
        there = ", ".join(sorted(each for each in functions if not each.startswith("_")))
        raise wrong_reward(f"{path} has no function {name!r}, only {there or 'none'}")


def wrong_reward(message: str) -> SettingsError:
    """The error for a reward that cannot be had."""
    return SettingsError(Finding("U140", message, fix=_FIX))
