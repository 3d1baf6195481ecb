"""A call of this library as the text that repeats it, for records and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["call_as_text"]


def call_as_text(name: str, given: Mapping[str, Any]) -> str:
    """The call of `name` with what was `given`, those that are None left out.

    Rows in memory and functions have no text: they stand as `...`, and whoever repeats the call brings them.

    Example:
        >>> call_as_text("graftlm.train", {"data": "a.csv", "epochs": 3, "task": None, "data.map": {"text": "t"}})
        "graftlm.train(data='a.csv', epochs=3, **{'data.map': {'text': 't'}})"
    """
    plain = {key: value for key, value in given.items() if value is not None}
    words = [f"{key}={_text(value)}" for key, value in plain.items() if key.isidentifier()]
    others = ", ".join(f"{key!r}: {_text(value)}" for key, value in plain.items() if not key.isidentifier())
    return f"{name}({', '.join([*words, *([f'**{{{others}}}'] if others else [])])})"


def _text(value: Any) -> str:
    rows = isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)
    if isinstance(value, (str, int, float, bool, list, tuple, dict)) and not rows:
        return repr(value)
    return "..." if callable(value) or hasattr(value, "__iter__") else repr(str(value))
