"""A model that writes: with its adapter, as its base, or both; what `generate` and `chat` have in common."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from graftlm.cli.place import kind_of
from graftlm.cli.placing import placing_flags
from graftlm.cli.usage import UsageFault
from graftlm.errors import DataError, Finding

__all__ = ["Speaker", "open_speaker", "refusals_told", "writing_flags"]


@dataclass(frozen=True)
class Speaker:
    """An opened model; `tuned` tells whether it has an adapter, `template` is None where texts are continued."""

    model: Any
    tokenizer: Any
    template: Any
    tuned: bool

    @contextmanager
    def speaking(self, who: str) -> Iterator[None]:
        """The base alone acts in the block if `who` is `base`, else what is attached."""
        if who != "base" or not self.tuned:
            yield
            return
        from graftlm.core import use

        with use(self.model, None):
            yield


@contextmanager
def refusals_told() -> Iterator[None]:
    """A conversation that the model's chat template refuses is a user's error, not a defect."""
    from graftlm.data.templates import TemplateFault

    try:
        yield
    except TemplateFault as fault:
        message = f"the model's chat template refuses this conversation: {fault}"
        raise DataError(Finding("D141", message)) from None


def writing_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that say how text is written; defaults and limits are those of the settings."""
    from graftlm.settings import SETTINGS

    tokens, heat, top_p = (SETTINGS[f"generate.{key}"] for key in ("max_new_tokens", "temperature", "top_p"))
    options = (
        click.option(
            "--max-new-tokens", type=click.IntRange(1), metavar="COUNT", default=tokens.default, show_default=True,
            help=tokens.text,
        ),
        click.option(
            "--temperature", type=click.FloatRange(0, 10), metavar="NUMBER", default=heat.default, show_default=True,
            help=heat.text,
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="NUMBER", default=top_p.default,
            show_default=True, help=top_p.text,
        ),
        click.option(
            "--seed", type=click.IntRange(0), metavar="COUNT", default=0, show_default=True,
            help=SETTINGS["train.seed"].text,
        ),
        click.option("--vs", type=click.Choice(["base"]), help="Answer with the untouched base as well."),
        click.option(
            "-m", "--model", "--base", "base", metavar="MODEL", help="The base model, where it is not where it was."
        ),
    )  # fmt: skip
    function = placing_flags(function)
    for option in reversed(options):
        function = option(function)
    return function


def open_speaker(
    what: str, *, base: str | None, vs: str | None, temperature: float, top_p: float, **placing: Any
) -> Speaker:
    """The model that `what` means: a run, an adapter or a base model; `placing` as in `open_adapter`.

    Raises UsageFault for a model that does not write, for flags that would do nothing, and where nothing is at `what`.
    """
    faults = []
    kind = kind_of(what)
    if kind == "model" and vs:
        faults.append(Finding("L104", f"{what} is a base model: there is nothing to compare it with", fix="no --vs"))
    if kind == "model" and base:
        faults.append(Finding("L104", f"{what} is a base model itself", fix=f"leave out --model {base}"))
    if temperature == 0 and top_p < 1:
        message = f"--top-p {top_p:g} does nothing at --temperature 0, which takes the likeliest token"
        faults.append(Finding("L103", message, fix="--temperature 0.7"))
    if faults:
        raise UsageFault(faults)
    from graftlm.core.kind import head_kind
    from graftlm.report.content import next_verb
    from graftlm.training import open_adapter

    opened = open_adapter(Path(what).expanduser() if kind == "adapter" else what, base=base, **placing)
    silent = opened.task in ("classify", "regress", "tag", "reward", "mlm")
    if silent or head_kind(type(opened.model).__name__) == "sequence":  # choices by an encoder
        message = f"{what} was trained for {opened.task}, not to write"
        raise UsageFault(Finding("L105", message, fix=f"graftlm {next_verb(opened.task, shlex.quote(what))}"))
    return Speaker(opened.model, opened.tokenizer, opened.template, opened.adapter is not None)
