"""What every verb shares: the form of its help, and the answer to a flag or an argument that does not exist.

A flag of another tool (`--num_train_epochs`, `--lora_r`) is answered with what it is called here, as in a run file.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import click

from graftlm.errors import Finding, GraftError, nearest

__all__ = ["CODES", "HELP", "UsageFault", "Verb", "as_usage_fault"]

CODES: dict[str, str] = {
    "L101": "a verb that does not exist",
    "L102": "a flag that does not exist, or that is called otherwise in another tool",
    "L103": "a flag or an argument is missing, superfluous or of the wrong kind",
    "L104": "what a verb is to work on is not there, or is something else",
    "L105": "the adapter was trained for another kind of task than the verb needs",
    "L106": "there is nothing to work on: no text, no prompt",
    "L107": "the output cannot be written there",
    "L108": "something would be removed, and it was not said that this is meant",
}
"""Every code that the command line itself can give, with its meaning in one line."""

HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_SURE = 0.85  # how alike a flag must be to one of the verb's own to be taken for a slip of the hand


class UsageFault(GraftError, ValueError):
    """The command line cannot be understood, or names what is not there. Codes L1xx."""


class Verb(click.Command):
    """A verb: `arguments` are told of in its help with a line each, `examples` are lines to paste."""

    def __init__(
        self, *args: Any, arguments: Sequence[tuple[str, str]] = (), examples: Sequence[str] = (), **rest: Any
    ) -> None:
        super().__init__(*args, **{"context_settings": HELP, "options_metavar": "[FLAGS]", **rest})
        self.arguments, self.examples = arguments, examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words after the verb. Raises UsageFault with every flag that does not exist."""
        strange = list(_strange_flags(self, args))
        if strange:
            raise UsageFault(_answers(self, strange))
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Arguments, then flags."""
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(list(self.arguments))
        records = [param.get_help_record(ctx) for param in self.get_params(ctx) if _names(param)]
        with formatter.section("Flags"):
            formatter.write_dl([(names, text.rstrip(".")) for names, text in filter(None, records)])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Examples, unwrapped so that they can be pasted."""
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def as_usage_fault(error: click.ClickException) -> UsageFault:
    """What click has to say, as an error of ours."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    detail: tuple[str, ...] = ()
    fix = "graftlm --help"
    if context is not None:
        detail = (" ".join(context.get_usage().removeprefix("Usage: ").split()),)
        fix = f"{context.command_path} --help"
    return UsageFault(Finding("L103", message[:1].lower() + message[1:], fix=fix, detail=detail))


def _names(param: click.Parameter) -> list[str]:
    return list(param.opts) + list(param.secondary_opts) if isinstance(param, click.Option) else []


def _strange_flags(verb: click.Command, args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags among `args` that the verb does not have, each with the value that seems to be its own."""
    known = {name: param for param in verb.params for name in _names(param)}
    flags = {name for name, param in known.items() if getattr(param, "is_flag", False)} | set(HELP["help_option_names"])
    at = 0
    while at < len(args):
        word = args[at]
        at += 1
        if word == "--":
            return
        if not word.startswith("-") or word == "-":
            continue
        name, equals, value = word.partition("=")
        short = name if name.startswith("--") else name[:2]
        if short in known or short in flags:
            if short not in flags and not equals and short == word:
                at += 1  # the next word is its value, whatever it looks like
            continue
        if not equals and at < len(args) and not args[at].startswith("-"):
            value = args[at]
        yield name, value


def _answers(verb: Verb, strange: Sequence[tuple[str, str]]) -> list[Finding]:
    from graftlm.settings import NO_COUNTERPART, SETTINGS
    from graftlm.settings.foreign import known_elsewhere

    own = [name for param in verb.params for name in _names(param) if name.startswith("--")]
    labels = _labels(verb)
    options: dict[str, str] = {}  # of the method's text, from all flags together
    for name, value in strange:
        known = known_elsewhere(name.lstrip("-"))
        if known and known.option and value:
            options.setdefault(known.option, value)
    text = "lora(" + ",".join(f"{option}={value}" for option, value in options.items()) + ")"

    findings = []
    for name, value in strange:
        plain = name.lstrip("-").lower().replace("-", "_")
        home = next((s.name for s in SETTINGS.values() if plain in (s.key, s.name)), "")
        known = known_elsewhere(plain)
        setting = home or (known.setting if known else "")
        label = labels.get(setting) or (f"--set {setting}" if setting and "--set" in own else "")
        slip = _slip(name, own)
        if slip:
            fix = f"{slip} {shlex.quote(value)}" if value else slip
            findings.append(Finding("L102", f"no such flag {name}. Did you mean {slip}?", fix=fix))
        elif label and known and known.option and not home:
            message = f"{name} is said in the method's text here, as {known.option}"
            findings.append(Finding("L102", message, fix=f"--method {shlex.quote(text)}" if options else ""))
            options = {}  # said once
        elif label:
            note = f" ({known.note})" if known and known.note and not home else ""
            fix = "" if note else _given(label, value)
            findings.append(Finding("L102", f"{name} is called {label.split('=')[0]} here{note}", fix=fix))
        elif plain in NO_COUNTERPART and "--set" in own:
            findings.append(Finding("L102", f"{name} has no counterpart here: leave it out"))
        elif close := nearest(name, own, most=1):
            findings.append(Finding("L102", f"no such flag {name}. Did you mean {close[0]}?", fix=close[0]))
        else:
            fix = "write -- before a text that begins with -" if not name.startswith("--") else ""
            findings.append(Finding("L102", f"no such flag {name}; {verb.name} has {' '.join(own)}", fix=fix))
    return findings


def _slip(name: str, own: Sequence[str]) -> str:
    """The verb's flag that was surely meant, or nothing."""
    plain = name.lower().replace("_", "-")
    if plain in own:
        return plain
    best = max(own, key=lambda option: difflib.SequenceMatcher(None, plain, option).ratio(), default="")
    sure = best and name.startswith("--") and difflib.SequenceMatcher(None, plain, best).ratio() >= _SURE
    return best if sure else ""


def _labels(verb: click.Command) -> dict[str, str]:
    """Setting to the verb's own flag for it (`DATA` for the argument)."""
    from graftlm.settings import SETTINGS

    found: dict[str, str] = {}
    for param in verb.params:
        label = param.opts[-1] if isinstance(param, click.Option) else str(param.name).upper()
        for setting in SETTINGS.values():
            if label in setting.flags or (label.startswith("--") and param.name == setting.key):
                found[setting.name] = label
    return found


def _given(label: str, value: str) -> str:
    """The flag with its value, to paste."""
    if label == "DATA":
        return shlex.quote(value) if value else ""
    if label.startswith("--set "):
        return shlex.join(["--set", f"{label.removeprefix('--set ')}={value or 'VALUE'}"])
    return f"{label} {shlex.quote(value)}" if value else label
