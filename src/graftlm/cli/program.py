"""The program itself: which verbs there are, how the one that is called is found, and how every error ends.

A user's error is told on standard error without a traceback, with exit code 2; Ctrl-C ends with 130. Anything else is
a defect, and its traceback is shown.

Example:
    >>> main(["explain", "S101"])                                                               # doctest: +SKIP
    0
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click

import graftlm
from graftlm.cli.output import show_error
from graftlm.cli.usage import HELP, UsageFault, as_usage_fault
from graftlm.errors import Finding, GraftError, nearest

__all__ = ["VERBS", "main", "program"]

VERBS: dict[str, str] = {
    "init": "Write a commented run file, or translate another tool's",
    "check": "Tell everything that is wrong with a run, without training",
    "plan": "Say what a run would take, before it is started",
    "train": "Train an adapter on a data file",
    "evaluate": "Score an adapter beside its untouched base",
    "compare": "Compare methods on the same rows, with verdicts",
    "choose": "Choose a method within limits of memory and time",
    "report": "Write the page of a run or a comparison again",
    "export": "Write an adapter for other programs, proven equal",
    "predict": "Label texts with a trained classifier",
    "generate": "Answer prompts, or continue texts",
    "chat": "Talk with a model",
    "inspect": "Look into a model, an adapter or a data file",
    "methods": "List the methods with their settings",
    "runs": "List runs, show, compare, repeat, resume or remove them",
    "doctor": "Look whether this machine and installation can do the work",
    "explain": "Say what the code of an error means",
}
"""Every verb with its line in the help; the verb `x` is `verb` in the module `graftlm.cli.x`."""

_OTHER_NAMES = {
    "init": "new create config import translate",
    "check": "verify lint dry-run",
    "plan": "estimate memory cost budget fits",
    "train": "finetune fine-tune tune fit sft learn",
    "evaluate": "eval test score validate",
    "compare": "versus vs benchmark ablate",
    "choose": "select search tune-hyperparameters autotune",
    "report": "page html dashboard",
    "export": "merge convert save publish",
    "predict": "classify infer inference label",
    "generate": "complete run sample prompt",
    "chat": "talk repl interact",
    "inspect": "show info describe summary tree look",
    "methods": "list method",
    "runs": "history jobs ls repeat resume",
    "doctor": "diagnose env environment",
    "explain": "why error code",
}
_VERB_OF = {word: verb for verb, words in _OTHER_NAMES.items() for word in words.split()}
_EXAMPLES = (
    "graftlm train tickets.csv",
    "graftlm train faq.jsonl -m models/qwen --method 'lora(rank=8)'",
    "graftlm chat runs/faq-1 --vs base",
)


class Program(click.Group):
    """The group of all verbs; a verb's module is imported when the verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb, or None."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"graftlm.cli.{cmd_name}").verb
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that the first word names. Raises UsageFault with the nearest verb."""
        word = args[0]
        if word in VERBS or word.startswith("-"):
            return super().resolve_command(ctx, args)
        raise UsageFault(_no_such_verb(word, args[1:]))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list of verbs, without importing any of them; examples below."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))
        with formatter.section("Examples"):
            for line in _EXAMPLES:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _no_such_verb(word: str, rest: Sequence[str]) -> Finding:
    tail = shlex.join(rest)
    if word == "help":
        verb = next((f"{name} " for name in rest if name in VERBS), "")
        return Finding("L101", "no such verb 'help'", fix=f"graftlm {verb}--help")
    if Path(word).is_file():
        fix = f"graftlm train {shlex.join([word, *rest])}"
        return Finding("L101", f"{word!r} is a file, not a verb. Did you mean train?", fix=fix)
    close = [_VERB_OF[word.lower()]] if word.lower() in _VERB_OF else nearest(word, VERBS, most=1)
    if not close:
        return Finding("L101", f"no such verb {word!r}. There are: {', '.join(VERBS)}", fix="graftlm --help")
    return Finding(
        "L101", f"no such verb {word!r}. Did you mean {close[0]}?", fix=f"graftlm {close[0]} {tail}".rstrip()
    )


@click.group(
    cls=Program,
    context_settings=HELP,
    invoke_without_command=True,
    subcommand_metavar="VERB ...",
    options_metavar="",
)
@click.version_option(
    graftlm.__version__, prog_name="graftlm", message="%(prog)s %(version)s", help="Print the version."
)
@click.pass_context
def program(ctx: click.Context) -> None:
    """Adapt a language model to your data by training a small addition to it.

    The result is an adapter: a small file beside a base model that stays as it is. graftlm VERB --help tells more.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line with `args` (by default those of the process) and give the exit code."""
    # No one's use of the tool is reported anywhere; tokenizers are used before a process is forked, or not at all.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where it is installed, transformers imports it, and it speaks of kernels of its own that no verb needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if args is None else args)
    try:
        result = program.main(
            args=words, prog_name="graftlm", standalone_mode=False, obj=shlex.join(["graftlm", *words])
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except GraftError as error:
        show_error(error)
        return 2
    except click.ClickException as error:
        show_error(as_usage_fault(error))
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader has left: nothing more to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
