"""A run folder as it was found: `run.json` and the optional files beside it, read without trust in their shape.

Whatever is absent or of another type than expected is left out, so that the report of a run that was stopped or that
failed can still be written. Only a folder without a readable `run.json` is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Finding, RunError

__all__ = ["CODES", "RunFolder", "finite", "read_run"]

CODES: dict[str, str] = {
    "U101": "the folder is not that of a run: it has no run.json",
    "U102": "run.json cannot be read: it is damaged, cut short or not a JSON object",
}
"""Code to meaning; the training room reports the same two."""


def finite(value: object) -> float | None:
    """The value if it is a finite number, else None.

    Example:
        >>> finite(2), finite(float("nan")), finite("2")
        (2.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e300 < value < 1e300 else None  # false for NaN, and an int may be too large for a float


@dataclass
class RunFolder:
    """What a run left behind: `run` is run.json; the lists are the lines of the files, empty where there is none."""

    path: Path
    run: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """One line for each file with lines that could not be read."""

    def at(self, dotted: str) -> Any:
        """The value of run.json at a dotted place, None where there is none."""
        value: Any = self.run
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def text(self, dotted: str) -> str:
        """The text at a dotted place, empty where there is none."""
        value = self.at(dotted)
        return "" if value is None or isinstance(value, dict | list) else str(value)

    def number(self, dotted: str) -> float | None:
        """The finite number at a dotted place."""
        return finite(self.at(dotted))

    def mapping(self, dotted: str) -> dict[str, Any]:
        """The object at a dotted place, empty where there is none."""
        value = self.at(dotted)
        return dict(value) if isinstance(value, Mapping) else {}

    def rows(self, dotted: str) -> list[dict[str, Any]]:
        """The objects in the list at a dotted place."""
        value = self.at(dotted)
        return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []

    @property
    def is_classification(self) -> bool:
        """Whether the run learnt labels."""
        return bool(self.run.get("task") == "classify")

    @property
    def measure(self) -> dict[str, Any]:
        """The score that counts: `key` in the results, `title` and `unit` for people, `more_is_better`."""
        by_itself = ("macro_f1", "macro-F1", True, "") if self.is_classification else _LOSS
        return self._measure("results.measure", *by_itself)

    @property
    def second(self) -> dict[str, Any]:
        """The score that is told beside it."""
        by_itself = ("accuracy", "accuracy", True, "") if self.is_classification else ("perplexity",) * 2 + (False, "")
        return self._measure("results.second", *by_itself)

    def _measure(self, dotted: str, key: str, title: str, more_is_better: bool, unit: str) -> dict[str, Any]:
        told = self.mapping(dotted)
        plain = {"key": key, "title": title, "more_is_better": more_is_better, "unit": unit}
        return plain if not told.get("key") else plain | {name: told[name] for name in plain if name in told}

    @property
    def name(self) -> str:
        """How the folder is called on a command line: relative to the working folder where it lies below it."""
        path = self.path.resolve()
        here = Path.cwd()
        return (path.relative_to(here) if path.is_relative_to(here) and path != here else path).as_posix()


_LOSS = ("loss", "loss", False, "nats per token")


def read_run(folder: Path) -> RunFolder:
    """Reads a run folder. Raises RunError (U101, U102) without a readable run.json."""
    folder = Path(folder)
    place = folder / "run.json"
    try:
        run = _fit(json.loads(place.read_text(encoding="utf-8")))
    except OSError:
        message = "has no run.json, so it is not the folder of a run: name the one that graftlm train wrote"
        raise RunError(Finding("U101", message, place=str(folder))) from None
    except ValueError as error:
        raise RunError(Finding("U102", f"not readable as JSON: {error}", place=str(place))) from None
    if not isinstance(run, dict):
        raise RunError(Finding("U102", f"found a JSON {type(run).__name__}, wanted an object", place=str(place)))
    found = RunFolder(folder, run)
    found.metrics = _lines(folder / "metrics.jsonl", found.unread)
    found.predictions = _lines(folder / "eval" / "predictions.jsonl", found.unread)
    found.samples = _lines(folder / "eval" / "samples.jsonl", found.unread)
    found.rejected = _lines(folder / "data" / "rejected.jsonl", found.unread)
    return found


# What JSON text can hold and neither HTML nor a drawing can: control characters and halves of a surrogate pair.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _fit(value: Any) -> Any:
    if isinstance(value, str):
        return _UNFIT.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_fit(key): _fit(inner) for key, inner in value.items()}
    return [_fit(inner) for inner in value] if isinstance(value, list) else value


def _lines(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    bad = 0
    # Not splitlines(): JSON text may hold line separators such as U+2028.
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = _fit(json.loads(line))
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        said = "1 line could not be read and is" if bad == 1 else f"{bad} lines could not be read and are"
        unread.append(f"{path.name}: {said} left out here.")
    return rows
