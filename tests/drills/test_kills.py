"""Kill drill: a run that is killed again and again, anywhere, ends with the very bytes of one that is left in peace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from drills.killing import attempt
from graftlm.cli import main
from graftlm.training.checkpoint import latest
from training.tiny_runs import adapter_bytes, answered_rows, leave_out_the_slow, metrics_of, record_of, write_jsonl

#: Places within the writing of a checkpoint, an adapter or the record, where a process may die.
PLACES = (
    "graftlm.formats.atomic._put",
    "graftlm.formats.atomic._to_disk",
    "graftlm.formats.atomic.write_manifest",
    "graftlm.training.checkpoint._random_numbers",
    "graftlm.training.checkpoint._save",
    "graftlm.training.checkpoint.write_manifest",
    "graftlm.training.trainer.rotate_checkpoints",
    "graftlm.training.folder.write_json",
    "graftlm.formats.peft.save_file",
)


def drill(base: Path, folder: Path, kills: int, steps: int, seed: int) -> None:
    data = write_jsonl(folder / "answered.jsonl", answered_rows())
    settings: dict[str, Any] = {
        "data": data, "base": base, "method": "lora(rank=2,targets=attention,dropout=0.1)", "batch": 4, "accumulate": 2,
        "steps": steps, "save_every": 2, "eval_every": 5, "samples": 1, "max_new_tokens": 4, "threads": 1,
    }  # fmt: skip
    code, whole_s = attempt(settings, folder / "whole")
    assert code == 0
    draw = random.Random(seed)
    killed = tries = run = 0
    while killed < kills:
        tries += 1
        assert tries < 10 * kills + 10, "the kills do not meet the run"
        here = folder / f"run-{run}"
        if tries % 2:
            code, _ = attempt(settings, here, kill_after_s=draw.uniform(0.02, 0.98) * whole_s)
        else:
            code, _ = attempt(settings, here, kill_in=(draw.choice(PLACES), draw.randrange(1, 4)))
        assert code in (0, -9), f"attempt {tries} ended with {code}"
        killed += code == -9
        # The newest is whole; an old one may be half removed.
        assert not latest(here / "checkpoints")[1], "a kill left half a checkpoint under its final name"
        if code == 0:  # a run came through: the next kills are for another one
            _check(here, folder / "whole")
            run += 1
    here = folder / f"run-{run}"
    if here.exists():
        assert attempt(settings, here)[0] == 0
        _check(here, folder / "whole")


def _check(run: Path, whole: Path) -> None:
    assert record_of(run)["status"] == "done"
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert record_of(run)["results"] == record_of(whole)["results"]
    seen = [[(row["step"], "loss" in row, row.get("eval_loss")) for row in metrics_of(at)] for at in (run, whole)]
    assert seen[0] == seen[1]
    assert not [left.name for left in run.rglob(".*graftlm*")], "a killed writer's folder was left"


def test_three_kills(tiny_base: Path, tmp_path: Path) -> None:
    drill(tiny_base, tmp_path, kills=3, steps=8, seed=0)


def test_runs_resume_ends_as_if_there_had_been_no_kill(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "data": write_jsonl(tmp_path / "answered.jsonl", answered_rows()), "base": tiny_base, "steps": 6, "batch": 4,
        "method": "lora(rank=2,targets=attention,dropout=0.1)", "save_every": 2, "samples": 0, "threads": 1,
    }  # fmt: skip
    assert attempt(settings, tmp_path / "whole")[0] == 0
    killed = tmp_path / "killed"
    assert attempt(settings, killed, kill_in=("graftlm.training.trainer.rotate_checkpoints", 2))[0] == -9
    assert latest(killed / "checkpoints")[0] is not None
    leave_out_the_slow(monkeypatch.setattr)
    assert main(["runs", "resume", "killed", "--folder", str(tmp_path)]) == 0
    _check(killed, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills(seed: int, tiny_base: Path, tmp_path: Path) -> None:
    drill(tiny_base, tmp_path, kills=20, steps=60, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_in_every_place_of_writing(place: str, tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "answered.jsonl", answered_rows())
    settings: dict[str, Any] = {
        "data": data, "base": tiny_base, "method": "lora(rank=2,targets=attention,dropout=0.1)", "batch": 4, "steps": 6,
        "save_every": 2, "eval_every": 3, "samples": 1, "max_new_tokens": 4, "threads": 1, "keep_checkpoints": 1,
    }  # fmt: skip
    assert attempt(settings, tmp_path / "whole")[0] == 0
    for call in (1, 2, 3):
        folder = tmp_path / f"run-{call}"
        code, _ = attempt(settings, folder, kill_in=(place, call))
        if code == 0:
            continue
        assert code == -9
        assert attempt(settings, folder)[0] == 0
        assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")
