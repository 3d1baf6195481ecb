"""Objectives: the loss and the gradient of a step do not depend on how its rows are cut up, and are the plain ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainingArguments

from graftlm.core import Adapter, attach
from graftlm.data import Collator, prepare
from graftlm.methods import read_method
from graftlm.models import load_base
from graftlm.objectives import OBJECTIVES, CausalLM, Classification, Objective
from graftlm.training import GraftTrainer
from training.tiny_runs import answered_rows, labelled_rows, texts, write_jsonl

TASKS = ("lm", "sft", "classify")


def prepared(task: str, base: Path, folder: Path) -> tuple[Any, Adapter, list[Mapping[str, Any]], Collator]:
    """A model with an adapter that does something, and eight rows of different lengths."""
    if task == "classify":
        data = write_jsonl(folder / "rows.jsonl", labelled_rows(12))
    elif task == "sft":
        data = write_jsonl(folder / "rows.jsonl", answered_rows(12))
    else:
        data = folder / "rows.txt"
        data.write_text(texts(30))
    torch.manual_seed(0)
    names = ["return", "track"] if task == "classify" else None
    model, tokenizer = load_base(base, task=task, labels=names)
    rows = prepare(data, tokenizer=tokenizer, task=task, max_length=24, eval_share=0).train[:8]
    if task == "lm":  # blocks have one length but for the last
        rows = [
            {**r, "input_ids": r["input_ids"][: 5 + 2 * at], "labels": r["labels"][: 5 + 2 * at]}
            for at, r in enumerate(rows)
        ]
    assert len({len(row["input_ids"]) for row in rows}) > 2
    adapter = attach(model, read_method("lora(rank=2,targets=attention)" + ("+head" if task == "classify" else "")))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, adapter, rows, Collator(tokenizer.pad_token_id, pad_to_multiple_of=1)


class _Recording(GraftTrainer):
    """Keeps the loss of every micro-batch and the gradients of every step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[float] = []
        self.gradients: list[list[Tensor]] = []

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.losses.append(loss.item())
        return loss

    def _clip_grad_norm(self, model: Any) -> Tensor:
        self.gradients.append([p.grad.clone() for p in self.trained if p.grad is not None])
        return super()._clip_grad_norm(model)


