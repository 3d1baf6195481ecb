"""`graftlm plan`: what a run would take, before it is started, on this machine or one that is not here."""

from __future__ import annotations

import click

from graftlm.cli.output import console, print_json
from graftlm.cli.run_flags import resolved_from, run_flags
from graftlm.cli.usage import Verb

__all__ = ["verb"]

_LENGTH = 512


@click.command(
    "plan",
    cls=Verb,
    arguments=[("DATA", "file with the rows: gives the lengths; without one, rows of --max-length tokens (512)")],
    examples=[
        "graftlm plan faq.jsonl -m models/qwen --memory 24GB",
        "graftlm plan -m models/qwen/config.json --method full --max-length 2048 --batch 4",
    ],
)
@run_flags
@click.option("--memory", metavar="AMOUNT", help="Memory of the machine, such as 24GB: what fits, and what would.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="What the machine computes on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(
    memory: str | None, device: str, as_json: bool, config: str | None, set: tuple[str, ...], **flags: str | None
) -> None:
    """Say what training would take: memory by term, trained parameters, operations.

    Nothing is trained and no weights are read: config.json is enough. The flags are those of train.
    """
    resolved = resolved_from(config, set, flags)
    settings = resolved.settings
    from graftlm.planning import memory_bytes, plan, said
    from graftlm.training.run import plan_resolved

    room = memory_bytes(memory) if memory else None
    if settings.data.path is not None:
        found = plan_resolved(resolved)
    else:
        found = plan(
            settings.model.name,
            settings.method,
            dtype=settings.model.dtype,
            batch=settings.train.batch,
            accumulate=settings.train.accumulate,
            length=settings.train.max_length or _LENGTH,
            task=settings.task,
            recompute=settings.train.recompute,
            quantize=settings.model.quantize,
            device=device,
            revision=settings.model.revision,
            trust_remote_code=settings.model.trust_remote_code,
        )
    if as_json:
        fits = {"memory_bytes": room, "fits": found.fits(room)} if room else {}
        print_json(found.to_dict() | fits)
        return
    console().print(found)
    if room:
        click.echo(f"{'fits' if found.fits(room) else 'does not fit'} into {said(room)}")
