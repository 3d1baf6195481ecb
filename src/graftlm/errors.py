"""The tree of exceptions that graftlm raises, each with a stable code, a place, a cause and a fix.

Every error that a user can cause is a `GraftError`. It carries one or more *findings*: a finding names the
subject and its place, says what was found and what was wanted, and offers the nearest right thing. All faults
of one input are reported at once, before anything is changed. The command line prints `str(error)` and exits
with status 2; a traceback is left for defects of graftlm itself.

Example:
    >>> from graftlm.errors import Finding, SettingsError
    >>> print(SettingsError(Finding("S101", "unknown setting train.learning_rte",
    ...                             place="run.yaml:7:3", fix="train.learning_rate")))
    run.yaml:7:3 unknown setting train.learning_rte [S101]
      fix: train.learning_rate
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = [
    "AdapterError",
    "DataError",
    "EnvironmentFault",
    "Finding",
    "GraftError",
    "MethodError",
    "ModelError",
    "NotMergeable",
    "PlanError",
    "RoutingError",
    "RunError",
    "SettingsError",
    "SiteError",
    "half_character",
    "nearest",
]

_HALF = re.compile("[\ud800-\udfff]")  # whole pairs are one character here

_LINES_SHOWN = 12


@dataclass(frozen=True)
class Finding:
    """One fault: `code` (stable), `message` (found and wanted), `place` (file:line:column, row, module), `fix`."""

    code: str
    message: str
    place: str = ""
    fix: str = ""
    detail: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        head = f"{self.place} {self.message}" if self.place else self.message
        lines = [f"{head} [{self.code}]", *(f"  {line}" for line in self.detail)]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class GraftError(Exception):
    """Something that the user can mend; `findings` holds every fault that was found at once."""

    def __init__(self, findings: Finding | Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = (findings,) if isinstance(findings, Finding) else tuple(findings)
        super().__init__(self.findings)

    def __str__(self) -> str:
        texts = [str(finding).splitlines() for finding in self.findings]
        if sum(map(len, texts)) <= _LINES_SHOWN:
            return "\n".join(line for text in texts for line in text)
        if len(texts) == 1:
            return "\n".join([*texts[0][: _LINES_SHOWN - 2], "  ...", texts[0][-1]])
        # Many faults: whole findings while there is room, then only what is wrong, then how many more there are.
        lines: list[str] = []
        for at, text in enumerate(texts):
            left, after = _LINES_SHOWN - len(lines), len(texts) - at - 1
            if len(text) + min(after, 1) <= left and (len(text) == 1 or len(text) + after <= left):
                lines += text
            elif left > min(after, 1):
                lines.append(text[0])
            else:
                return "\n".join([*lines, f"... and {after + 1} more"])
        return "\n".join(lines)


class SettingsError(GraftError, ValueError):
    """A setting is unknown, misspelt, out of range or at odds with another. Codes S1xx."""


class DataError(GraftError, ValueError):
    """A data file cannot be read or its rows are not what the task needs. Codes D1xx."""


class ModelError(GraftError, ValueError):
    """A base model cannot be found, read or used for the task. Codes M1xx."""


class SiteError(GraftError, ValueError):
    """A selector of sites matches nothing, or a site cannot carry the delta. Codes C1xx."""


class MethodError(GraftError, ValueError):
    """A method is unknown, wrongly set, or does not work on this model. Codes T1xx."""


class RoutingError(GraftError, RuntimeError):
    """It cannot be told which adapter acts on which row. Codes R1xx."""


class NotMergeable(GraftError, RuntimeError):
    """A delta cannot be folded into the weights. Codes R2xx."""


class AdapterError(GraftError, ValueError):
    """An adapter on disk does not fit the base, or is damaged. Codes A1xx."""


class RunError(GraftError, RuntimeError):
    """A run cannot start, go on or resume. Codes U1xx."""


class PlanError(GraftError, ValueError):
    """What a run would take cannot be told. Codes P1xx."""


class EnvironmentFault(GraftError, RuntimeError):
    """The machine lacks something: disk, memory, a package, a device. Codes E1xx."""


def half_character(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone in `text`, which UTF-8 cannot write; None where none does.

    Python holds bytes that are no UTF-8 so, and JSON can name it.

    Example:
        >>> half_character("\ud83d"), half_character("a")
        ('\ud83d', None)
    """
    found = None if text.isascii() else _HALF.search(text)
    return found[0] if found else None


def nearest(word: str, choices: Iterable[str], *, most: int = 3) -> list[str]:
    """The choices that look most like `word`, best first; compared without case.

    Example:
        >>> nearest("lorra", ["lora", "ia3", "bitfit"])
        ['lora']
    """
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), by_lower, n=most, cutoff=0.6)
    return [by_lower[name] for name in close]
