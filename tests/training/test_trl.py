"""DPO, IPO, KTO and the reward loss are TRL's: its own trainers compute the loss of the same rows on the same weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.objectives import DPO, Reference, settle
from training.test_invariance import Ready

trl = pytest.importorskip("trl")


def _split(batch: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The batch in TRL's names and order: all chosen, then all rejected."""
    found = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    return {**found, "completion_mask": (batch["labels"][order] != -100).long()}


def _models(ready: Ready) -> tuple[Any, Any]:
    """What TRL compares: a plain model with the adapter folded in, and a plain copy of the base."""
    policy = copy.deepcopy(ready.model)
    from graftlm.core import adapters

    adapters(policy)["default"].merge()
    reference = copy.deepcopy(ready.model)
    adapters(reference)["default"].detach()
    return policy, reference


def _rows(kind: str) -> Any:
    from datasets import Dataset

    asked = {"prompt": ["a", "b"]}
    judged = {"completion": ["c", "d"], "label": [True, False]}
    return Dataset.from_dict(asked | (judged if kind == "kto" else {"chosen": ["c", "d"], "rejected": ["e", "f"]}))


def _arguments(config: Any, folder: Path, **more: Any) -> Any:
    return config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        per_device_train_batch_size=2, **more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    objective = DPO(beta=0.3, kind=kind)
    batch = ready.collate(ready.rows)
    settle(ready.model, objective, [batch], Reference(ready.adapter))
    ours = objective.loss_sum(objective.outputs(ready.model, batch), batch) / objective.count(batch)

    policy, reference = _models(ready)
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, args=_arguments(trl.DPOConfig, tmp_path, beta=0.3, loss_type=kind),
        train_dataset=_rows("dpo"), processing_class=ready.learnt.tokenizer,
    )  # fmt: skip
    count = len(batch["input_ids"])
    inputs = _split(batch, [*range(0, count, 2), *range(1, count, 2)])
    theirs = trainer._compute_loss(trainer.model, inputs, False)
    assert abs(float(ours) - (0.6931 if kind == "sigmoid" else 2.7778)) > 1e-3, "the adapter changes nothing"
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_smoothing_is_that_of_the_note(tiny_base: Path, tmp_path: Path) -> None:
    """TRL 1.16 has this form no more: Mitchell 2023, eq. 3, written out."""
    ready = Ready("dpo", "dpo", tiny_base, tmp_path)
    batch = ready.collate(ready.rows)
    objective = DPO(beta=0.3, smoothing=0.2)
    settle(ready.model, objective, [batch], Reference(ready.adapter))
    outputs = objective.outputs(ready.model, batch)
    gaps = [float(chosen - rejected) for chosen, rejected in objective.rewards(outputs, batch).double()]
    right = torch.tensor(gaps, dtype=torch.float64).sigmoid()
    wanted = -(0.8 * right.log() + 0.2 * (1 - right).log()).sum()
    assert float(objective.loss_sum(outputs, batch)) == pytest.approx(float(wanted), rel=1e-5)


def test_kto(tiny_base: Path, tmp_path: Path) -> None:
    ready = Ready("kto", "kto", tiny_base, tmp_path)
    batch = ready.collate(ready.rows)
    settle(ready.model, ready.objective, [batch], Reference(ready.adapter))
    ours = ready.objective.loss_sum(ready.objective.outputs(ready.model, batch), batch) / ready.objective.count(batch)
    policy, reference = _models(ready)
    trainer = trl.KTOTrainer(
        model=policy, ref_model=reference, args=_arguments(trl.KTOConfig, tmp_path, beta=0.1),
        train_dataset=_rows("kto"), processing_class=ready.learnt.tokenizer,
    )  # fmt: skip
    count = len(batch["input_ids"])
    own, other = _split(batch, [*range(0, count, 2)]), _split(batch, [*range(1, count, 2)])
    inputs = own | {f"KL_{name}": tensor for name, tensor in other.items()} | {"label": batch["target"].bool()}
    theirs = trainer._compute_loss(trainer.model, inputs, False)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_reward(tiny_base: Path, tmp_path: Path) -> None:
    ready = Ready("dpo", "reward", tiny_base, tmp_path)
    batch = ready.collate(ready.rows)
    ours = ready.objective.loss_sum(ready.objective.outputs(ready.model, batch), batch) / ready.objective.count(batch)
    policy, _ = _models(ready)
    trainer = trl.RewardTrainer(
        model=policy, args=_arguments(trl.RewardConfig, tmp_path), train_dataset=_rows("dpo"),
        processing_class=ready.learnt.tokenizer,
    )  # fmt: skip
    count = len(batch["input_ids"])
    order = [*range(0, count, 2), *range(1, count, 2)]
    inputs = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    theirs = trainer.compute_loss(trainer.model, inputs)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