def trained(
    model: Any, adapter: Adapter, rows: Sequence[Any], collate: Collator, objective: Objective, folder: Path,
    *, accumulate: int = 1, steps: int = 1, batch: int = 8, **settings: Any,
) -> _Recording:  # fmt: skip
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": batch // accumulate,
        "gradient_accumulation_steps": accumulate, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 0,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
        "remove_unused_columns": False, "dataloader_pin_memory": False, "max_grad_norm": 1.0,
    } | settings  # fmt: skip
    trainer = _Recording(adapter, objective, TrainingArguments(**options), train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_neither_loss_nor_gradient_nor_weights(task: str, tiny_base: Path, tmp_path: Path) -> None:
    found = {}
    for parts in (1, 2, 4):
        model, adapter, rows, collate = prepared(task, tiny_base, tmp_path)
        run = trained(model, adapter, rows, collate, OBJECTIVES[task](), tmp_path, accumulate=parts, steps=4, batch=4)
        assert len(run.losses) == 4 * parts
        steps = [sum(run.losses[at : at + parts]) for at in range(0, 4 * parts, parts)]
        found[parts] = steps, run.gradients, [p.detach().clone() for p in adapter.parameters()]
    for parts in (2, 4):
        # The later steps start from weights that Adam has made of rounded gradients, hence the wider bound on them.
        assert found[parts][0] == pytest.approx(found[1][0], abs=1e-4)
        assert found[parts][0][0] == pytest.approx(found[1][0][0], abs=1e-6, rel=1e-6)
        for one, other in zip(found[1][1][0], found[parts][1][0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        for one, other in zip(found[1][2], found[parts][2], strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_one_batch_costs_what_transformers_says(task: str, tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = prepared(task, tiny_base, tmp_path)
    batch = collate(rows)
    batch.pop("row")
    model(**batch).loss.backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]
    loss = model(**batch).loss.item()
    adapter.requires_grad_()
    for parameter in adapter.parameters():
        parameter.grad = None
    run = trained(model, adapter, rows, collate, OBJECTIVES[task](), tmp_path)
    assert run.losses[0] == pytest.approx(loss, rel=1e-6)
    for one, other in zip(run.gradients[0], wanted, strict=True):
        # Rounding of the sums that a gradient is made of goes by their size, not by what is left of them.
        torch.testing.assert_close(one, other, atol=1e-6 * max(1.0, float(other.abs().max())), rtol=1e-5)


def test_the_loss_is_that_of_a_loop_over_tokens(tiny_base: Path, tmp_path: Path) -> None:
    model, _, rows, collate = prepared("sft", tiny_base, tmp_path)
    objective = CausalLM()
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            for at in range(1, len(row["labels"])):
                if row["labels"][at] != -100:
                    total -= float(F.log_softmax(logits[at - 1].double(), -1)[row["labels"][at]])
                    count += 1
        batch = collate(rows)
        found = objective.loss_sum(model(**objective.inputs(batch)), batch)
    assert objective.count(batch) == count
    assert float(found) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("task", ["lm", "sft"])
def test_tail_only_changes_nothing(task: str, tiny_base: Path, tmp_path: Path) -> None:
    model, adapter, rows, collate = prepared(task, tiny_base, tmp_path)
    found = []
    for tail in (False, True):
        objective = CausalLM(tail_only=tail)
        run = trained(model, adapter, rows, collate, objective, tmp_path, learning_rate=0.0)
        batch = collate(rows)
        with torch.no_grad():
            outputs = model(**objective.inputs(batch))
        found.append((run.losses[0], run.gradients[0], objective.row_losses(outputs, batch), outputs.logits.shape[1]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert found[0][2][1] == found[1][2][1]
    assert found[0][2][0] == pytest.approx(found[1][2][0], rel=1e-5)
    if task == "sft":
        assert found[1][3] < found[0][3], "the prompt's logits were computed all the same"


@pytest.mark.parametrize("labels", [[[-100, -100, -100, 4]], [[5, -100, -100, -100]], [[5, 6, 7, 8]], [[5]]])
def test_tail_only_at_the_edges(labels: list[list[int]], tiny_base: Path, tmp_path: Path) -> None:
    model, *_ = prepared("sft", tiny_base, tmp_path)
    batch = {"input_ids": torch.tensor(labels).clamp(min=5), "labels": torch.tensor(labels)}
    sums = []
    for tail in (False, True):
        objective = CausalLM(tail_only=tail)
        outputs = model(**objective.inputs(batch))
        sums.append(objective.loss_sum(outputs, batch).item())
        assert objective.row_losses(outputs, batch)[1] == [objective.count(batch)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_row_losses_sum_to_the_loss(task: str, tiny_base: Path, tmp_path: Path) -> None:
    model, _, rows, collate = prepared(task, tiny_base, tmp_path)
    objective, batch = OBJECTIVES[task](), collate(rows)
    with torch.no_grad():
        outputs = model(**objective.inputs(batch))
    sums, counts = objective.row_losses(outputs, batch)
    assert len(sums) == len(counts) == len(rows)
    assert sum(sums) == pytest.approx(float(objective.loss_sum(outputs, batch)), rel=1e-5)
    assert sum(counts) == objective.count(batch)
    assert all(value > 0 for value in sums)


def test_classification_in_half_precision_is_computed_in_full() -> None:
    logits = torch.tensor([[20.0, 0.0], [0.0, 10.0]], dtype=torch.bfloat16)
    labels = torch.tensor([1, 1])
    loss = Classification().loss_sum(SimpleNamespace(logits=logits), {"labels": labels})
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits.double(), labels, reduction="sum")), rel=1e-6)
