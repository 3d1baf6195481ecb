"""The trainer: what it changes, what it refuses, and what it says when a step goes wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from graftlm.core import attach
from graftlm.errors import RunError
from graftlm.methods import LoRA
from graftlm.objectives import CausalLM
from graftlm.training import GraftTrainer, open_adapter
from graftlm.training import run as run_module
from training.test_objectives import prepared, trained
from training.tiny_runs import Tiny, record_of, same, weights


def test_only_the_adapter_changes(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = prepared("sft", tiny_base, tmp_path)
    base = copy.deepcopy(model.state_dict())
    before = [p.detach().clone() for p in adapter.parameters()]
    trained(model, adapter, rows, collate, CausalLM(), tmp_path, steps=3)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))


def test_gradients_start_from_nothing_in_every_step(tiny_base: Path, tmp_path: Path) -> None:
    # With a rate of nothing every step sees the same weights and rows, so all gradients must be equal.
    model, adapter, rows, collate = prepared("sft", tiny_base, tmp_path)
    run = trained(model, adapter, rows, collate, CausalLM(), tmp_path, steps=3, learning_rate=0.0)
    for later in run.gradients[1:]:
        for one, other in zip(run.gradients[0], later, strict=True):
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)


def test_clipping_is_on_the_adapters_gradients(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = prepared("sft", tiny_base, tmp_path)
    norms: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in adapter.parameters()]).norm()))

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, max_grad_norm=1e-3, use_cpu=True, report_to="none", save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    GraftTrainer(adapter, CausalLM(), args, train_dataset=rows, data_collator=collate, callbacks=[Look()]).train()
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_nothing_to_train_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = prepared("sft", tiny_base, tmp_path)
    adapter.requires_grad_(False)
    with pytest.raises(RunError, match="nothing to train") as caught:
        trained(model, adapter, rows, collate, CausalLM(), tmp_path)
    assert caught.value.findings[0].code == "U112"


def test_a_delta_without_a_gradient_is_named(tiny_base: Path, tmp_path: Path) -> None:
    model, _, rows, collate = prepared("sft", tiny_base, tmp_path)
    model.unused = nn.Linear(4, 4)  # no forward ever calls it
    adapter = attach(model, LoRA(rank=2, targets=["q_proj", "unused"]), name="second")
    with pytest.raises(RunError, match="had no gradient.*unused") as caught:
        trained(model, adapter, rows, collate, CausalLM(), tmp_path)
    assert caught.value.findings[0].code == "U113"


def test_several_devices_are_used_as_one(tiny_base: Path, tmp_path: Path) -> None:
    # The Trainer would copy the model to every device it sees, and the copies would lose their adapters.
    _, adapter, rows, collate = prepared("sft", tiny_base, tmp_path)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
    assert args.n_gpu == 0
    args._n_gpu = 2
    trainer = GraftTrainer(adapter, CausalLM(), args, train_dataset=rows, data_collator=collate)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2


# --- a step that goes wrong ---


def _spoil(monkeypatch: pytest.MonkeyPatch, step: int, how: str) -> None:
    """Make the loss (or only the gradient) of one step NaN."""
    real = GraftTrainer.compute_loss

    def compute_loss(self: GraftTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            first = self.trained[0]
            if how == "loss":
                with torch.no_grad():
                    # Through the model, as an overflow would come; put back at once: the weights are not at fault.
                    kept = first.clone()
                    first.fill_(float("nan"))
                    try:
                        return real(self, *args, **options)
                    finally:
                        first.copy_(kept)
            return real(self, *args, **options) + (first - first.detach()).abs().sqrt().sum()  # slope infinite at 0
        return real(self, *args, **options)

    monkeypatch.setattr(GraftTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_without_a_number_stops_and_keeps_the_adapter_before_it(
    how: str, tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tiny(answered, out="two", steps=2, schedule="constant")
    _spoil(monkeypatch, 3, how)
    with pytest.raises(RunError, match=r"step 3 \(rows [\d, ]+\)") as caught:
        tiny(answered, out="spoilt", steps=6, schedule="constant", warmup=0.0)
    assert caught.value.findings[0].code == "U111"
    kept = weights(tmp_path / "spoilt")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    monkeypatch.undo()
    assert same(kept, weights(tiny(answered, out="again", steps=2, schedule="constant", warmup=0.0)))
    assert not same(kept, weights(reference)), "warm-up changes nothing"
    assert record_of(tmp_path / "spoilt")["status"] == "failed"


def test_the_adapter_kept_after_a_failure_can_be_opened(
    tiny: Tiny, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 3, "loss")
    with pytest.raises(RunError):
        tiny(labelled, steps=6)
    opened = open_adapter(tmp_path / "run")
    assert opened.labels is not None
    assert opened.labels.names == ("return", "track")
    assert opened.max_length == 128


def test_a_held_out_loss_without_a_number_stops_too(
    tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.losses

    def nothing(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        found.sums[:] = float("nan")
        return found

    monkeypatch.setattr(run_module, "losses", nothing)
    with pytest.raises(RunError, match="held-out loss is nan at step 2"):
        tiny(answered, steps=4, eval_every=2)
    assert record_of(tmp_path / "run")["status"] == "failed"


# --- memory for time ---


@pytest.mark.parametrize("task", ["sft", "classify"])
def test_recomputing_gives_the_same_weights(
    task: str, tiny: Tiny, answered: Path, labelled: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = answered if task == "sft" else labelled
    levels = ("none", "feedforward", "blocks")
    plain, *spared = (tiny(data, out=level, recompute=level, steps=3) for level in levels)
    for each in spared:
        assert same(weights(plain), weights(each))
    assert capfd.readouterr().err == ""
