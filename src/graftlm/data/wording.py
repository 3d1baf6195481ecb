"""How numbers, rows and columns are said in messages: `12 000 rows`, `rows 6, 21, 41`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["clip", "counted", "kind_of", "listed", "number", "percent", "quoted", "rows"]

#: Types of values, bool before int, with the words for one and for several.
_KINDS: tuple[tuple[type | tuple[type, ...], str, str], ...] = (
    (bool, "true/false", "true/false"),
    ((int, float), "a number", "numbers"),
    (str, "text", "texts"),
    ((list, tuple), "a list", "lists"),
    (dict, "an object", "objects"),
    (type(None), "nothing (null)", "nulls"),
)


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


def quoted(value: Any, width: int = 30) -> str:
    """A value of a row as its file has it, in one short line: text in single quotes, all else as JSON.

    Example:
        >>> quoted("maybe"), quoted(["a", None]), quoted({"text": 1})
        ("'maybe'", '["a", null]', '{"text": 1}')
    """
    if isinstance(value, str):
        return clip(repr(value), width)
    return clip(json.dumps(value, ensure_ascii=False, default=str), width)


def kind_of(value: Any) -> str:
    """What a value of a row is, in words; of a list, what is in it.

    Example:
        >>> kind_of(3), kind_of([]), kind_of(["a", 1]), kind_of(None)
        ('a number', 'an empty list', 'a list of texts and numbers', 'nothing (null)')
    """
    one = next((one for kind, one, _ in _KINDS if isinstance(value, kind)), f"a {type(value).__name__}")
    if not isinstance(value, (list, tuple)):
        return one
    kinds = (next((many for kind, _, many in _KINDS if isinstance(each, kind)), "others") for each in value)
    inside = dict.fromkeys(kinds)
    return f"a list of {' and '.join(inside)}" if inside else "an empty list"
