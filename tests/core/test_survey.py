"""The survey: roles read off the computation, checked against a table written by hand; no trace on the model."""

from __future__ import annotations

import importlib
import random

import pytest
import torch
import transformers as tf
from torch import nn

from graftlm.core import survey
from models_for_tests import MODELS, hooks_and_attributes, logits_of, tiny

# The package exports the function `survey` under the module's name.
room = importlib.import_module("graftlm.core.survey")

_SELF = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
_LLAMA = {
    **_SELF,
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "embed": "model.embed_tokens",
    "head": "lm_head",
}
_EXPERTS = {role: name for role, name in _LLAMA.items() if role not in ("gate", "up", "down")}
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_T5 = {
    "query": "layer.0.SelfAttention.q layer.1.EncDecAttention.q",
    "key": "layer.0.SelfAttention.k layer.1.EncDecAttention.k",
    "value": "layer.0.SelfAttention.v layer.1.EncDecAttention.v",
    "output": "layer.0.SelfAttention.o layer.1.EncDecAttention.o",
    "embed": "encoder.embed_tokens decoder.embed_tokens",
    "head": "lm_head",
}

#: Model -> role -> the names of the modules that have it: behind the layer's number, or in full outside the layers.
ROLES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA,
    "phi3": {
        "qkv": "self_attn.qkv_proj",
        "output": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
        "embed": "model.embed_tokens",
        "head": "lm_head",
    },
    "gpt2": {
        "qkv": "attn.c_attn",
        "output": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "embed": "transformer.wte",
        "head": "lm_head",
    },
    "opt": {
        **_SELF,
        "output": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
        "embed": "model.decoder.embed_tokens",
        "head": "lm_head",
    },
    "gpt_neox": {
        "qkv": "attention.query_key_value",
        "output": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "embed": "gpt_neox.embed_in",
        "head": "lm_head",
    },
    "bert": {**_BERT, "embed": "bert.embeddings.word_embeddings", "head": "classifier"},
    "roberta": {
        **_BERT,
        "embed": "roberta.embeddings.word_embeddings",
        "head": "classifier.dense classifier.out_proj",
    },
    "t5": {
        **_T5,
        "up": "layer.1.DenseReluDense.wi layer.2.DenseReluDense.wi",
        "down": "layer.1.DenseReluDense.wo layer.2.DenseReluDense.wo",
    },
    "t5_gated": {
        **_T5,
        "gate": "layer.1.DenseReluDense.wi_0 layer.2.DenseReluDense.wi_0",
        "up": "layer.1.DenseReluDense.wi_1 layer.2.DenseReluDense.wi_1",
        "down": "layer.1.DenseReluDense.wo layer.2.DenseReluDense.wo",
    },
    "bart": {
        "query": "self_attn.q_proj encoder_attn.q_proj",
        "key": "self_attn.k_proj encoder_attn.k_proj",
        "value": "self_attn.v_proj encoder_attn.v_proj",
        "output": "self_attn.out_proj encoder_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
        "embed": "model.encoder.embed_tokens model.decoder.embed_tokens",
        "head": "lm_head",
    },
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "llama_classifier": {**_LLAMA, "head": "score"},
    "distilbert": {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "output": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "embed": "distilbert.embeddings.word_embeddings",
        "head": "pre_classifier classifier",
    },
    "modernbert": {
        "qkv": "attn.Wqkv",
        "output": "attn.Wo",
        "gate_up": "mlp.Wi",
        "down": "mlp.Wo",
        "embed": "model.embeddings.tok_embeddings",
        "head": "head.dense head.norm decoder",
    },
    "bloom": {
        "qkv": "self_attention.query_key_value",
        "output": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "embed": "transformer.word_embeddings",
        "head": "lm_head",
    },
}

#: Linear-like modules that play none of the parts: position tables, BERT's pooler, T5's store of shared embeddings.
NO_ROLE = {
    "gpt2": "transformer.wpe",
    "opt": "model.decoder.embed_positions",
    "bert": "bert.embeddings.position_embeddings bert.embeddings.token_type_embeddings bert.pooler.dense",
    "roberta": "roberta.embeddings.position_embeddings roberta.embeddings.token_type_embeddings",
    "distilbert": "distilbert.embeddings.position_embeddings",
    "t5": "shared layer.0.SelfAttention.relative_attention_bias",
    "t5_gated": "shared layer.0.SelfAttention.relative_attention_bias",
    "bart": "model.shared model.encoder.embed_positions model.decoder.embed_positions",
}


def behind_the_layer(site):
    words = site.path.split(".")
    if site.layer is None:
        return site.path
    return ".".join(words[words.index(str(site.layer)) + 1 :])


def test_the_table_covers_every_model():
    assert ROLES.keys() == MODELS.keys()


@pytest.mark.parametrize("model_name", MODELS)
def test_roles(model_name):
    found = survey(tiny(model_name))
    by_role: dict[str, set[str]] = {}
    for site in found:
        if site.kind != "norm" or site.role == "head":
            by_role.setdefault(site.role, set()).add(behind_the_layer(site))
    nothing = by_role.pop(None, set())
    assert by_role == {role: set(names.split()) for role, names in ROLES[model_name].items()}
    assert nothing == set(NO_ROLE.get(model_name, "").split())
    assert {site.role for site in found if site.kind == "norm"} <= {"norm", "head"}


@pytest.mark.parametrize("model_name", MODELS)
def test_every_layer_has_the_same_roles(model_name):
    found = survey(tiny(model_name))
    kind = "conv1d" if model_name == "gpt2" else "linear"
    assert found.layer_count == 2
    in_layer = [
        sorted((behind_the_layer(s), s.role or "", s.stack) for s in found if s.layer == layer and s.kind == kind)
        for layer in range(2)
    ]
    assert in_layer[0] == in_layer[1] != []


