"""Which predictions are shown: the surest of each kind of mistake, the commonest kind first; right ones spread out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlm.report.examples import mistakes, right_ones
from graftlm.report.folder import RunFolder


def row(number: int, label: str, predicted: str, probability: float) -> dict[str, Any]:
    return {"row": number, "text": "t", "label": label, "predicted": predicted, "probability": probability}


def test_one_of_each_kind_of_mistake() -> None:
    rows = [row(0, "a", "b", 0.9), row(1, "b", "a", 0.5), row(2, "b", "a", 0.8), row(3, "b", "a", 0.6)]
    found = mistakes(RunFolder(Path(), {}, predictions=[*rows, row(4, "a", "a", 1.0)]))
    assert [(kind.count, kind.example.place) for kind in found] == [(3, "row 2"), (1, "row 0")]


def test_right_ones_reach_from_the_surest_to_the_least_sure() -> None:
    rows = [row(n, "a", "a", n / 10) for n in range(10)]
    count, shown = right_ones(RunFolder(Path(), {}, predictions=[*rows, row(10, "a", "b", 1.0)]))
    assert count == 10
    assert [example.place for example in shown] == ["row 9", "row 6", "row 3", "row 0"]
    assert right_ones(RunFolder(Path(), {}, predictions=rows[:2]))[0] == 2
