"""LoRA's family by its formulas: parts of fused maps, experts, starts from the weights, DoRA's norm, LoRA+'s rates."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf

from graftlm.core import attach, survey, use
from graftlm.errors import MethodError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import DoRA, LoRA, LoRAPlus, Modules, OLoRA, PiSSA, RsLoRA
from models_for_tests import inputs_for, logits_of, loss_of, perturb, tiny

FUSED = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "query_key_value"}


def weight_of(model, path):
    module = model.get_submodule(path)
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def assert_close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


# --- parts of fused maps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LoRA, PiSSA, DoRA])
@pytest.mark.parametrize("model_name", FUSED)
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_part_changes_its_own_rows_alone(part, model_name, kind):
    model = tiny(model_name)
    adapter = attach(model, kind(rank=3, targets=part))
    perturb(adapter)
    wanted = logits_of(model)
    plain = {site.path: weight_of(model, site.path).clone() for site in survey(model).select(FUSED[model_name])}
    adapter.merge()
    for own in adapter.parts:
        moved = (weight_of(model, own.site.path) - plain[own.site.path]).abs().sum(1) > 0
        columns = {c for start, stop in own.site.columns for c in range(start, stop)}
        assert set(moved.nonzero().flatten().tolist()) == columns
        assert len(columns) == own.site.out_features
    assert_close(logits_of(model), wanted)


@pytest.mark.parametrize("model_name", FUSED)
def test_a_part_is_lora_on_the_whole_map_with_zeros_elsewhere(model_name):
    model = tiny(model_name)
    part = attach(model, LoRA(rank=3, targets="query"), name="part")
    perturb(part)
    wanted = logits_of(model)
    whole = attach(model, LoRA(rank=3, targets=FUSED[model_name]), name="whole")
    with torch.no_grad():
        for small, large in zip(part.parts, whole.parts, strict=True):
            large.delta.lora_A.copy_(small.delta.lora_A)
            columns = [c for start, stop in small.site.columns for c in range(start, stop)]
            large.delta.lora_B[columns] = small.delta.lora_B
    assert_close(logits_of(model), wanted)


def test_the_query_of_neox_is_interleaved_by_head():
    """Its fused map holds query, key and value of one head after another."""
    (site, *_) = survey(tiny("gpt_neox")).select("query")
    assert site.columns == ((0, 8), (24, 32), (48, 56), (72, 80))


@pytest.mark.parametrize(
    "method", [LoRA(rank=3, targets="query,value"), PiSSA(rank=3, targets="key"), DoRA(targets="key")]
)
def test_parts_are_saved_in_our_own_words(method, tmp_path):
    model = tiny("gpt2")
    adapter = attach(model, method)
    perturb(adapter)
    save_adapter(adapter, tmp_path / "a")
    fresh = tiny("gpt2")
    load_adapter(fresh, tmp_path / "a")
    assert_close(logits_of(fresh), logits_of(model))


# --- experts --------------------------------------------------------------------------------------------------------


def gpt_oss():
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.GptOssForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: tiny("mixtral"), lambda: tiny("qwen3_moe"), gpt_oss])
def test_each_expert_has_its_own_product(make):
    model = make()
    before = logits_of(model)
    adapter = attach(model, LoRA(rank=2, alpha=6, targets="experts"))
    assert torch.equal(logits_of(model), before)
    perturb(adapter)
    for part in adapter.parts:
        module, delta = model.get_submodule(part.site.path), part.delta
        base = module._parameters[part.site.parameter]
        changed = delta.parameter(base)
        for e in range(base.shape[0]):
            product = 3 * delta.lora_B[:, e :: base.shape[0]] @ delta.lora_A[2 * e : 2 * e + 2]
            assert_close(changed[e] - base[e], product.T if getattr(module, "is_transposed", False) else product, 1e-4)
    loss_of(model).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_experts_are_meant_by_name_too():
    model = tiny("mixtral")
    found = LoRA(targets="experts.down_proj", layers="0").sites(survey(model))
    assert [site.key for site in found] == ["model.layers.0.mlp.experts.down_proj"]
    assert (found[0].in_features, found[0].out_features) == (48, 32)
    assert len(LoRA(targets="attention,experts").sites(survey(model))) == 8 + 4


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"bias": True}])
def test_experts_have_no_dropout_and_no_bias(settings):
    with pytest.raises(MethodError, match="T134"):
        attach(tiny("mixtral"), LoRA(targets="experts", **settings))


# --- starts ---------------------------------------------------------------------------------------------------------


def test_pissa_starts_from_the_largest_directions():
    model = tiny("llama")
    adapter = attach(model, PiSSA(rank=3, alpha=6, targets="query"))
    delta = adapter.parts[0].delta
    u, s, v = torch.linalg.svd(weight_of(model, adapter.parts[0].site.path))
    assert_close(2 * delta.lora_B @ delta.lora_A, (u[:, :3] * s[:3]) @ v[:3])
    assert_close(delta.lora_A @ delta.lora_A.T, torch.diag(s[:3] / 2), 1e-4)


def test_olora_starts_from_qr():
    model = tiny("gpt2")
    adapter = attach(model, OLoRA(rank=3, targets="output"))
    delta = adapter.parts[0].delta
    q, r = torch.linalg.qr(weight_of(model, adapter.parts[0].site.path))
    assert torch.equal(delta.lora_A, r[:3])
    assert torch.equal(delta.lora_B, q[:, :3])


@pytest.mark.parametrize("kind", [PiSSA, OLoRA])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_is_baked_into_twice_the_rank(kind, rslora):
    model = tiny("llama")
    adapter = attach(model, kind(rank=3, alpha=2, rslora=rslora, rank_pattern={r".*\.1\..*": 2}))
    perturb(adapter)
    wanted, plain = logits_of(model), adapter.baked()
    assert isinstance(plain.method, LoRA)
    assert plain.method.rank == 6
    assert plain.method.start == "default"
    adapter.detach()
    attach(model, plain.method, state=plain.state())
    assert_close(logits_of(model), wanted)
    assert adapter.parameter_count * 2 == plain.parameter_count


def test_pissa_in_bfloat16_keeps_small_steps():
    """The difference from the start is cast, not the large factors: a step below their last bit still counts."""
    model = tiny("llama")
    exact = attach(model, PiSSA(rank=4, targets="query"), name="a")
    perturb(exact, size=1e-4)
    delta = exact.parts[0].delta
    x = torch.randn(5, 32)
    wanted, narrow = delta.add(x), delta.add(x.bfloat16()).float()
    assert (narrow - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_a_start_needs_room_and_numbers():
    with pytest.raises(MethodError, match="T132"):
        attach(tiny("llama"), PiSSA(rank=33, targets="query"))
    with pytest.raises(MethodError, match="T131"):
        attach(tiny("llama"), OLoRA(rank=2, targets="embed"))
    with pytest.raises(MethodError, match="T102"):
        PiSSA(start="pisa")


# --- DoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["qwen2", "gpt2"])
def test_dora_is_the_papers_formula(model_name):
    model = tiny(model_name)
    adapter = attach(model, DoRA(rank=3, alpha=6, targets="output"))
    perturb(adapter)
    part = adapter.parts[0]
    module, delta = model.get_submodule(part.site.path), part.delta
    turned = weight_of(model, part.site.path) + 2 * delta.lora_B @ delta.lora_A
    wanted = delta.lora_magnitude_vector[:, None] * turned / turned.norm(dim=1, keepdim=True).detach()
    x = torch.randn(2, 5, part.site.in_features)
    bias = 0 if module.bias is None else module.bias
    found, expected = module(x), x @ wanted.T + bias
    assert_close(found, expected)
    weights = torch.randn(found.shape)
    ours = torch.autograd.grad((found * weights).sum(), list(delta.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(delta.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_dora_drops_both_terms_input_as_the_authors_do():
    model = tiny("llama")
    adapter = attach(model, DoRA(rank=3, dropout=0.5, targets="query"))
    perturb(adapter)
    part = adapter.parts[0]
    module, delta = model.get_submodule(part.site.path), part.delta
    x = torch.randn(2, 5, 32)
    module.train()
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    turned = module.weight + delta.scale * delta.lora_B @ delta.lora_A
    n = delta.lora_magnitude_vector / turned.norm(dim=1)
    expected = x @ module.weight.T + (n - 1) * (dropped @ module.weight.T)
    expected = expected + n * delta.scale * (dropped @ delta.lora_A.T @ delta.lora_B.T)
    assert_close(found, expected)


def test_dora_sees_weights_that_change():
    """Norms are kept between calls, and never longer than the weight stays what it is."""
    model = tiny("llama")
    dora = attach(model, DoRA(rank=3, targets="query"), name="dora")
    perturb(dora)
    logits_of(model)
    path = dora.parts[0].site.path
    with torch.no_grad():
        model.get_submodule(path).weight.mul_(2)
    scaled = logits_of(model)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(copied), scaled)
    assert torch.equal(logits_of(copy.deepcopy(model)), scaled)
    dora.merge()
    assert_close(logits_of(model), scaled)
    dora.unmerge()
    for seed in range(3):  # merged weights come and go, often at the same address
        other = attach(model, LoRA(rank=2, targets="query"), name="other")
        perturb(other, seed=seed)
        other.merge()
        use(model, ("other", "dora"))
        found = logits_of(model)
        for part in dora.parts:
            part.delta._known = None
        assert torch.equal(logits_of(model), found)
        other.detach()


def test_dora_over_a_trained_weight_measures_that_weight():
    model = tiny("llama")
    adapter = attach(model, DoRA(rank=3, targets="query") + Modules("query"))
    perturb(adapter)
    attached = logits_of(model)
    with use(model, [None, "default", "default"]):
        assert_close(logits_of(model)[1:], attached[1:])
    adapter.merge()
    assert_close(logits_of(model), attached)


def test_a_row_of_zeros_stays_finite():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    adapter = attach(model, DoRA(rank=3, targets="query"))
    loss_of(model).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapter.parameters())


def test_dora_refuses_what_it_cannot_be():
    for settings in ({"bias": True}, {"start": "pissa"}):
        with pytest.raises(MethodError, match="T102"):
            DoRA(**settings)
    for model_name, targets in (("llama", "embed"), ("mixtral", "experts")):
        with pytest.raises(MethodError, match="T130"):
            attach(tiny(model_name), DoRA(targets=targets))


# --- rates, scales, counts ------------------------------------------------------------------------------------------


def test_b_learns_faster_with_lora_plus():
    model = tiny("llama")
    adapter = attach(model, LoRAPlus(rank=2, plus=8, bias=True, targets="query"))
    slow, fast = adapter.groups(1e-3)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in adapter.named_parameters()}
    assert {names[id(p)] for p in slow["params"]} == {"lora_A"}
    assert {names[id(p)] for p in fast["params"]} == {"lora_B", "lora_bias"}


def test_names_are_settings():
    assert RsLoRA(rank=16).scale_at("x") == LoRA(rank=16, rslora=True).scale_at("x") == 4.0
    model = tiny("llama")
    site = survey(model).select("query")[0]
    torch.manual_seed(0)
    gaussian = LoRA(rank=8, start="gaussian").build(site, model.get_submodule(site.path))
    assert gaussian.lora_A.std().item() == pytest.approx(1 / 8, rel=0.2)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "mixtral"])
def test_counts(model_name):
    model = tiny(model_name)
    widths = [(site.in_features, site.out_features) for site in survey(model).select("attention")]
    plain = sum(4 * (one + other) for one, other in widths)
    for kind in (LoRA, RsLoRA, LoRAPlus, PiSSA, OLoRA):
        adapter = attach(model, kind(rank=4))
        assert adapter.parameter_count == plain
        adapter.detach()
    assert attach(model, DoRA(rank=4)).parameter_count == plain + sum(out for _, out in widths)
    if model_name == "mixtral":
        experts = LoRA(rank=4, targets="experts")
        wanted = sum(4 * 4 * (s.in_features + s.out_features) for s in experts.sites(survey(model)))
        assert attach(model, experts, name="experts").parameter_count == wanted


def test_training_on_from_a_start_lowers_the_loss():
    for method in (PiSSA(rank=4, alpha=4), OLoRA(rank=4, alpha=4), DoRA(rank=4), LoRAPlus(rank=4)):
        model = tiny("llama")
        batch = inputs_for(model)
        batch["labels"] = batch["input_ids"]
        adapter = attach(model, method)
        optimizer = torch.optim.AdamW(adapter.groups(1e-3))
        first = model(**batch).loss
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        assert loss < first - 0.05, method
