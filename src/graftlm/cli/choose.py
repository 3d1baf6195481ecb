"""`graftlm choose`: the method, size, placement and learning rate for a data file, within limits of memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graftlm.cli.inputs import data_settings, read_data_settings, read_mapping
from graftlm.cli.output import print_json
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding

__all__ = ["verb"]

_SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
_TIMES = {"s": 1, "min": 60, "h": 3600}


@click.command(
    "choose",
    cls=Verb,
    arguments=[("DATA", "file with the rows, bundled:messages or bundled:answers")],
    examples=[
        "graftlm choose tickets.csv --memory 2GB --time 10min",
        "graftlm choose tickets.csv --candidates 'lora(rank=4),ia3,bitfit' --steps 90",
    ],
)
@click.argument("data", required=False)
@click.option(
    "-m", "--model", "--base", "base", default="bundled", show_default=True, metavar="MODEL", help="Base model."
)
@click.option("--memory", metavar="SIZE", help="Most that a training step may hold, such as 2GB.")
@click.option("--time", "duration", metavar="TIME", help="Most that the whole training may take, such as 10min.")
@click.option(
    "--candidates", metavar="LIST", help="Methods to choose among; by itself eight and what importance proposes."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, metavar="COUNT", help="Rounds of halving."
)
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), metavar="NUMBER", help="Passes over the training rows."
)
@click.option("--steps", type=click.IntRange(1), metavar="COUNT", help="Optimizer steps, instead of epochs.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, metavar="COUNT", help="Rows a step.")
@click.option("--max-rows", type=click.IntRange(6), metavar="COUNT", help="Most rows that are read.")
@click.option("--max-length", type=click.IntRange(2), metavar="COUNT", help="Most tokens of a row.")
@click.option("--map", "mapping", metavar="ROLE=COLUMN", help="Which column of DATA plays which role.")
@click.option("--task", metavar="TASK", help="What is learnt, as for train; without one, what the rows look like.")
@data_settings
@click.option("--waive", metavar="CODES", help="Findings on the data that are not to stop it.")
@click.option("--threads", type=click.IntRange(1), metavar="COUNT", help="Processor threads; without one, all.")
@click.option("-o", "--out", "output", metavar="FOLDER", help="Keep every trial there, in choice.json.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(
    data: str | None, memory: str | None, duration: str | None, candidates: str | None, output: str | None,
    as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Choose method, size, placement and learning rate by short trainings, of which the better third goes on.

    The answer says by how much the winner is ahead of the next, and whether that is more than chance.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    given["waive"] = tuple(given["waive"].replace(" ", "").split(",")) if "waive" in given else ()
    given["mapping"] = read_mapping(given.get("mapping"))
    given |= read_data_settings(given.pop("sets"))
    limits: dict[str, Any] = {
        "memory_bytes": int(_quantity(memory, _SIZES, "--memory 2GB")) if memory else None,
        "time_s": _quantity(duration, _TIMES, "--time 10min") if duration else None,
    }
    from graftlm.cli.compare import split_methods
    from graftlm.comparison import choose

    names = split_methods(candidates) if candidates else None
    say = (lambda _: None) if as_json else click.echo
    folder = Path(output) if output else None
    found = choose(data, candidates=names, output=folder, say=say, **limits, **given)
    if as_json:
        print_json(dict(found.record))
        return
    final, chosen = found.record["final"], found.record["chosen"]
    for entry in found.record["dropped"]:
        click.echo(f"left out {entry['method']}: {entry['why']}")
    click.echo(f"chosen   {found.method}  lr {found.learning_rate:g}  {chosen['parameters']:,} parameters")
    click.echo(f"test     {found.record['measure']} {chosen['test_score']:.4f}")
    if "runner_up" in final:
        click.echo(
            f"margin   {final['margin']:+.4f} ({final['margin_low']:+.4f} to {final['margin_high']:+.4f}) over "
            f"{final['runner_up']['method']}: {final['verdict']} (p {final['p_value']:.2g})"
        )
    click.echo(f"next     {found.command}")


def _quantity(text: str, units: dict[str, int], fix: str) -> float:
    """A number with its unit; raises UsageFault for anything else."""
    plain = text.strip().lower().replace(" ", "")
    unit = plain.lstrip("0123456789.")
    number = plain[: len(plain) - len(unit)]
    try:
        return float(number) * (units[unit] if unit else 1)
    except (KeyError, ValueError):
        known = ", ".join(units)
        raise UsageFault(Finding("L103", f"{text!r} is no number with a unit ({known})", fix=fix)) from None
