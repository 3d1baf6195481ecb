"""Every objective: loss and gradient do not depend on how rows are cut, padded or packed, nor on what is not learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.core import Adapter, attach, use
from graftlm.data import Collator, SequencesCollator, TargetsCollator, prepare
from graftlm.data.tokenising import pack
from graftlm.methods import read_method
from graftlm.models import head_of, is_encoder, load_base, load_config
from graftlm.objectives import CausalLM, Reference, settle
from graftlm.training.tasks import Learnt
from training.test_objectives import _Recording, trained
from training.tiny_runs import rows_for, texts, write_jsonl

#: (rows, task, base) of every objective.
CASES = [
    ("choice", "choice", "tiny_base"), ("choice", "choice", "tiny_bert"), ("choice", "tfew", "tiny_base"),
    ("classify", "classify", "tiny_bert"), ("dpo", "dpo", "tiny_base"), ("dpo", "reward", "tiny_base"),
    ("kto", "kto", "tiny_base"), ("text", "lm", "tiny_base"), ("text", "mlm", "tiny_bert"),
    ("multi", "classify", "tiny_bert"), ("regress", "regress", "tiny_bert"), ("seq2seq", "seq2seq", "tiny_t5"),
    ("sft", "sft", "tiny_base"), ("tag", "tag", "tiny_bert"), ("choice", "choice", "tiny_t5"),
    ("choice", "tfew", "tiny_t5"), ("dpo", "dpo", "tiny_t5"), ("kto", "kto", "tiny_t5"),
]  # fmt: skip
#: Those in which a prompt comes before what is learnt.
WRITING = [case for case in CASES if case[1] in ("choice", "tfew", "dpo", "kto", "sft") and case[2] == "tiny_base"]


class Ready:
    """A tiny model with an adapter that does something, and eight rows of a task."""

    def __init__(self, rows: str, task: str, base: Path, folder: Path) -> None:
        torch.manual_seed(0)
        data = write_jsonl(folder / "rows.jsonl", rows_for(rows, 12)) if rows != "text" else folder / "rows.txt"
        if rows == "text":
            data.write_text(texts(40))
        config = load_config(str(base))
        _, tokenizer = load_base(base, task=task, labels=["a", "b"])
        found = prepare(
            data, tokenizer=tokenizer, task=task, max_length=24 if rows == "text" else 48, eval_share=0,
            by_head=is_encoder(config), apart=getattr(config, "is_encoder_decoder", False),
        )  # fmt: skip
        names = list(found.labels.names) if found.labels else None
        torch.manual_seed(0)
        self.model, _ = load_base(
            base, task=task, labels=names, several=found.labels is not None and found.labels.several
        )
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # what is drawn depends on how rows are cut, in any library
        self.rows: list[Any] = found.train[:8]
        headed = head_of(task, config) in ("sequence", "token")
        method = read_method("lora(rank=2,targets=attention)" + ("+head" if headed else ""))
        self.adapter: Adapter = attach(self.model, method)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        self.learnt = Learnt(task, self.model, tokenizer, labels=found.labels, scale=found.scale)
        self.objective = self.learnt.objective()
        self.collate = self.learnt.collator()

    def step(self, folder: Path, **options: Any) -> _Recording:
        return trained(self.model, self.adapter, self.rows, self.collate, self.objective, folder, **options)

    def loss_and_gradient(self, batch: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
        settle(self.model, self.objective, [batch], Reference(self.adapter))
        loss = self.objective.loss_sum(self.objective.outputs(self.model, batch), batch) / self.objective.count(batch)
        for parameter in self.adapter.parameters():
            parameter.grad = None
        loss.backward()
        return loss.item(), [p.grad.clone() for p in self.adapter.parameters() if p.grad is not None]


@pytest.fixture
def ready(request: pytest.FixtureRequest, tmp_path: Path) -> Ready:
    rows, task, base = request.param
    return Ready(rows, task, request.getfixturevalue(base), tmp_path)


def alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_accumulation_changes_nothing(
    case: tuple[str, str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = {}
    for parts in (1, 4):
        ready = Ready(*case[:2], request.getfixturevalue(case[2]), tmp_path)
        run = ready.step(tmp_path, accumulate=parts, max_grad_norm=1e9)
        assert len(run.losses) == parts
        found[parts] = sum(run.losses), run.gradients[0]
    assert found[4][0] == pytest.approx(found[1][0], rel=1e-6, abs=1e-6)
    alike(found[4][1], found[1][1])
    assert any(gradient.abs().max() > 1e-5 for gradient in found[1][1])


def _left(collate: Any) -> Any:
    if isinstance(collate, Collator):
        return replace(collate, side="left", position_ids=True)
    return replace(collate, inner=_left(collate.inner)) if isinstance(collate, SequencesCollator) else None


@pytest.mark.parametrize("ready", [c for c in CASES if c[1] not in ("mlm", "seq2seq")], indirect=True, ids="-".join)
def test_padding_on_the_left_or_right_is_the_same(ready: Ready) -> None:
    if is_encoder(ready.model.config):
        pytest.skip("encoders count positions from the left edge; they are padded on the right")
    if ready.model.config.is_encoder_decoder:
        pytest.skip("decoders of encoder-decoders begin at the left edge")
    right = ready.loss_and_gradient(ready.collate(ready.rows))
    left = ready.loss_and_gradient(_left(ready.collate)(ready.rows))
    assert left[0] == pytest.approx(right[0], rel=1e-5)
    for a, b in zip(left[1], right[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("ready", [c for c in CASES if c[1] in ("lm", "sft")], indirect=True, ids="-".join)
def test_packed_rows_are_what_they_are_alone(ready: Ready) -> None:
    packed = pack(ready.rows, 64)
    assert 1 < len(packed) < len(ready.rows)
    assert sum(len(row["input_ids"]) for row in packed) == sum(len(row["input_ids"]) for row in ready.rows)
    alone = ready.loss_and_gradient(ready.collate(ready.rows))
    assert ready.objective.count(ready.collate(packed)) == ready.objective.count(ready.collate(ready.rows))
    together = ready.loss_and_gradient(ready.collate(packed))
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    for a, b in zip(together[1], alone[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("ready", WRITING, indirect=True, ids="-".join)
def test_what_the_prompt_predicts_carries_no_gradient(ready: Ready) -> None:
    """The loss does not move with logits at positions whose next token is the prompt's."""
    objective = replace(ready.objective, head=None, tail_only=False)
    batch = ready.collate(ready.rows)
    settle(ready.model, objective, [batch], Reference(ready.adapter))
    caught: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output.logits.retain_grad()
        caught.append(output.logits)

    handle = ready.model.register_forward_hook(keep)
    objective.loss_sum(objective.outputs(ready.model, batch), batch).backward()
    handle.remove()
    logits = caught[-1]
    labels = batch["labels"] if len(logits) == len(batch["labels"]) else batch["labels"][::2]  # KTO's own answers
    learnt = torch.zeros(labels.shape, dtype=torch.bool)
    learnt[:, :-1] = labels[:, 1:] != -100
    moved = logits.grad.abs().sum(-1) > 0
    assert not moved[~learnt].any()
    assert moved[learnt].float().mean() > 0.9


