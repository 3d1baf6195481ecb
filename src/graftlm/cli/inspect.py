"""`graftlm inspect`: looks into a model, an adapter or a data file, whichever it is given."""

from __future__ import annotations

from pathlib import Path

import click

from graftlm.cli.output import print_json
from graftlm.cli.place import BUNDLED_DATA, kind_of
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding, GraftError

__all__ = ["verb"]


@click.command(
    "inspect",
    cls=Verb,
    arguments=[
        ("WHAT", "a model (bundled, a folder or a hub id), a run, an adapter, or a data file (also bundled:messages)")
    ],
    examples=[
        "graftlm inspect bundled --method 'lora(rank=8,targets=attention)'",
        "graftlm inspect runs/faq-1",
        "graftlm inspect faq.jsonl --map prompt=question,completion=answer",
    ],
)
@click.argument("what")
@click.option("--method", metavar="TEXT", help="Of a model: what this method would train.")
@click.option("--task", metavar="NAME", help="Of a model or data: as if for lm, sft or classify.")
@click.option("-m", "--model", metavar="MODEL", help="Of data: whose tokenizer counts. Of an adapter: whether it fits.")
@click.option("--map", "mapping", metavar="ROLE=COLUMN", help="Of data: which column plays which role.")
@click.option("--max-length", type=click.IntRange(2), metavar="COUNT", help="Of data: most tokens of a row.")
@click.option("--eval", "eval_path", metavar="FILE", help="Of data: a file to evaluate on, searched for rows of both.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(
    what: str,
    method: str | None,
    task: str | None,
    model: str | None,
    mapping: str | None,
    max_length: int | None,
    eval_path: str | None,
    as_json: bool,
) -> None:
    """Look into a model, an adapter or a data file.

    Of a model: every place that can be adapted, with its role, from the configuration alone. Of an adapter: its
    method, its base, its tensors, and how its run went. Of data: what was recognised, how long the rows are, which are
    alike, and which tokens are trained.
    """
    kind = kind_of(what, data=True)
    _refuse(kind, {"--method": (method, "model"), "--model": (model, "adapter data"), "--map": (mapping, "data"),
                   "--max-length": (max_length, "data"), "--task": (task, "model data"),
                   "--eval": (eval_path, "data")})  # fmt: skip
    fault: GraftError | None = None
    if kind == "model":
        from graftlm.cli.inspect_model import describe_model, show_model

        found = describe_model(what, task or "auto", method)
        print_json(found) if as_json else show_model(found)
    elif kind == "adapter":
        from graftlm.cli.inspect_adapter import describe_adapter, show_adapter

        found, fault = describe_adapter(Path(what).expanduser(), model)
        print_json(found) if as_json else show_adapter(found)
    else:
        from graftlm.cli.inputs import read_mapping
        from graftlm.cli.inspect_data import describe_data, show_data

        path = Path(__file__).parents[1] / "bundled" / "data" / BUNDLED_DATA[what] if what in BUNDLED_DATA else what
        found, fault = describe_data(
            Path(path), task=task or "auto", model=model or "bundled", mapping=read_mapping(mapping),
            max_length=max_length, eval_path=Path(eval_path) if eval_path else None,
        )  # fmt: skip
        print_json(found) if as_json else show_data(found)
    if fault is not None:
        raise fault


def _refuse(kind: str, flags: dict[str, tuple[object, str]]) -> None:
    """A flag that would do nothing for what is looked into is an error."""
    idle = [(flag, kinds) for flag, (value, kinds) in flags.items() if value is not None and kind not in kinds]
    if idle:
        raise UsageFault(
            Finding("L103", f"{flag} says nothing about this: it is for a {kinds.replace(' ', ' or ')}, this is "
                    f"{'an' if kind == 'adapter' else 'a'} {kind}", fix=f"leave out {flag}")
            for flag, kinds in idle
        )  # fmt: skip
