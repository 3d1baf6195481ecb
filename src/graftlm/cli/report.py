"""`graftlm report`: the page of a run or a comparison, written again from what is in its folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding

__all__ = ["verb"]


@click.command(
    "report",
    cls=Verb,
    arguments=[("FOLDER", "of a run or of a comparison")],
    examples=["graftlm report runs/tickets-1", "graftlm report comparisons/tickets-1"],
)
@click.argument("folder")
def verb(folder: str) -> None:
    """Write the report of a run or a comparison: one HTML file that needs no network.

    A run gets its model card as well (README.md; one that was edited is kept), a comparison its table as Markdown, CSV
    and LaTeX. train and compare do this by themselves at their end.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageFault(Finding("L104", f"there is no folder {folder!r}", fix="graftlm report runs/NAME"))
    from graftlm.report import write_card, write_comparison, write_report

    if (path / "comparison.json").is_file():
        written = [write_comparison(path), *(path / f"table.{kind}" for kind in ("md", "csv", "tex"))]
    elif (path / "run.json").is_file():
        written = [write_report(path), write_card(path)]
    else:
        message = f"{folder} is neither a run nor a comparison: it has no run.json and no comparison.json"
        raise UsageFault(Finding("L104", message))
    for at, file in enumerate(written):
        click.echo(f"{'' if at else 'report':<9}{shlex.quote(str(file))}")
