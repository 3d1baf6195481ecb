"""`graftlm train`: settings out of flags and a run file, one run, and where its report is."""

from __future__ import annotations

import os
import shlex

import click

from graftlm.cli.run_flags import resolved_from, run_flags
from graftlm.cli.usage import Verb

__all__ = ["verb"]


@click.command(
    "train",
    cls=Verb,
    arguments=[
        ("DATA", "file with the rows (CSV, TSV, JSONL, JSON, Parquet, text), bundled:messages or bundled:answers")
    ],
    examples=[
        "graftlm train tickets.csv",
        "graftlm train faq.jsonl -m models/qwen --method 'lora(rank=8)' --epochs 2 -o runs/faq",
        "graftlm train -c run.yaml --set train.warmup=0.1",
        "graftlm train -o runs/faq --resume",
    ],
)
@run_flags
@click.option(
    "--resume", is_flag=True, help="Go on with the stopped run in the folder -o; its own settings need not be repeated."
)
@click.pass_obj
def verb(command: str, /, resume: bool, config: str | None, set: tuple[str, ...], **flags: str | None) -> None:
    """Train an adapter on DATA and report how well it does beside the untouched base.

    What is learnt goes by the columns: text and label make a classifier, prompt and completion (or messages) an
    assistant, text alone a writer in that style. Everything that is not given is decided and written down.
    """
    resolved = resolved_from(config, set, flags)
    from graftlm.training.early import refuse_early

    if not resume:
        refuse_early(resolved)
    from graftlm.training import train_resolved

    run = train_resolved(resolved, resume=resume, command=command)
    if os.environ.get("RANK", "0") != "0":  # of several processes the main one speaks
        return
    folder = shlex.quote(str(run.folder))
    if run.record.get("status") == "stopped":
        click.echo(f"next     graftlm train -o {folder} --resume")
    else:
        from graftlm.report.content import next_verb

        pairs = "text2" in run.record.get("data", {}).get("columns", {})
        click.echo(f"next     graftlm {next_verb(str(run.record.get('task')), folder, pairs=pairs)}")
