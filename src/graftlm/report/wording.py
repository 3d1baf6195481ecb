"""How the report says numbers, sizes, times and values; spaces inside a quantity do not break."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["as_text", "clip", "counted", "duration", "measured", "setting", "share", "size", "whole"]

_GAP = "\u00a0"


def whole(value: float | None) -> str:
    """A count with a space between thousands, `unknown` without one.

    Example:
        >>> whole(12000).replace(_GAP, " ")
        '12 000'
    """
    return "unknown" if value is None else f"{value:,.0f}".replace(",", _GAP)


def counted(value: float, noun: str) -> str:
    """A count and its noun: `1 row`, `3 rows`."""
    return f"{whole(value)} {noun}{'' if value == 1 else 's'}"


def measured(value: float | None) -> str:
    """A score or a loss: three decimals, fewer for large values.

    Example:
        >>> measured(0.91449), measured(153.27), measured(None)
        ('0.914', '153', 'unknown')
    """
    if value is None:
        return "unknown"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else whole(value)


def share(part: float | None, total: float | None) -> str:
    """A share in percent with two digits that count, empty when it cannot be told.

    Example:
        >>> share(10.1e6, 596e6).replace(_GAP, " "), share(1, 100000).replace(_GAP, " ")
        ('1.7 %', '0.001 %')
    """
    if part is None or not total:
        return ""
    percent = 100 * part / total
    if percent >= 10:
        return f"{percent:.0f}{_GAP}%"
    return f"{float(f'{percent:.2g}'):.10f}".rstrip("0").rstrip(".") + f"{_GAP}%"


def size(value: float | None) -> str:
    """Bytes in powers of 1000.

    Example:
        >>> size(40_400_000).replace(_GAP, " ")
        '40.4 MB'
    """
    if value is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f}{_GAP}{unit}" if unit == "B" or value >= 99.95 else f"{value:.1f}{_GAP}{unit}"


def duration(seconds: float | None) -> str:
    """A time for people.

    Example:
        >>> duration(75).replace(_GAP, " "), duration(8040).replace(_GAP, " ")
        ('1 min 15 s', '2 h 14 min')
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f}{_GAP}s" if seconds < 10 else f"{min(seconds, 59):.0f}{_GAP}s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60}{_GAP}min {total % 60}{_GAP}s"
    return f"{total // 3600}{_GAP}h {total % 3600 // 60}{_GAP}min"


def setting(value: Any) -> str:
    """The value of a setting as a run file has it."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON; nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clip(text: str, most: int) -> str:
    """The first `most` characters, with a mark when something was cut off."""
    return text if len(text) <= most else f"{text[:most].rstrip()} […]"
