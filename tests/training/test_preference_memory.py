"""What a step on preferences holds at most beside a step of supervised fine-tuning on the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from graftlm.core import attach
from graftlm.kernels import LossHead, fuse
from graftlm.methods import LoRA
from graftlm.objectives import DPO, KTO, CausalLM, Objective, Reference, settle
from graftlm.planning.tracing import Trace

ROWS, TOKENS = 8, 96


def _peak_bytes(kind: str, *, chunked: bool = True) -> int:
    """The most bytes that live at once in a whole step: what is settled before it, forward and backward."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=8000,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    adapter = attach(model, LoRA(rank=8, targets="all-linear"))
    ids = torch.randint(3, 8000, (ROWS, TOKENS))
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    head = LossHead.of(model) if chunked else None
    assert head is not None or not chunked
    objective: Objective = CausalLM(head=head)
    if kind == "dpo":
        objective, batch["group"] = DPO(head=head), torch.arange(ROWS // 2).repeat_interleave(2)
    elif kind == "kto":  # half of the sequences are there for z alone
        objective, batch["target"] = KTO(head=head), torch.arange(ROWS // 2) % 2
    model.train()
    counted = Trace()
    counted.hold("weights", model.parameters())
    counted.hold("deltas", adapter.parameters())
    with fuse(model), counted:
        settle(model, objective, [batch], Reference(adapter))
        loss = objective.loss_sum(objective.outputs(model, batch), batch)
        torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    return max(peak.total() for peak in counted.peaks.values())


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_preferences_hold_hardly_more_than_answers(kind: str) -> None:
    """The reference is the same model, and no logits are held for either side."""
    answers = _peak_bytes("sft")
    assert _peak_bytes(kind) < 1.15 * answers
    assert _peak_bytes(kind, chunked=False) > 1.5 * answers  # the measure sees what the chunks leave out
