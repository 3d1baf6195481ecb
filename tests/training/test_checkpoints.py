"""Checkpoints and resuming: what is in a checkpoint, what a stopped run goes on from, and that nothing shows of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftlm.errors import GraftError, RunError
from graftlm.formats.atomic import check_manifest
from graftlm.training import GraftTrainer, checkpoint, train
from training.tiny_runs import (
    FAST,
    LORA,
    Tiny,
    adapter_bytes,
    answered_rows,
    metrics_of,
    record_of,
    same,
    weights,
    write_jsonl,
)

DROPPING = "lora(rank=2,targets=attention,dropout=0.1)"
#: Eight steps of two micro-batches, a checkpoint after every second one.
LONG: dict[str, Any] = {
    "method": DROPPING, "batch": 4, "accumulate": 2, "steps": 8, "save_every": 2, "eval_every": 4, "keep_checkpoints": 3,
}  # fmt: skip


class _Stop(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End a run without any farewell once `step` is done and its checkpoint is written."""
    real = GraftTrainer._maybe_log_save_evaluate

    def then_stop(self: GraftTrainer, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        if self.state.global_step == step:
            raise _Stop

    monkeypatch.setattr(GraftTrainer, "_maybe_log_save_evaluate", then_stop)


def stopped(tiny: Tiny, data: Path, step: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(_Stop):
            tiny(data, **settings)


def interrupted(tiny: Tiny, data: Path, step: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """A run that is sent Ctrl-C within `step`."""
    real = GraftTrainer.training_step

    def training_step(self: GraftTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            if not getattr(self, "_told", False):
                os.kill(os.getpid(), signal.SIGINT)
            self._told = True
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GraftTrainer, "training_step", training_step)
        return tiny(data, **settings)


def seen(folder: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says, without times and means over steps that a stop divides."""
    return [(row["step"], row.get("learning_rate"), row.get("eval_loss")) for row in metrics_of(folder)]


# --- what is in it ---


def test_a_checkpoint_holds_the_adapter_and_never_the_base(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, **LONG)
    folder = run.folder / "checkpoints" / "checkpoint-8"
    assert {file.name for file in folder.iterdir()} == {
        "adapter.safetensors", "optimizer.safetensors", "random.safetensors", "schedule.json", "trainer_state.json",
        "manifest.json",
    }  # fmt: skip
    assert load_file(folder / "adapter.safetensors").keys() == run.adapter.state().keys()
    assert all("lora" in name for name in run.adapter.state())
    numbers = run.adapter.parameter_count
    assert sum(t.numel() for t in load_file(folder / "optimizer.safetensors").values()) < 2 * numbers + 100
    assert not check_manifest(folder)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000


def test_nothing_in_a_run_is_pickled_or_large(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, **LONG)
    files = [file for file in run.folder.rglob("*") if file.is_file()]
    assert len(files) > 15
    assert not [file for file in files if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert max(file.stat().st_size for file in files) < 100_000  # the base has over 500,000
    assert not [file for file in files if file.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")]


def test_only_so_many_checkpoints_are_kept_and_they_are_the_latest(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, steps=6, save_every=1, eval_every=1, keep_checkpoints=2, learning_rate=0.3)
    kept = sorted(folder.name for folder in (run.folder / "checkpoints").iterdir())
    assert kept == ["checkpoint-5", "checkpoint-6"]


# --- going on ---


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    step: int, tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(answered, out="whole", **LONG)
    stopped(tiny, answered, step, monkeypatch, **LONG)
    assert record_of(tmp_path / "run")["status"] == "running"
    run = tiny(resume_only=True)
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert run.record["status"] == "done"
    assert run.record["results"] == whole.record["results"]
    assert seen(run.folder) == seen(whole.folder)


def test_a_run_without_a_checkpoint_starts_anew(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(answered, out="whole", **LONG)
    stopped(tiny, answered, 1, monkeypatch, **LONG)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    run = tiny(resume_only=True)
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)


def test_a_classifier_resumes_with_its_head(tiny: Tiny, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny(labelled, out="whole", **LONG)
    stopped(tiny, labelled, 5, monkeypatch, **LONG)
    assert adapter_bytes(tiny(resume_only=True).folder) == adapter_bytes(whole.folder)


@pytest.mark.parametrize("step", [3, 4, 8])
def test_ctrl_c_leaves_a_run_that_can_be_used_and_taken_up(
    step: int, tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    whole = tiny(answered, out="whole", **LONG)
    first = interrupted(tiny, answered, step, monkeypatch, **LONG)
    assert signal.getsignal(signal.SIGINT) is before
    assert first.record["status"] == ("stopped" if step < 8 else "done")
    assert first.record["steps"] == step
    assert first.record["results"]["scores"][0]["loss"] > 0
    assert (first.folder / "eval" / "samples.jsonl").exists()
    if step == 8:
        return
    assert (first.folder / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert "Ctrl-C again stops at once" in (first.folder / "log.txt").read_text()
    run = tiny(resume_only=True)
    assert run.record["status"] == "done"
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)
    assert run.record["started"] == first.record["started"]


def test_ctrl_c_twice_stops_at_once_and_can_be_taken_up(
    tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(answered, out="whole", **LONG)
    real = GraftTrainer.training_step

    def training_step(self: GraftTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GraftTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            tiny(answered, **LONG)
    assert adapter_bytes(tiny(resume_only=True).folder) == adapter_bytes(whole.folder)


# --- damage ---


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("name", "how"),
    [("adapter.safetensors", "cut"), ("optimizer.safetensors", "changed"), ("manifest.json", "gone"), ("schedule.json", "gone")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_and_said(
    name: str, how: str, tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(answered, out="whole", **LONG)
    stopped(tiny, answered, 7, monkeypatch, **LONG)
    damage(tmp_path / "run" / "checkpoints" / "checkpoint-6" / name, how)
    run = tiny(resume_only=True)
    log = (run.folder / "log.txt").read_text()
    assert "damaged  checkpoint-6 is passed over" in log
    assert "resume   from checkpoint-4" in log
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)


def test_when_every_checkpoint_is_damaged_nothing_is_done(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny, answered, 7, monkeypatch, **LONG)
    checkpoints = tmp_path / "run" / "checkpoints"
    for folder in checkpoints.iterdir():
        damage(folder / "adapter.safetensors", "cut")
    before = {
        file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file() and file.name != "log.txt"
    }
    with pytest.raises(
        RunError, match="every checkpoint in .* is damaged: checkpoint-6, checkpoint-4, checkpoint-2"
    ) as caught:
        tiny(resume_only=True)
    assert caught.value.findings[0].code == "U120"
    assert "rm -r" in caught.value.findings[0].fix
    changed = [file.name for file, data in before.items() if not file.exists() or file.read_bytes() != data]
    assert changed in ([], ["run.json"])


def test_reading_a_damaged_checkpoint_is_refused(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    run = tiny(answered, **LONG)
    folder = run.folder / "checkpoints" / "checkpoint-8"
    damage(folder / "adapter.safetensors", "changed")
    with pytest.raises(RunError, match="checkpoint-8 is damaged"):
        checkpoint.load_adapter_state(folder, run.adapter)


def test_random_state_comes_back_whole(tmp_path: Path, tiny: Tiny, answered: Path) -> None:
    import random

    import numpy as np

    folder = tiny(answered, **LONG).folder / "checkpoints" / "checkpoint-8"

    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1)), float(np.random.randn())]

    checkpoint.load_random_state(folder)
    first = draws()
    draws()
    checkpoint.load_random_state(folder)
    assert draws() == first


# --- refusals ---


def test_other_settings_cannot_take_up_a_run(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny, answered, 3, monkeypatch, **LONG)
    with pytest.raises(RunError) as caught:
        tiny(answered, resume=True, **{**LONG, "learning_rate": 0.01, "seed": 4})
    assert caught.value.findings[0].code == "U103"
    assert caught.value.findings[0].detail == (
        "train.learning_rate: None there, 0.01 asked for",
        "train.seed: 0 there, 4 asked for",
    )
    assert str(tmp_path / "run-2") in caught.value.findings[0].fix
    assert tiny(answered, resume=True, **LONG).record["status"] == "done"


def test_a_run_that_is_done_is_left_alone(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    tiny(answered)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    for code, options in (("U105", {"resume": True}), ("U104", {}), ("U103", {"seed": 3})):
        with pytest.raises(RunError) as caught:
            tiny(answered, **options)
        assert caught.value.findings[0].code == code
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


@pytest.mark.parametrize("what", ["data", "base"])
def test_what_a_run_began_with_must_be_there_still(
    what: str, tiny: Tiny, tiny_base: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from training.tiny_runs import save_llama

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    stopped(tiny, answered, 3, monkeypatch, **LONG, base=base)
    if what == "data":
        write_jsonl(answered, answered_rows(21))
    else:
        save_llama(base, initializer_range=0.1)
    with pytest.raises(RunError, match=f"the {what}.* changed since") as caught:
        tiny(resume_only=True)
    assert caught.value.findings[0].code == "U109"
    assert record_of(tmp_path / "run")["status"] == "running"


def test_nothing_to_resume(tiny: Tiny, answered: Path) -> None:
    with pytest.raises(GraftError, match="no run.json"):
        tiny(answered, resume=True)
    with pytest.raises(GraftError, match="no run.json|not a run folder"):
        tiny(resume_only=True)


def test_what_a_kill_at_the_very_start_leaves_is_no_hindrance(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    for name in ("checkpoints", "data", "eval"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "run.tmp").write_text("{")
    assert tiny(answered).record["status"] == "done"


def test_a_folder_of_other_things_is_left_alone(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty") as caught:
        tiny(answered)
    assert caught.value.findings[0].code == "U107"


# --- rows from Python ---


def test_rows_of_a_failed_call_do_not_come_back(tiny_base: Path, tmp_path: Path) -> None:
    bad = [{"prompt": "Hello", "completion": None}] * 10
    options = {"base": tiny_base, "method": LORA, "output": tmp_path / "run", "quiet": True, **FAST}
    with pytest.raises(GraftError):
        train(bad, **options)
    assert not (tmp_path / "run").exists()


def test_rows_of_another_call_are_not_trained_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped(tiny, answered_rows(), 3, monkeypatch, **LONG)
    with pytest.raises(RunError, match="holds a run of other rows"):
        tiny(answered_rows(30), resume=True, **LONG)
    run = tiny(answered_rows(), resume=True, **LONG)
    assert run.record["status"] == "done"
    assert run.record["data"]["train_rows"] + run.record["data"]["eval_rows"] == 20


# --- early stopping ---


def scripted(patch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Give the evaluations after certain steps certain losses."""
    real = GraftTrainer.evaluate

    def evaluate(self: GraftTrainer, *args: Any, **options: Any) -> dict[str, float]:
        self.evaluate_with = lambda: {"eval_loss": values[self.state.global_step]}
        return real(self, *args, **options)

    patch.setattr(GraftTrainer, "evaluate", evaluate)


STOPPING: dict[str, Any] = {
    "steps": 12,
    "eval_every": 2,
    "early_stopping": 2,
    "method": DROPPING,
    "schedule": "constant",
}
LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4, 10: 1.0, 12: 1.0}


@pytest.mark.parametrize("save_every", [None, 3, 5])
def test_early_stopping_keeps_the_best_whenever_checkpoints_are_written(
    save_every: int | None, tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    run = tiny(answered, **STOPPING, save_every=save_every)
    assert run.record["steps"] == 8
    best = load_file(run.folder / "checkpoints" / "checkpoint-4" / "adapter.safetensors")
    assert same(best, run.adapter.state())
    last = [row["step"] for row in metrics_of(run.folder)][-1]
    assert last == 8


@pytest.mark.parametrize("step", [4, 6, 7, 8])
def test_early_stopping_goes_on_counting_after_a_stop(
    step: int, tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    whole = tiny(answered, out="whole", **STOPPING)
    stopped(tiny, answered, step, monkeypatch, **STOPPING)
    run = tiny(resume_only=True)
    assert run.record["steps"] == 8
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)


def test_ctrl_c_in_the_middle_of_an_epoch_does_not_count_as_an_evaluation(
    tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {4: 3.0, 8: 2.0, 12: 2.5})
    settings = {"epochs": 3.0, "early_stopping": 1, "method": DROPPING}
    whole = tiny(answered, out="whole", **settings)
    interrupted(tiny, answered, 6, monkeypatch, **settings)
    run = tiny(resume_only=True)
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)


def test_a_moved_run_still_finds_its_best(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    whole = tiny(answered, out="whole", **STOPPING)
    stopped(tiny, answered, 8, monkeypatch, **STOPPING)
    (tmp_path / "run").rename(tmp_path / "moved")
    run = train(output=tmp_path / "moved", resume=True, quiet=True)
    assert same(weights(run), weights(whole))
