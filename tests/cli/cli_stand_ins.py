"""What the tests of the command line share: what a call left, a terminal that is none, rooms that take notes."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Said:
    """What one call left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


class Screen(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Rooms:
    """What the stand-ins were called with, and what they give back."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    task: str = "sft"
    template: Any = "template"
    tuned: bool = True
    results: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    facts: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    error: BaseException | None = None

    def note(self, name: str, *args: Any, **options: Any) -> None:
        self.calls.append((name, args, options))
        if self.error is not None:
            raise self.error

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]
