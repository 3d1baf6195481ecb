"""`graftlm compare`: methods on the same rows with the same means, with verdicts, and what each of them costs."""

from __future__ import annotations

import re
import shlex
from typing import Any

import click

from graftlm.cli.inputs import data_settings, read_data_settings, read_mapping
from graftlm.cli.output import print_json, print_table
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding

__all__ = ["verb"]


@click.command(
    "compare",
    cls=Verb,
    arguments=[("DATA", "file with the rows, bundled:messages or bundled:answers")],
    examples=[
        "graftlm compare tickets.csv --methods lora,ia3,prefix,bitfit --seeds 5 --budget 0.3%",
        "graftlm compare bundled:answers --methods lora,ia3 --shots 2,4 --general bundled:messages",
        "graftlm compare tickets.csv -m models/minilm --methods 'lora(rank=4),dora,series' --steps 200",
    ],
)
@click.argument("data", required=False)
@click.option(
    "-m", "--model", "--base", "base", default="bundled", show_default=True, metavar="MODEL", help="Base model."
)
@click.option("--methods", default="lora,ia3,prefix,bitfit", show_default=True, metavar="LIST", help="Who competes.")
@click.option("--full/--no-full", default=True, show_default=True, help="Full fine-tuning competes as well.")
@click.option(
    "--seeds", type=click.IntRange(1), default=5, show_default=True, metavar="COUNT", help="Runs of each method."
)
@click.option("--budget", metavar="SIZE", help="Trained parameters beside the head: 0.3% of the base, or 20k.")
@click.option(
    "--trials", type=click.IntRange(1), default=4, show_default=True, metavar="COUNT",
    help="Learning rates tried for each method on validation rows; 1 takes the method's own.",
)  # fmt: skip
@click.option("--shots", metavar="LIST", help="Numbers of examples to show the untouched base in its prompt.")
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), metavar="NUMBER", help="Passes over the training rows."
)
@click.option("--steps", type=click.IntRange(1), metavar="COUNT", help="Optimizer steps, instead of epochs.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, metavar="COUNT", help="Rows a step.")
@click.option("--test", metavar="FILE", help="File with the test rows; without one, a quarter of DATA.")
@click.option("--test-rows", type=click.IntRange(2), metavar="COUNT", help="Most test rows.")
@click.option("--max-rows", type=click.IntRange(6), metavar="COUNT", help="Most rows of each file that are read.")
@click.option("--max-length", type=click.IntRange(2), metavar="COUNT", help="Most tokens of a row.")
@click.option("--map", "mapping", metavar="ROLE=COLUMN", help="Which column of DATA plays which role.")
@click.option("--task", metavar="TASK", help="What is learnt, as for train; without one, what the rows look like.")
@click.option("--general", metavar="FILE", help="Texts on which it is measured what each method forgets.")
@click.option("--general-map", "general_mapping", metavar="text=COLUMN", help="Which column of those has the texts.")
@click.option("--other", metavar="FILE", help="Rows of another task on which the same is measured.")
@click.option("--other-map", "other_mapping", metavar="ROLE=COLUMN", help="Which column of those plays which role.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, metavar="COUNT",
    help="Trainings beside one another, each on one thread; the base is in memory once.",
)  # fmt: skip
@data_settings
@click.option("--waive", metavar="CODES", help="Findings on the data that are not to stop it.")
@click.option("--threads", type=click.IntRange(1), metavar="COUNT", help="Processor threads; without one, all.")
@click.option("-o", "--out", "output", metavar="FOLDER", help="Where it is kept; a stopped one is taken up from there.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON only.")
@click.pass_obj
def verb(command: str, /, output: str | None, as_json: bool, jobs: int, **flags: Any) -> None:
    """Compare methods on DATA: the same rows, order and means for all, and a verdict that chance is taken out of.

    Each method gets its learning rate by the same number of trials on validation rows, then is trained with several
    seeds; the test rows are scored once. Beside them stand full fine-tuning, baselines and, with --shots, the untouched
    base with examples in its prompt. It can be stopped at any time and goes on with the same command and -o.
    """
    from graftlm.comparison.settings import ComparisonSettings

    given = {key: value for key, value in flags.items() if value is not None}
    given["methods"] = tuple(split_methods(given["methods"]))
    given["shots"] = tuple(_whole_numbers(given["shots"])) if "shots" in given else ()
    given["waive"] = tuple(given["waive"].replace(" ", "").split(",")) if "waive" in given else ()
    given |= read_data_settings(given.pop("sets"))
    for name in ("mapping", "general_mapping", "other_mapping"):
        given[name] = read_mapping(given.get(name))
    settings = ComparisonSettings(**given)
    from graftlm.comparison.comparing import compare_with

    try:
        found = compare_with(settings, output=output, quiet=as_json, command=command, jobs=jobs)
    except KeyboardInterrupt:
        if output is None:
            click.echo("stopped: give the folder that was made as -o with the same command, and it goes on", err=True)
        else:
            click.echo(f"stopped: the same command goes on in {output}", err=True)
        raise
    if as_json:
        print_json(found.record["summary"])
        return
    _show(found.record["summary"])
    click.echo(f"\nreport   {shlex.quote(str(found.report))}")


def split_methods(text: str) -> list[str]:
    """Methods with commas between them; commas inside of brackets belong to a method.

    Example:
        >>> split_methods("lora(rank=4,alpha=8), ia3")
        ['lora(rank=4,alpha=8)', 'ia3']
    """
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _whole_numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise UsageFault(Finding("L103", f"--shots {text!r} is no list of whole numbers", fix="--shots 2,4"))
    return [int(part) for part in text.split(",")]


def _show(summary: dict[str, Any]) -> None:
    verdicts = {}
    best = next(row["name"] for row in summary["contestants"] if row["kind"] != "baseline")
    for pair in summary["pairs"]:
        if best in (pair["one"], pair["other"]):
            other = pair["other"] if pair["one"] == best else pair["one"]
            verdict = pair["verdict"]
            if pair["one"] == best:  # said of the other
                verdict = {"better": "worse", "worse": "better"}.get(verdict, verdict)
            verdicts[other] = f"{verdict} (p {pair['p_corrected']:.2g})"
    rows = []
    for row in summary["contestants"]:
        cost = row.get("cost")
        rows.append(
            [
                row["name"],
                f"{row['score']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}",
                "best" if row["name"] == best else verdicts.get(row["name"], "baseline"),
                f"{cost['parameters']:,.0f}" if cost else "",
                f"{cost['seconds']:.1f} s" if cost else "",
            ]
        )
    click.echo()
    head = ["", summary["measure"], "95 %", f"against {best}", "trained", "time"]
    print_table(head, rows, right=(1, 4, 5))
