"""Verbs that open a model lay its base over devices and disk where they are asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from graftlm.cli.program import program
from graftlm.training import opening

WORDS = ["--device-map", "auto", "--max-memory", "cpu=8MB,0=2GiB", "--offload-folder", "disk"]
GIVEN = {"device_map": "auto", "max_memory": {"cpu": "8MB", "0": "2GiB"}, "offload_folder": "disk"}


class OpenedError(Exception):
    """In the place of loading."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `load_base` is given."""
    found: list[dict[str, Any]] = []

    def load_base(*_: Any, **options: Any) -> Any:
        found.append(options)
        raise OpenedError

    monkeypatch.setattr(opening, "load_base", load_base)
    return found


@pytest.mark.parametrize("verb", ["generate", "chat", "evaluate", "evaluate --harness", "predict"])
def test_verbs_pass_on_where_the_base_lies(
    asked: list[dict[str, Any]], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "bundled", "graftlm": {"task": "lm"}}')
    monkeypatch.setattr("graftlm.training.evaluating.need_harness", lambda: None)
    words: dict[str, list[str]] = {
        "generate": ["generate", "bundled", "hello"],
        "chat": ["chat", "bundled"],
        "evaluate": ["evaluate", "bundled", str(rows)],
        "evaluate --harness": ["evaluate", "bundled", "--harness", "hellaswag"],
        "predict": ["predict", str(adapter), "hello"],
    }
    monkeypatch.setattr(opening, "read_facts", lambda _: {"base": "bundled"})
    for more, given in ((WORDS, GIVEN), ([], dict.fromkeys(GIVEN))):
        asked.clear()
        done = CliRunner().invoke(program, [*words[verb], *more])
        assert isinstance(done.exception, OpenedError), done.output
        assert {name: asked[0].get(name) for name in GIVEN} == given


def test_sizes_that_are_none_are_told(cli: Callable[..., Any]) -> None:
    done = cli("generate", "bundled", "hello", "--device-map", "auto", "--max-memory", "lots")
    assert done.code == 2
    assert "cpu=8GiB" in done.err
    done = cli("generate", "bundled", "hello", "--max-memory", "cpu=1GiB")
    assert done.code == 2
    assert "device_map=auto" in done.err


def test_a_base_partly_on_disk_writes_the_same(cli: Callable[..., Any]) -> None:
    words = ["generate", "bundled", "It was a dark", "--raw", "--max-new-tokens", "4"]
    whole = cli(*words)
    parts = cli(*words, "--device-map", "auto", "--max-memory", "cpu=12MB")
    assert (whole.code, parts.code) == (0, 0)
    assert parts.out == whole.out
