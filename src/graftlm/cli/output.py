"""Where a verb's results go: tables and colours on a terminal, plain lines or JSON elsewhere, errors on standard error.

Off a terminal nothing is coloured, cut to a width or drawn; the environment's NO_COLOR is respected.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from graftlm.errors import GraftError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["colourful", "console", "harmless", "json_line", "print_json", "print_table", "say", "show_error"]

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"
# Control characters in a user's data or a model's answer could steer the terminal; line ends and tabs may stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WIDE = 1000  # columns that a table may take where there is no terminal to fit into


def colourful(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and colours are wanted."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def harmless(text: str) -> str:
    r"""`text` without control characters, apart from line ends and tabs.

    Example:
        >>> harmless("a\x1b[31mb")
        'a\ufffd[31mb'
    """
    return _CONTROL.sub("\ufffd", text)


def show_error(error: GraftError) -> None:
    """Print what can be mended, red on a terminal; the lines of detail and the fix stay plain."""
    red = colourful(sys.stderr)
    lines = str(error).splitlines()
    if os.environ.get("RANK", "0") != "0":  # of several processes the main one tells all
        lines = [f"process {os.environ['RANK']}: {lines[0]}"]
    for line in lines:
        said = harmless(line)
        print(f"{_RED}{said}{_PLAIN}" if red and not said.startswith("  ") else said, file=sys.stderr)


def say(text: str) -> None:
    """A remark beside the results, on standard error."""
    print(harmless(text), file=sys.stderr)


def json_line(value: Any) -> str:
    """`value` as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def print_json(value: Any) -> None:
    """`value` as indented JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def console() -> Console:
    """Standard output for tables: as wide as the terminal, without any control character off it."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        force_terminal=terminal,
        no_color=not colourful(sys.stdout),
        width=None if terminal else _WIDE,
        highlight=False,
        markup=False,
        emoji=False,
    )


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
    """A small table; the columns whose positions are in `right` are aligned right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at, header in enumerate(headers):
        table.add_column(header, justify="right" if at in set(right) else "left")
    for row in rows:
        table.add_row(*(Text(harmless(str(cell))) for cell in row))
    screen = console()
    if sys.stdout.isatty():
        screen.print(table)
        return
    with screen.capture() as lines:
        screen.print(table)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))