@pytest.mark.parametrize("ready", [c for c in CASES if c[2] == "tiny_t5"], indirect=True, ids="-".join)
def test_a_target_side_padded_more_costs_the_same(ready: Ready) -> None:
    apart: Any = ready.collate
    if isinstance(apart, SequencesCollator):
        apart = apart.inner
    assert isinstance(apart, TargetsCollator)
    wider: Any = replace(apart, inner=replace(apart.inner, pad_to_multiple_of=32))
    if apart is not ready.collate:
        wider = replace(ready.collate, inner=wider)
    one, other = ready.collate(ready.rows), wider(ready.rows)
    assert one["labels"].shape[1] < other["labels"].shape[1]
    found = [ready.loss_and_gradient(batch) for batch in (one, other)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)


def test_the_reference_is_the_model_before_training(tiny_base: Path, tmp_path: Path) -> None:
    """By routing, and by starting values where the adapter does not start as the identity."""
    for trained_before in (False, True):
        ready = Ready("dpo", "dpo", tiny_base, tmp_path)
        batch: Mapping[str, Tensor] = ready.collate(ready.rows)
        with torch.no_grad():
            now = ready.model(**ready.objective.inputs(batch)).logits
            with use(ready.model, None):
                base = ready.model(**ready.objective.inputs(batch)).logits
        reference = Reference(ready.adapter, trained_before=trained_before)
        assert reference.by_values is trained_before
        with torch.no_grad():
            for parameter in ready.adapter.parameters():
                parameter.add_(0.1)
            after = ready.model(**ready.objective.inputs(batch)).logits
            with reference.acting():
                found = ready.model(**ready.objective.inputs(batch)).logits
            assert torch.equal(found, now if trained_before else base)
            assert torch.equal(ready.model(**ready.objective.inputs(batch)).logits, after)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_t5"])
