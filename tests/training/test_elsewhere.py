"""A run can be opened and scored from another directory than the one it was started in."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.training import evaluate, open_adapter, train
from training.tiny_runs import FAST


def test_a_run_is_opened_and_scored_from_elsewhere(
    answered: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(answered.parent)
    (answered.parent / "their-base").symlink_to(tiny_base)
    run = train(answered.name, base="./their-base", output=tmp_path / "run", quiet=True, **FAST)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_adapter(tmp_path / "run").adapter is not None
    assert evaluate(tmp_path / "run")["scores"][0]["loss"] == pytest.approx(run.metrics["loss"])
