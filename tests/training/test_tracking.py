"""Trackers: TensorBoard gets the numbers of metrics.jsonl; what is not installed is told before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.errors import GraftError
from training.tiny_runs import Tiny, metrics_of


def test_tensorboard_gets_the_numbers(tiny: Tiny, answered: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny(answered, steps=4, track="tensorboard")
    written = EventAccumulator(str(run.folder / "tensorboard"))
    written.Reload()
    for key, tag in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
        told = {row["step"]: row[key] for row in metrics_of(run.folder) if key in row}
        found = {event.step: event.value for event in written.Scalars(tag)}
        assert found == pytest.approx(told, rel=1e-5)
    assert not (tiny(answered, steps=1, out="plain").folder / "tensorboard").exists()


def test_what_is_not_installed_is_told_before_training(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", list)
    for name, package in (("wandb", "wandb"), ("tensorboard", "graftlm[track]")):
        with pytest.raises(GraftError, match="not installed") as caught:
            tiny(answered, track=name)
        assert (caught.value.findings[0].code, caught.value.findings[0].fix) == ("U147", f"pip install '{package}'")
    assert not (tmp_path / "run").exists()


def test_other_trackers_are_the_trainers(tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names go to the Trainer, which makes their callbacks."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    told: list[float] = []

    class Told(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **options):  # type: ignore[no-untyped-def]
            told.extend(value for key, value in logs.items() if key == "loss")

    monkeypatch.setattr(
        "transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: ["trackio"]
    )
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Told)
    run = tiny(answered, steps=2, track="trackio")
    assert told == [row["loss"] for row in metrics_of(run.folder) if "loss" in row]