@pytest.mark.parametrize("model_name", MODELS)
def test_source_is_data_flow_except_where_the_model_has_attention_code_of_its_own(model_name):
    assert survey(tiny(model_name)).source == ("names" if model_name == "bloom" else "data flow")


@pytest.mark.parametrize(
    ("model_name", "cross"),
    [("t5", "layer.1.EncDecAttention."), ("t5_gated", "layer.1.EncDecAttention."), ("bart", "encoder_attn.")],
)
def test_stacks(model_name, cross):
    for site in survey(tiny(model_name)):
        if site.layer is None:
            continue
        outer = "encoder" if "encoder" in site.path.split(".") else "decoder"
        is_cross = behind_the_layer(site).startswith(cross) and site.role in ("query", "key", "value", "output")
        assert site.stack == ("cross" if is_cross else outer), site.path


def test_models_of_one_stack_have_none():
    assert {site.stack for site in survey(tiny("llama"))} == {""}


@pytest.mark.parametrize(
    ("model_name", "path", "rows"),
    [
        ("llama", "model.layers.0.self_attn.q_proj", "batch"),
        ("opt", "model.decoder.layers.0.fc1", "tokens"),
        ("gpt2", "transformer.wpe", "broadcast"),
        ("bert", "bert.embeddings.position_embeddings", "broadcast"),
        ("bert", "bert.pooler.dense", "batch"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "unknown"),
        ("t5", "shared", "unknown"),
    ],
)
def test_row_layouts(model_name, path, rows):
    assert {site.path: site.rows for site in survey(tiny(model_name))}[path] == rows


@pytest.mark.parametrize(
    ("model_name", "path", "widths"),
    [
        ("llama", "model.layers.1.self_attn.k_proj", (32, 16)),
        ("gpt2", "transformer.h.0.attn.c_attn", (32, 96)),
        ("llama", "model.embed_tokens", (64, 32)),
        ("phi3", "model.layers.0.mlp.gate_up_proj", (32, 96)),
    ],
)
def test_widths(model_name, path, widths):
    site = next(site for site in survey(tiny(model_name)) if site.path == path)
    assert (site.in_features, site.out_features) == widths


@pytest.mark.parametrize("model_name", MODELS)
def test_every_parameter_is_found_once_with_its_aliases(model_name):
    model = tiny(model_name)
    places = [place for site in survey(model).parameters for place in site.places]
    every = {
        (path, name)
        for path, module in model.named_modules()
        for name, p in module._parameters.items()
        if p is not None
    }
    assert len(places) == len(set(places))
    assert set(places) == every
    assert [site.key for site in survey(model).parameters] == [name for name, _ in model.named_parameters()]


def test_tied_weights_are_aliases():
    found = {site.key: site.aliases for site in survey(tiny("gpt2")).parameters}
    assert found["transformer.wte.weight"] == (("lm_head", "weight"),)


@pytest.mark.parametrize("model_name", MODELS)
def test_the_probe_leaves_no_trace_and_takes_no_chances(model_name):
    model = tiny(model_name)
    logits = logits_of(model)
    traces, config = hooks_and_attributes(model), model.config.to_json_string(use_diff=False)
    attention = model.config._attn_implementation
    state = {key: value.clone() for key, value in model.state_dict().items()}
    chances = torch.random.get_rng_state(), random.getstate()
    room._cache.clear()
    survey(model)
    assert len(room._cache) == 1  # it did probe
    assert torch.equal(torch.random.get_rng_state(), chances[0])
    assert random.getstate() == chances[1]
    assert hooks_and_attributes(model) == traces
    assert model.config.to_json_string(use_diff=False) == config
    assert model.config._attn_implementation == attention
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits_of(model), logits)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_probe_works_where_gradients_are_off(mode):
    model = tiny("llama")
    room._cache.clear()
    with mode():
        assert survey(model).source == "data flow"


def test_the_probe_works_in_half_precision_and_on_another_default_device():
    room._cache.clear()
    assert survey(tiny("llama").to(torch.bfloat16)).source == "data flow"
    room._cache.clear()
    with torch.device("meta"):
        assert survey(tiny("llama")).source == "data flow"


def test_the_cache_tells_configurations_apart():
    room._cache.clear()
    survey(tiny("t5"))
    survey(tiny("t5_gated"))
    survey(tiny("t5"))
    assert len(room._cache) == 2


def test_a_model_that_is_not_from_transformers_has_roles_by_name():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.o_proj, self.fc1, self.odd = (nn.Linear(4, 4) for _ in range(4))
            self.norm = nn.LayerNorm(4)

    found = survey(nn.Sequential(Block(), Block()))
    assert found.source == "names"
    assert [site.role for site in found] == ["query", "output", "up", None, "norm"] * 2
    assert found.layer_count == 2


@pytest.mark.parametrize(
    "kind", ["olmo2", "granite", "cohere2", "starcoder2", "phi", "smollm3", "gpt_bigcode", "persimmon", "electra"]
)
def test_further_types_are_read_off_the_data_flow(kind):
    config = tf.AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    factory = tf.AutoModelForMaskedLM if kind == "electra" else tf.AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(config)
    found = survey(model)
    roles = {site.role for site in found}
    assert found.source == "data flow"
    assert {"output", "down", "embed"} <= roles
    assert {"query", "key", "value"} <= roles or "qkv" in roles
    assert "up" in roles
