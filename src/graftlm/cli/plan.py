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
@click.option("--serve", is_flag=True, help="Say too what it takes to serve so many rows of that length.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(
    memory: str | None,
    device: str,
    serve: bool,
    as_json: bool,
    config: str | None,
    set: tuple[str, ...],
    **flags: str | None,
) -> None:
    """Say what training would take: memory by term, trained parameters, operations.

    Nothing is trained and no weights are read: config.json is enough. The flags are those of train. With --memory, what
    fits into such a machine, the cheapest change first, and the largest batch, length and rank.
    """
    resolved = resolved_from(config, set, flags)
    settings = resolved.settings
    from graftlm.models.placing import Placing
    from graftlm.planning import asked, memory_bytes, said_time, serving, time_of
    from graftlm.training.ready import asked_resolved

    room = memory_bytes(memory) if memory else None
    if settings.data.path is not None:
        step = asked_resolved(resolved)
    else:
        Placing(settings.model.device_map, settings.model.max_memory or None, settings.model.offload_folder)
        step = asked(
            settings.model.name,
            settings.method,
            dtype=settings.model.dtype,
            batch=settings.train.batch,
            accumulate=settings.train.accumulate,
            length=settings.train.max_length or _LENGTH,
            task=settings.task,
            recompute=settings.train.recompute,
            quantize=settings.model.quantize,
            optimizer=settings.train.optimizer,
            device=device,
            max_memory=settings.model.max_memory,
            revision=settings.model.revision,
            trust_remote_code=settings.model.trust_remote_code,
        )
    found = step.plan_within(room) if room else step.plan()
    took_s = time_of(step, found) if room is None else None  # with --memory, it is another machine
    served = serving(step, found) if serve else None
    if as_json:
        told = found.to_dict()
        told |= {"step_seconds": took_s[0], "steps": step.steps, "seconds": took_s[1]} if took_s else {}
        print_json(told | ({"serving": served.to_dict()} if served else {}))
        return
    console().print(found)
    if took_s is not None:
        run = f", {step.steps:,} steps about {said_time(took_s[1])}" if step.steps else ""
        click.echo(f"time     the largest step about {said_time(took_s[0])} on this machine{run}")
    if served is not None:
        click.echo(str(served))