def test_before_training_every_preference_is_even(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With a reference that equals the model the DPO loss is ln 2, and the KTO loss one half."""
    for task, value in (("dpo", 0.693147), ("kto", 0.5)):
        ready = Ready(task, task, request.getfixturevalue(base), tmp_path)
        batch = ready.collate(ready.rows)
        settle(ready.model, ready.objective, [batch], Reference(ready.adapter, trained_before=True))
        loss = ready.objective.loss_sum(ready.objective.outputs(ready.model, batch), batch)
        assert float(loss) / ready.objective.count(batch) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_t5"])
def test_unlikelihood_is_that_of_a_loop_over_tokens(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ready = Ready("choice", "tfew", request.getfixturevalue(base), tmp_path)
    apart = base == "tiny_t5"
    wanted = 0.0
    for item in ready.rows:
        told = []
        for sequence in item["sequences"]:
            ids, labels = torch.tensor([sequence["input_ids"]]), sequence["labels"]
            with torch.no_grad():  # an encoder-decoder shifts its labels itself
                more = {"labels": torch.tensor([labels])} if apart else {}
                log = ready.model(input_ids=ids, **more).logits[0].double().log_softmax(-1)
            at = [i for i, label in enumerate(labels) if label != -100 and (i or apart)]
            told.append([float(log[i - (not apart), labels[i]]) for i in at])
        means = torch.tensor([sum(one) / len(one) for one in told], dtype=torch.float64)
        wrong = [value for at, one in enumerate(told) if at != item["target"] for value in one]
        unlikely = -sum(torch.log1p(-torch.tensor(value, dtype=torch.float64).exp()) for value in wrong) / len(wrong)
        wanted += float(-means[item["target"]] + unlikely - means.log_softmax(0)[item["target"]])
    batch = ready.collate(ready.rows)
    found = ready.objective.loss_sum(ready.objective.outputs(ready.model, batch), batch)
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_causal_losses_by_head_and_by_logits_agree(tiny_base: Path, tmp_path: Path) -> None:
    for rows, task in (("choice", "tfew"), ("dpo", "dpo"), ("kto", "kto"), ("sft", "sft")):
        ready = Ready(rows, task, tiny_base, tmp_path)
        assert ready.objective.head is not None
        by_head = ready.loss_and_gradient(ready.collate(ready.rows))
        ready.objective = replace(ready.objective, head=None)
        by_logits = ready.loss_and_gradient(ready.collate(ready.rows))
        assert by_head[0] == pytest.approx(by_logits[0], rel=1e-5)
    assert isinstance(ready.objective, CausalLM)
