"""`graftlm init`: a commented run file for a data file, or out of another tool's settings."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from graftlm.cli.output import say
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import EnvironmentFault, Finding
from graftlm.settings import RunSettings, to_yaml, translate
from graftlm.settings.schema import DataSettings, ModelSettings

__all__ = ["verb"]


@click.command(
    "init",
    cls=Verb,
    arguments=[("DATA", "data file of the run, or with --from nothing")],
    examples=["graftlm init tickets.csv", "graftlm init --from axolotl.yaml -o run.yaml"],
)
@click.argument("data", required=False)
@click.option("-m", "--model", metavar="MODEL", help="Base model: bundled, a folder or a hub id.")
@click.option("--from", "foreign", metavar="FILE", help="Settings of peft, axolotl, LLaMA-Factory or TRL to translate.")
@click.option("-o", "--out", default="run.yaml", metavar="FILE", help="Where to write it (run.yaml).")
def verb(data: str | None, model: str | None, foreign: str | None, out: str) -> None:
    """Write a run file with every setting, what it means and its usual range; settings of other tools are translated.

    What is changed and what is left out is listed. Nothing is overwritten.
    """
    if data is None and foreign is None:
        raise UsageFault(
            Finding("L103", "init wants a data file, or --from a settings file", fix="graftlm init tickets.csv")
        )
    place = Path(out)
    if place.exists():
        free = next(p for n in range(2, 1000) if not (p := place.with_stem(f"{place.stem}-{n}")).exists())
        raise UsageFault(Finding("L107", f"{out} exists already", fix=f"-o {shlex.quote(str(free))}"))
    settings = RunSettings()
    if foreign is not None:
        found = translate(Path(foreign))
        settings = found.settings
        for line in (*found.changed, *found.left_out):
            say(line)
    if data is not None:
        if not data.startswith("bundled:") and not Path(data).is_file():
            raise UsageFault(Finding("D101", f"no file {data!r}", fix="graftlm init tickets.csv"))
        settings = settings.model_copy(update={"data": DataSettings(**{**settings.data.model_dump(), "path": data})})
    if model is not None:
        settings = settings.model_copy(
            update={"model": ModelSettings(**{**settings.model.model_dump(), "name": model})}
        )
    try:
        place.write_text(to_yaml(settings, only_changed=False), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(Finding("E112", f"cannot write {out}: {error.strerror}", fix="-o run.yaml")) from error
    click.echo(f"wrote {out}    next: graftlm check -c {shlex.quote(out)}")
