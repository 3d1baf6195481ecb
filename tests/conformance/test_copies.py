"""Copies of a grafted model (deepcopy, pickle) use deltas of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from conformance.cases import CASES, cross
from graftlm.core import adapters, attach, use
from graftlm.methods import LoRA
from models_for_tests import MODELS, hooks_and_attributes, logits_of, perturb, tiny

COPY = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPY)
@cross()
def test_a_copy_has_deltas_of_its_own(case, model_name, how):
    model = tiny(model_name)
    plain = logits_of(model)
    adapter = attach(model, CASES[case], name="a")
    perturb(adapter)
    acted = logits_of(model)  # plans are made at the first call: a copy must not keep those of the original
    twin = COPY[how](model)
    own = adapters(twin)["a"]
    assert torch.equal(logits_of(twin), acted)
    assert own is not adapter
    assert own.model is twin
    perturb(own, seed=7)
    changed = logits_of(twin)
    if own.parameter_count:
        assert not torch.equal(changed, acted)
    assert torch.equal(logits_of(model), acted)
    perturb(adapter, seed=8)
    assert torch.equal(logits_of(twin), changed)
    use(twin, None)
    assert torch.equal(logits_of(twin), plain)
    assert not torch.equal(logits_of(model), plain)
    adapter.detach()
    use(twin, "a")
    assert torch.equal(logits_of(twin), changed)
    assert adapters(model) == {}


@pytest.mark.parametrize("how", COPY)
@pytest.mark.parametrize("model_name", MODELS)
def test_a_copy_can_be_detached_and_leaves_no_trace(model_name, how):
    model = tiny(model_name)
    plain, traces = logits_of(model), hooks_and_attributes(model)
    perturb(attach(model, LoRA(rank=2), name="a"))
    acted = logits_of(model)
    twin = COPY[how](model)
    adapters(twin)["a"].detach()
    assert torch.equal(logits_of(twin), plain)
    assert hooks_and_attributes(twin) == traces
    assert torch.equal(logits_of(model), acted)


@pytest.mark.parametrize("how", COPY)
def test_a_copy_of_a_merged_model_can_be_unmerged(how):
    model = tiny("gpt2")
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    perturb(attach(model, LoRA(rank=2, targets="all-linear,embed"), name="a"))
    attached = logits_of(model)
    adapters(model)["a"].merge()
    merged = logits_of(model)
    twin = COPY[how](model)
    adapters(twin)["a"].unmerge()
    assert torch.equal(logits_of(twin), attached)
    assert torch.equal(logits_of(model), merged)
    assert all(torch.equal(value, plain[key]) for key, value in twin.state_dict().items())
    assert twin.config.tie_word_embeddings


def test_routing_of_a_copy_is_its_own():
    model = tiny("llama")
    for seed, name in enumerate("ab"):
        perturb(attach(model, LoRA(rank=2), name=name), seed=seed)
    use(model, "a")
    wanted = logits_of(model)
    twin = copy.deepcopy(model)
    use(twin, "b")
    assert torch.equal(logits_of(model), wanted)
    assert not torch.equal(logits_of(twin), wanted)
