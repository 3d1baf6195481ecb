"""Every code of an error has one meaning, in one room, and every meaning has a code that is said."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import graftlm

SRC = Path(graftlm.__file__).parent
CODE = re.compile(r"[A-Z]\d{3}")


def assigned_name(node: ast.stmt) -> str:
    """The name that a statement gives a value to, if it is one plain name."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else ""


def said_in(tree: ast.Module) -> set[str]:
    """Every code in the code of a module; its tables of codes, and what docstrings tell of, do not count."""
    return {
        node.value
        for statement in tree.body
        if assigned_name(statement) not in ("CODES", "WAIVABLE")
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value)
    }


def listed_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The entries of a module's CODES; one that is written twice comes twice."""
    for statement in tree.body:
        if assigned_name(statement) == "CODES":
            assert isinstance(statement, ast.Assign | ast.AnnAssign)
            assert isinstance(statement.value, ast.Dict), "CODES is written out, so that it can be read off the source"
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                assert key is not None
                yield ast.literal_eval(key), ast.literal_eval(value)


def trees() -> list[ast.Module]:
    return [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SRC.rglob("*.py"))]


def test_every_code_has_its_meaning_in_exactly_one_room() -> None:
    said = {code for tree in trees() for code in said_in(tree)}
    listed = Counter(code for tree in trees() for code, _ in listed_in(tree))
    assert len(said) > 150
    assert {code for code, times in listed.items() if times > 1} == set(), "in two lists"
    assert said - listed.keys() == set(), "said, without a meaning"
    assert listed.keys() - said == set(), "with a meaning, never said"


def test_every_room_that_reports_keeps_its_list_in_sight() -> None:
    """One CODES a room: what a room's sources list is in one module of it."""
    lists = Counter(
        file.relative_to(SRC).parts[0] for file in SRC.rglob("*.py") if any(listed_in(ast.parse(file.read_text())))
    )
    assert set(lists.values()) == {1}
    assert lists.keys() >= {"core", "data", "formats", "methods", "models", "report", "settings", "training", "cli"}


def test_meanings_are_one_plain_line_each() -> None:
    meanings = [meaning for tree in trees() for _, meaning in listed_in(tree)]
    assert all(re.fullmatch(r"[a-zA-Z-][^\n]{10,110}[^.\s]", meaning) for meaning in meanings)
    assert {meaning for meaning, times in Counter(meanings).items() if times > 1} == set(), "two codes for one fault"


def test_a_code_without_a_meaning_is_seen() -> None:
    tree = ast.parse('CODES: dict[str, str] = {"X101": "one", "X101": "two"}\nraise E(Finding("X102", "..."))')
    assert said_in(tree) == {"X102"}
    assert [code for code, _ in listed_in(tree)] == ["X101", "X101"]
