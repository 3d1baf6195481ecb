"""An adapter comes and goes: identity at the start, a base that keeps its face, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch

from conformance.cases import CASES, EXAMPLES, REFUSALS, Breaking, Scale, cross, grid, only, starts_as_identity
from graftlm.core import adapters, attach, use
from graftlm.errors import GraftError
from graftlm.methods import METHODS, BitFit, LoRA
from models_for_tests import MODELS, hooks_and_attributes, logits_of, perturb, tiny


def test_examples_are_complete():
    assert EXAMPLES.keys() == METHODS.keys()
    assert all(type(method) is METHODS[name] for name, method in EXAMPLES.items())
    assert len(MODELS) >= 13


@grid()
def test_starts_as_the_identity_and_then_acts(case, model_name):
    model = tiny(model_name)
    before = logits_of(model)
    adapter = attach(model, CASES[case])
    assert torch.equal(logits_of(model), before) == starts_as_identity(CASES[case])
    perturb(adapter)
    assert (logits_of(model) - before).abs().max() > 1e-4 * before.abs().max()
    with use(model, None):
        assert torch.equal(logits_of(model), before)


@cross()
def test_base_keeps_its_face_and_comes_back(case, model_name):
    model = tiny(model_name)
    odd = next(reversed(list(model.parameters())))
    odd.requires_grad_(False)  # flags that differ must come back as they were
    logits_of(model)  # transformers may install hooks of its own at the first call
    plain = tiny(model_name)
    traces, logits = hooks_and_attributes(model), logits_of(model)
    adapter = attach(model, CASES[case])
    perturb(adapter)
    assert type(model) is type(plain)
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(logits_of(model), logits)
    assert hooks_and_attributes(model) != traces
    adapter.detach()
    assert hooks_and_attributes(model) == traces
    assert all(torch.equal(own, plain.state_dict()[key]) for key, own in model.state_dict().items())
    assert torch.equal(logits_of(model), logits)
    assert not adapter.attached
    assert adapters(model) == {}


@pytest.mark.parametrize(("case", "model_name"), REFUSALS, ids=lambda value: value)
def test_refuses_with_an_error_and_without_a_trace(case, model_name):
    model = tiny(model_name)
    traces = hooks_and_attributes(model)
    with pytest.raises(GraftError) as caught:
        attach(model, CASES[case])
    assert {finding.code for finding in caught.value.findings} == set(REFUSALS[case, model_name].split())
    assert hooks_and_attributes(model) == traces


@pytest.mark.parametrize("model_name", MODELS)
def test_two_adapters_leave_one_after_the_other(model_name):
    model = tiny(model_name)
    plain = logits_of(model)
    traces = hooks_and_attributes(model)
    first, second = attach(model, LoRA(rank=2), name="a"), attach(model, EXAMPLES["full"], name="b")
    perturb(first, seed=1)
    perturb(second, seed=2)
    with use(model, "b"):
        wanted = logits_of(model)
    first.detach()
    use(model, "b")
    assert torch.equal(logits_of(model), wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    second.detach()
    assert torch.equal(logits_of(model), plain)
    assert hooks_and_attributes(model) == traces


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("others", [0, 1])
def test_failed_attach_leaves_no_trace(model_name, others):
    model = tiny(model_name)
    for number in range(others):
        perturb(attach(model, LoRA(rank=2), name=f"other-{number}"))
    traces, logits, names = hooks_and_attributes(model), logits_of(model), list(adapters(model))
    method = Breaking()
    with pytest.raises(RuntimeError, match="out of memory"):
        attach(model, LoRA(rank=2) + method, name="new")
    assert len(method.built) == 4  # it did fail in the middle
    assert hooks_and_attributes(model) == traces
    assert list(adapters(model)) == names
    assert torch.equal(logits_of(model), logits)


def test_faults_of_all_parts_are_reported_at_once():
    with pytest.raises(GraftError) as caught:
        attach(tiny("llama"), BitFit(add=False) + LoRA(targets="q_prj") + LoRA(targets="v_prj"))
    assert [finding.code for finding in caught.value.findings] == ["T109", "C101", "C101"]


def test_two_parts_with_the_same_names_are_refused():
    model = tiny("llama")
    with pytest.raises(GraftError) as caught:
        attach(model, LoRA(rank=2) + LoRA(rank=4, targets="query"))
    assert [finding.code for finding in caught.value.findings] == ["T105"]
    attach(model, LoRA(rank=2, targets="query") + LoRA(rank=4, targets="value"))


def test_a_parameter_chosen_twice_is_trained_once():
    model = tiny("gpt2")
    adapter = attach(model, EXAMPLES["full"] + EXAMPLES["bitfit"] + EXAMPLES["head"])
    own = [name for name, _ in adapter.named_parameters()]
    assert len(own) == len(set(own))


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5"])
def test_deltas_before_and_after_a_map(model_name):
    model = tiny(model_name)
    before = logits_of(model)
    adapter = attach(model, Scale("attention,ffn"))
    assert torch.equal(logits_of(model), before)
    perturb(adapter)
    assert not torch.allclose(logits_of(model), before, rtol=1e-3)
    adapter.detach()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("case", ["full", "lora+full"])
def test_an_error_inside_a_module_leaves_the_base_as_it_was(case):
    model = tiny("bert")
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    logits = logits_of(model)
    perturb(attach(model, CASES[case]))
    acted = logits_of(model)
    ids = torch.full((2, 4), 10_000)  # out of the vocabulary: the embedding raises
    with pytest.raises(IndexError):
        model(input_ids=ids)
    assert all(torch.equal(own, keys[key]) for key, own in model.state_dict().items())
    assert torch.equal(logits_of(model), acted)
    with use(model, None):
        assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("case", only("full", "layers"))
def test_an_interrupt_inside_a_module_leaves_the_base_as_it_was(case, monkeypatch):
    """Ctrl-C in a notebook is a BaseException, for which torch does not run its hooks."""
    model = tiny("llama")
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    logits = logits_of(model)
    adapter = attach(model, CASES[case])
    perturb(adapter)
    acted = logits_of(model)
    place = model.model.layers[1].mlp.down_proj

    def interrupted(x):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model)
    assert torch.equal(logits_of(model), acted)
    with use(model, None):
        assert torch.equal(logits_of(model), logits)
    adapter.detach()
    assert all(torch.equal(own, keys[key]) for key, own in model.state_dict().items())
