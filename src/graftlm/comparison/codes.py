"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "E131": "the library that chooses learning rates is not installed",
    "U150": "methods cannot be compared on this task: a row by itself has no score",
    "U151": "a method is above the budget even at its smallest size",
    "U152": "the folder holds another comparison, or other files",
    "U153": "in-context prompting needs a causal base, rows to show and room in its context",
    "U154": "there is nothing to compare: a contestant is named twice, or there are fewer than two",
    "U155": "a setting of the comparison is out of its range",
    "U156": "what is forgotten cannot be measured on these texts or rows",
    "U157": "too few rows are left for training, validation or test",
    "U158": "no candidate is within the limits of memory and time",
    "U159": "methods cannot be trained beside one another here",
    "U160": "a file of an unfinished comparison is damaged",
}
"""Code to meaning."""
