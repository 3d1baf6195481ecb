"""Rows of many methods in one batch, in one forward and in one `generate`: each row equals the row alone."""

from __future__ import annotations

import pytest
import torch

from conformance.test_rows import assert_close, generate, generated_alone, padded, row_of
from graftlm.core import attach, use
from graftlm.methods import (
    IA3,
    BitFit,
    LoRA,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    SeriesAdapter,
    Sparse,
)
from models_for_tests import inputs_for, logits_of, perturb, tiny

METHODS = {
    "lora": LoRA(rank=4),
    "ia3": IA3(),
    "series": SeriesAdapter(width=4),
    "parallel": ParallelAdapter(width=4),
    "prefix": PrefixTuning(length=3),
    "prompt": PromptTuning(length=2),
    "bitfit": BitFit(),
    "sparse": Sparse(fraction=0.05),
}
#: The base, every method by itself, and three of them together.
SPEC = [None, *METHODS, ("lora", "prompt", "prefix")]


def with_all(model_name):
    model = tiny(model_name)
    for seed, (name, method) in enumerate(METHODS.items()):
        perturb(attach(model, method, name=name), seed=seed)
    return model


def same_rows(model):
    batch = inputs_for(model, rows=len(SPEC))
    for ids in batch.values():
        ids[:] = ids[:1]  # equal rows: only the adapters can tell them apart
    return batch


@pytest.mark.parametrize("model_name", ["llama", "qwen3", "gemma3", "gpt2", "opt", "t5", "bert"])
def test_one_forward(model_name):
    model = with_all(model_name)
    batch = same_rows(model)
    wanted = []
    for row, choice in enumerate(SPEC):
        use(model, choice)
        wanted.append(logits_of(model, row_of(batch, row)))
    assert all(not torch.equal(one, other) for n, one in enumerate(wanted) for other in wanted[:n])
    use(model, SPEC)
    assert_close(logits_of(model, batch), torch.cat(wanted))
    assert torch.equal(_first(model, batch), logits_of(tiny(model_name), row_of(batch, 0)))


def _first(model, batch):
    use(model, None)
    return logits_of(model, row_of(batch, 0))


@pytest.mark.parametrize("model_name", ["llama", "qwen3", "gemma3", "gpt2", "opt", "t5"])
def test_one_generate(model_name):
    model = with_all(model_name)
    batch = same_rows(model)
    if model.config.is_encoder_decoder:
        places, start = None, 0
    else:
        batch, places = padded(batch, "left")
        start = batch["input_ids"].shape[1]
    wanted = generated_alone(model, batch, SPEC, places)
    use(model, SPEC)
    assert torch.equal(generate(model, batch)[:, start:], wanted)
    assert len({tuple(row.tolist()) for row in wanted}) > 2
