"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "P102": "the step of this model cannot be run without values, so it cannot be planned",
    "P103": "an amount of memory that cannot be read",
    "P104": "a length, batch or share that no step can have",
}
"""Code to meaning."""
