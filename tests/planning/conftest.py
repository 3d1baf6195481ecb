"""Runs the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`cli("plan", "--json")` gives code, out and err."""

    def run(*words: str) -> Any:
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run
