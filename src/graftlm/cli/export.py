"""`graftlm export`: an adapter as a merged model, a PEFT folder or for vLLM, proven equal before it is kept."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from graftlm.cli.output import print_json
from graftlm.cli.place import must_be_adapter
from graftlm.cli.usage import Verb

__all__ = ["verb"]


@click.command(
    "export",
    cls=Verb,
    arguments=[("RUN", "folder of a run or of an adapter")],
    examples=["graftlm export runs/faq-1 --to merged", "graftlm export runs/faq-1 --to vllm -o serving/faq"],
)
@click.argument("run")
@click.option(
    "--to", type=click.Choice(["merged", "peft", "vllm"]), default="merged", show_default=True, help="Layout."
)
@click.option("-o", "--out", metavar="FOLDER", help="Where it goes; by itself exports/RUN-LAYOUT.")
@click.option("-m", "--model", "--base", "base", metavar="MODEL", help="The base model, where it is not where it was.")
@click.option(
    "--rows", type=click.IntRange(1), default=8, show_default=True, metavar="COUNT", help="Rows to prove it on."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(run: str, to: str, out: str | None, base: str | None, rows: int, as_json: bool) -> None:
    """Write an adapter for other programs, and prove that it is the same model.

    The export is loaded back from its files, and its logits on held-out rows are compared with the adapter's. Where
    they differ by more than rounding it is refused, and nothing is left behind.
    """
    folder = must_be_adapter(run)
    target = Path(out) if out is not None else Path("exports") / f"{folder.resolve().name}-{to}"
    from graftlm.training import export

    found = export(folder, target, to=to, base=base, rows=rows)
    if as_json:
        told = {"folder": str(found.folder), "to": found.kind, "difference": found.difference, "rows": found.rows}
        print_json(told | {"agreement": found.agreement, "command": found.command})
        return
    proven = f"{found.rows} rows, largest difference of a logit {found.difference:.2g}, "
    click.echo(f"export   {shlex.quote(str(found.folder))}  ({found.kind})")
    click.echo(f"proven   {proven}{100 * found.agreement:.1f} % of choices equal")
    if found.command:
        click.echo(f"next     {found.command}")
