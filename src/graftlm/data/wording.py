"""How numbers, rows and columns are said in messages: `12 000 rows`, `rows 6, 21, 41`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["clip", "counted", "listed", "number", "percent", "rows"]


def number(value: int) -> str:
    """A count with a space between thousands.

    Example:
        >>> number(12000)
        '12 000'
    """
    return f"{value:,}".replace(",", " ")


def counted(value: int, noun: str) -> str:
    """A count and its noun, which gets an s unless there is one.

    Example:
        >>> counted(1, "row"), counted(3, "row")
        ('1 row', '3 rows')
    """
    return f"{number(value)} {noun}" + ("" if value == 1 else "s")


def percent(part: int, whole: int) -> str:
    """A share for people: one decimal below 20 %, none above; never rounded to 0 or 100 unless it is.

    Example:
        >>> percent(412, 600), percent(189, 1000)
        ('69 %', '18.9 %')
    """
    share = 100 * part / whole if whole else 0.0
    text = f"{share:.1f}" if share < 20 or 99 < share < 100 else f"{share:.0f}"
    if part and text == "0.0":
        return "<0.1 %"
    if part < whole and text == "100.0":
        return ">99.9 %"
    return f"{text.removesuffix('.0')} %"


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names with commas, the first `most` of them, then how many more.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    words = [str(name) for name in names]
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {number(more)} more" if more > 0 else "")


def rows(numbers: Sequence[int], most: int = 5) -> str:
    """Row numbers as a person would point at them.

    Example:
        >>> rows([6, 21, 41])
        'rows 6, 21, 41'
    """
    return ("row " if len(numbers) == 1 else "rows ") + listed(numbers, most)


def clip(text: str, width: int = 60) -> str:
    """One line of at most `width` characters; the middle of a longer one is left out.

    Example:
        >>> clip("one two three four", 11)
        'one t… four'
    """
    line = text.replace("\n", "\\n")
    half = (width - 1) // 2
    return line if len(line) <= width else f"{line[:half]}…{line[-(width - 1 - half) :]}"
