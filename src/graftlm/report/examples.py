"""Predictions worth a look: a few right ones, and every kind of wrong one with an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .folder import RunFolder, finite
from .wording import as_text, clip

__all__ = ["Example", "Mistake", "commonest_confusions", "mistakes", "right_ones"]

_TEXT_SHOWN = 400


@dataclass(frozen=True)
class Example:
    """One predicted row; `probability` is that of the predicted label."""

    place: str
    text: str
    label: str
    predicted: str
    probability: float | None


@dataclass(frozen=True)
class Mistake:
    """Rows of one label that were given one other label: how many, and the one that was most surely wrong."""

    count: int
    example: Example


def _example(row: dict[str, Any]) -> Example:
    place = as_text(row.get("place")) or f"row {as_text(row.get('row'))}"
    text = clip(as_text(row.get("text")), _TEXT_SHOWN)
    return Example(
        place, text, as_text(row.get("label")), as_text(row.get("predicted")), finite(row.get("probability"))
    )


def _sureness(row: dict[str, Any]) -> float:
    return finite(row.get("probability")) or 0.0


def right_ones(run: RunFolder, most: int = 4) -> tuple[int, list[Example]]:
    """How many are right, and some of them from the surest to the least sure."""
    right = [row for row in run.predictions if row.get("label") == row.get("predicted")]
    right.sort(key=_sureness, reverse=True)
    if len(right) > most:
        spread = [right[round(index * (len(right) - 1) / (most - 1))] for index in range(most)]
    else:
        spread = right
    return len(right), [_example(row) for row in spread]


def mistakes(run: RunFolder) -> list[Mistake]:
    """Every kind of mistake, the commonest first."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.predictions:
        label, predicted = as_text(row.get("label")), as_text(row.get("predicted"))
        if label != predicted:
            kinds.setdefault((label, predicted), []).append(row)
    ordered = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    return [Mistake(len(rows), _example(max(rows, key=_sureness))) for _, rows in ordered]


def commonest_confusions(
    labels: Sequence[str], table: Sequence[Sequence[int]], most: int = 20
) -> list[tuple[int, str, str]]:
    """(times, label, predicted) off the diagonal of a confusion table, the commonest first.

    Example:
        >>> commonest_confusions(["a", "b"], [[3, 1], [0, 4]])
        [(1, 'a', 'b')]
    """
    found = [
        (times, labels[row], labels[column])
        for row, counts in enumerate(table)
        for column, times in enumerate(counts)
        if row != column and times
    ]
    return sorted(found, key=lambda item: (-item[0], item[1], item[2]))[:most]
