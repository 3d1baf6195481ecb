"""Types and devices: bf16 bases, float32 deltas, models that move."""

from __future__ import annotations

import pytest
import torch

from conformance.cases import CASES, cross, grid, merges, only, starts_as_identity
from graftlm.core import adapters, attach, use
from graftlm.methods import Full, LoRA
from models_for_tests import MODELS, inputs_for, logits_of, loss_of, perturb, tiny


@cross()
def test_bf16_base_starts_as_the_identity_and_keeps_its_type(case, model_name):
    model = tiny(model_name).to(torch.bfloat16)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits_of(model)
    adapter = attach(model, CASES[case])
    assert {parameter.dtype for parameter in adapter.parameters()} <= {torch.float32}
    if starts_as_identity(CASES[case]):
        assert torch.equal(logits_of(model), before)
    perturb(adapter)
    after = logits_of(model)
    assert after.dtype == before.dtype
    assert not torch.equal(after, before)
    if merges(adapter):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        # Folding rounds once where the attached call rounds several times: equal to bf16's precision.
        assert (logits_of(model) - after).float().norm() < 0.1 * after.float().norm()
        adapter.unmerge()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    adapter.detach()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("case", ["lora-all", "lora-embed", "lora-bias", "full", "lora+head"])
@pytest.mark.parametrize("model_name", ["llama", "gemma2", "gpt2", "bert", "t5", "bart"])
def test_bf16_rows_and_gradients(case, model_name):
    model = tiny(model_name).to(torch.bfloat16).train()
    for seed, name in enumerate("ab"):
        perturb(attach(model, CASES[case], name=name), seed=seed)
    if case != "full" or model_name != "t5":
        use(model, ["a", None, ("a", "b")])
    loss_of(model).backward()
    for parameter in adapters(model)["a" if case != "full" or model_name != "t5" else "b"].parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@grid(only("lora-all", "lora-embed", "lora-bias", "full"), models=("llama", "gemma2", "gpt2", "bert", "t5", "bart"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_may_change_its_type_while_adapters_are_attached(case, model_name, dtype):
    model = tiny(model_name)
    adapter = attach(model, CASES[case])
    perturb(adapter)
    kept = {key: value.clone() for key, value in adapter.state().items()}
    wanted = logits_of(model)
    model.to(dtype)
    found = logits_of(model)
    assert found.dtype == dtype
    size = wanted.float().norm()
    assert (found.float() - wanted.float()).norm() < (0.1 if dtype == torch.bfloat16 else 1e-4) * size
    assert all(torch.equal(value, kept[key]) for key, value in adapter.state().items())
    model.to(torch.float32)
    if dtype == torch.float64:
        assert torch.allclose(logits_of(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_name", MODELS)
def test_autocast(model_name):
    model = tiny(model_name)
    adapter = attach(model, LoRA(rank=2, targets="all-linear,embed"))
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits_of(model)
    perturb(adapter)
    wanted = logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(model)
        loss_of(model).backward()
    assert not torch.equal(found, plain)
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())


@pytest.mark.parametrize("case", ["lora-all", "lora-embed", "full"])
def test_plans_on_the_meta_device(case):
    with torch.device("meta"):
        model = MODELS["llama"]()
    adapter = attach(model, CASES[case])
    assert adapter.parameter_count == attach(tiny("llama"), CASES[case]).parameter_count
    assert all(parameter.is_meta for parameter in adapter.parameters())
    # Without a mask, and with positions, transformers looks at no value.
    ids = inputs_for(model)["input_ids"].to("meta")
    batch = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
    assert logits_of(model, batch).shape == (3, 6, 64)


def test_deltas_keep_their_identity_for_the_optimiser():
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2) + Full())
    own = [id(parameter) for parameter in adapter.parameters()]
    model.to(torch.bfloat16)
    logits_of(model)
    model.train()
    logits_of(model)
    assert [id(parameter) for parameter in adapter.parameters()] == own
