"""A run whose losses explode stops, says at which step and what to try, and keeps the last adapter that was good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from graftlm.errors import RunError
from graftlm.training import GraftTrainer
from training.tiny_runs import Tiny, record_of


def _times(patch: pytest.MonkeyPatch, factor: dict[int, float]) -> None:
    """Multiply the loss of the steps in `factor`."""
    real = GraftTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return real(self, model, inputs, *args, **options) * factor.get(self.state.global_step + 1, 1.0)

    patch.setattr(GraftTrainer, "compute_loss", compute_loss)


def test_it_stops_and_keeps_the_last_good_checkpoint(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _times(monkeypatch, dict.fromkeys(range(9, 30), 50.0))
    with pytest.raises(RunError, match=r"explodes.* at step 11,.*adapter of checkpoint-8 is kept") as caught:
        tiny(answered, steps=30, save_every=1, keep_checkpoints=1, learning_rate=0.004, accumulate=2)
    assert caught.value.findings[0].code == "U115"
    assert caught.value.findings[0].fix.startswith("--lr 0.001")
    assert record_of(tmp_path / "run")["status"] == "failed"
    good = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-8" / "adapter.safetensors")
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(map(float, (t.double().sum() for t in kept.values()))) == sorted(
        map(float, (t.double().sum() for t in good.values()))
    )


def test_single_steps_and_large_losses_are_no_explosion(
    tiny: Tiny, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _times(monkeypatch, {at: 50.0 for at in range(7, 13) if at % 3})
    assert tiny(answered, steps=12).record["status"] == "done"
    _times(monkeypatch, dict.fromkeys(range(30), 100.0))
    assert tiny(answered, steps=12, out="large").record["status"] == "done"
