"""Help is short and quick, and costs no heavy import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import click
import pytest

from graftlm.cli.program import VERBS
from graftlm.cli.usage import Verb

_SCRIPT = """
import sys, time
import click, pydantic, rich.console, ruamel.yaml
below_s = time.process_time()
from graftlm.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "sklearn", "datasets") if name in sys.modules]
print(f"{code} {below_s:.3f} {time.process_time():.3f} {heavy}", file=sys.stderr)
"""


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_short_quick_and_light(verb: str) -> None:
    words = [verb, "--help"] if verb else ["--help"]
    ran = subprocess.run([sys.executable, "-c", _SCRIPT, *words], capture_output=True, text=True, check=True)
    code, below_s, cpu_s, heavy = ran.stderr.strip().splitlines()[-1].split(" ", 3)
    assert (code, heavy) == ("0", "[]")
    # Processor time, and at most four times what Python and the libraries below take: a slow machine must not fail it.
    assert float(cpu_s) < max(0.5, 4 * float(below_s))
    lines = ran.stdout.splitlines()
    assert 5 < len(lines) <= 60
    at = lines.index("Examples:")
    assert 2 <= len(lines) - at - 1 <= 4
    assert all(line.strip().startswith(("graftlm ", "cat ")) for line in lines[at + 1 :])
    assert "\x1b" not in ran.stdout


def test_no_verb_prints_the_help(cli: Callable) -> None:
    bare, asked = cli(), cli("--help")
    assert (bare.code, bare.out) == (0, asked.out)
    assert all(f"  {verb} " in bare.out for verb in VERBS)


def test_module_can_be_run() -> None:
    ran = subprocess.run([sys.executable, "-m", "graftlm", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("graftlm 0")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_tells_of_its_arguments_and_flags(name: str) -> None:
    verb = import_module(f"graftlm.cli.{name}").verb
    assert isinstance(verb, Verb)
    assert verb.name == name
    arguments = [param for param in verb.params if isinstance(param, click.Argument)]
    assert len(verb.arguments) == len(arguments)
    options = [param for param in verb.params if isinstance(param, click.Option)]
    assert all(option.help for option in options)
