"""The fingerprint is the backbone's: not the head's, the type's, the device's or the adapters'."""

from __future__ import annotations

import time

import pytest
import torch
import transformers as hf

from graftlm.core import attach
from graftlm.methods import Full, Head, LoRA
from graftlm.models.fingerprinting import fingerprint

from .conftest import LLAMA, T5, WIDTHS, tiny


def test_it_is_short_and_the_same_each_time():
    assert fingerprint(tiny("llama")) == fingerprint(tiny("llama"))
    assert len(fingerprint(tiny("llama"))) == 16
    int(fingerprint(tiny("llama")), 16)


@pytest.mark.parametrize(
    ("one", "other", "config"),
    [
        (hf.LlamaForCausalLM, hf.LlamaForSequenceClassification, hf.LlamaConfig(**LLAMA)),
        (hf.LlamaForCausalLM, hf.LlamaModel, hf.LlamaConfig(**LLAMA)),
        (hf.BertForMaskedLM, hf.BertForSequenceClassification, hf.BertConfig(**WIDTHS)),
        (hf.BertForMaskedLM, hf.BertForTokenClassification, hf.BertConfig(**WIDTHS)),
        (hf.T5ForConditionalGeneration, hf.T5ForSequenceClassification, hf.T5Config(**T5)),
        (hf.T5ForConditionalGeneration, hf.T5Model, hf.T5Config(**T5)),
    ],
)
def test_one_checkpoint_under_two_heads(one, other, config, tmp_path):
    first = one(config).eval()
    first.save_pretrained(tmp_path)
    second = other.from_pretrained(
        tmp_path, num_labels=5, problem_type="regression" if "Seq" in other.__name__ else None
    )
    assert fingerprint(first) == fingerprint(second)
    third = other.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert fingerprint(first) == fingerprint(third)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "t5", "bert"])
def test_adapters_and_types_do_not_matter(family):
    model = tiny(family)
    wanted = fingerprint(model)
    assert fingerprint(tiny(family).bfloat16()) == wanted
    model.config.use_cache = not getattr(model.config, "use_cache", True)
    model.config.name_or_path = "elsewhere"
    for method in (LoRA(targets="all-linear,embed"), Head(), Full()):
        adapter = attach(model, method)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1)
        assert fingerprint(model) == wanted
        adapter.merge()
        assert fingerprint(model) == wanted
        adapter.detach()
    assert fingerprint(model) == wanted


def test_other_weights_shapes_and_settings_are_another_base():
    base = fingerprint(tiny("llama"))
    torch.manual_seed(7)
    others = {
        "weights": hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
        "layers": hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})),
    }
    turned = tiny("llama")
    turned.config.rope_parameters = {"rope_theta": 5e5, "rope_type": "default"}
    others["rope"] = turned
    tuned = tiny("llama")  # one matrix of one layer moved by one percent
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    others["fine-tuned"] = tuned
    grown = tiny("llama")
    grown.resize_token_embeddings(70)
    others["resized"] = grown
    found = {name: fingerprint(model) for name, model in others.items()}
    assert base not in found.values()
    assert len(set(found.values())) == len(found)


def test_plain_modules_and_the_meta_device():
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    assert fingerprint(plain) == fingerprint(plain)
    with torch.device("meta"):
        assert fingerprint(torch.nn.Linear(3, 3)) == fingerprint(torch.nn.Linear(3, 3))


def test_it_is_fast_for_a_hundred_million_parameters():
    with torch.device("meta"):
        model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(96)])
    model.to_empty(device="cpu")
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        fingerprint(model)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.2
