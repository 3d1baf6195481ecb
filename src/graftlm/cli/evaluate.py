"""`graftlm evaluate`: the scores of an adapter beside those of its untouched base, on rows that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graftlm.cli.inputs import read_mapping
from graftlm.cli.output import print_json, print_table
from graftlm.cli.place import must_be_adapter
from graftlm.cli.usage import Verb
from graftlm.data.wording import counted

__all__ = ["verb"]


@click.command(
    "evaluate",
    cls=Verb,
    arguments=[
        ("RUN", "folder of a run or of an adapter"),
        ("DATA", "file with rows to score; without one, the rows that the run held out"),
    ],
    examples=["graftlm evaluate runs/tickets-1", "graftlm evaluate runs/tickets-1 new.csv --json"],
)
@click.argument("run")
@click.argument("data", required=False)
@click.option("-m", "--model", "--base", "base", metavar="MODEL", help="The base model, where it is not where it was.")
@click.option("--map", "mapping", metavar="ROLE=COLUMN", help="Which column of DATA plays which role.")
@click.option("--max-rows", type=click.IntRange(1), metavar="COUNT", help="Most rows of DATA that are read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(
    run: str, data: str | None, base: str | None, mapping: str | None, max_rows: int | None, as_json: bool
) -> None:
    """Score an adapter beside its untouched base.

    Classifiers get accuracy and macro-F1, writers the loss per token and perplexity, all with 95 % intervals.
    """
    folder = must_be_adapter(run)
    roles = read_mapping(mapping)
    from graftlm.training import evaluate

    results = evaluate(folder, data, base=base, mapping=roles, max_rows=max_rows)
    if as_json:
        print_json(results)
    else:
        _show(results, data or "the rows that were held out", folder)


def _show(results: dict[str, Any], data: str, folder: Path) -> None:
    scores = results["scores"]
    click.echo(f"{folder} on {data}: {counted(results['eval_rows'], 'row')}")
    if "accuracy" in scores[0]:
        rows = [[s["title"], _percent(s["accuracy"]), *_with_interval(s, "macro_f1")] for s in scores]
        print_table(["", "accuracy", "macro-F1", "95 %"], rows, right=(1, 2))
    else:
        rows = [[s["title"], *_with_interval(s, "loss"), f"{s['perplexity']:.4g}"] for s in scores]
        print_table(["", "loss", "95 %", "perplexity"], rows, right=(1, 3))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _with_interval(score: dict[str, Any], name: str) -> list[str]:
    """The value and its interval, `?` where none was computed."""
    low, high = score.get(f"{name}_low"), score.get(f"{name}_high")
    return [f"{score[name]:.3f}", "?" if low is None or high is None else f"{low:.3f} to {high:.3f}"]
