"""Bases that are packed while they are read: the same as packed afterwards, in a fraction of the memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from graftlm.core import adapters, attach, parameter_count
from graftlm.errors import MethodError, ModelError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import BitFit, Full, Layers, LoRA
from graftlm.models import bundled_base, fingerprint, load_base
from graftlm.quantisation import FORMATS, Format, quantize, quantized
from models_for_tests import logits_of, tiny

SRC = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A tiny model in a folder of its own, with some tokenizer."""

    def make(name: str, **options: Any) -> Path:
        folder = tmp_path / name
        tiny(name).save_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(bundled_base())
        tokenizer.save_pretrained(folder)
        return folder

    return make


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    # The tiny models have fewer tokens than any real tokenizer.
    monkeypatch.setattr("graftlm.models.loading.len", lambda _: 0, raising=False)
    return load_base(folder, **options)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_as_packed_afterwards(name):
    model, _ = load_base("bundled", quantize=name)
    other = quantize(load_base("bundled")[0], name)
    assert list(model.state_dict()) == list(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    assert parameter_count(model) == parameter_count(load_base("bundled")[0])
    assert {path.rpartition(".")[2] for path, _ in quantized(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("model_name", ["gpt2", "opt", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_other_architectures_and_shards(model_name, shards, saved, monkeypatch):
    folder = saved(model_name, **({"max_shard_size": shards} if shards else {}))
    model = load(folder, monkeypatch, quantize="nf4")
    other = quantize(tiny(model_name), "nf4")
    assert list(quantized(model))
    assert torch.equal(logits_of(model), logits_of(other))


def test_a_classifier_gets_a_fresh_head_in_full(saved, monkeypatch):
    model = load(saved("bert"), monkeypatch, quantize="nf4", task="classify", labels=["a", "b", "c"])
    assert model.num_labels == 3
    assert isinstance(model.classifier, torch.nn.Linear)
    assert isinstance(model.bert.pooler.dense, torch.nn.Linear)
    assert {path.split(".")[0] for path, _ in quantized(model)} == {"bert"}


def test_saved_in_few_bits_and_read_back(tmp_path):
    model, tokenizer = load_base("bundled", quantize=Format("nf4", block=128, double=False))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.4 * (
        bundled_base() / "model.safetensors"
    ).stat().st_size * (
        2 if load_file(bundled_base() / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16 else 1
    )
    again, _ = load_base(tmp_path)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert next(iter(quantized(again)))[1].format == Format("nf4", block=128, double=False)
    with pytest.raises(ModelError) as caught:
        load_base(tmp_path, quantize="int8")
    assert caught.value.findings[0].code == "M107"


def test_weights_have_fingerprints_of_their_own():
    found = {name: fingerprint(load_base("bundled", quantize=name)[0]) for name in FORMATS}
    assert found.pop("int8-dynamic") == found["int8"]  # the same weights: what is rounded besides are inputs
    assert len({*found.values(), fingerprint(load_base("bundled")[0])}) == len(FORMATS)


def test_an_adapter_of_eight_bits_fits_where_inputs_are_rounded_too(tmp_path):
    model, _ = load_base("bundled", quantize="int8")
    save_adapter(attach(model, LoRA(rank=2)), tmp_path)
    other, tokenizer = load_base("bundled", quantize="int8-dynamic")
    load_adapter(other, tmp_path)
    assert other(**tokenizer("a", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_broken_checkpoints_are_told(how, saved, monkeypatch):
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(folder, monkeypatch, quantize="nf4")
    assert [f.code for f in caught.value.findings] == ["M114" if how == "missing" else "M115"]
    assert name in str(caught.value)


def test_what_packed_weights_cannot_do_is_refused():
    model = quantize(tiny("llama"), "nf4")
    before = logits_of(model)
    for method in (Full(), Layers("-1:"), LoRA() + Full()):
        with pytest.raises(MethodError) as caught:
            attach(model, method)
        assert {f.code for f in caught.value.findings} == {"T108"}
        assert "without quantize" in caught.value.findings[0].fix
    assert not adapters(model)
    attach(model, BitFit())
    with pytest.raises(ModelError) as caught:
        quantize(model, "nf4")
    assert caught.value.findings[0].code == "Q103"
    adapters(model)["default"].detach()
    with pytest.raises(ModelError) as caught:
        quantize(model, "nf4")
    assert caught.value.findings[0].code == "Q104"
    assert torch.equal(logits_of(model), before)
    with torch.device("meta"):
        empty = type(model)(tiny("llama").config)
    with pytest.raises(ModelError) as caught:
        quantize(empty, "nf4")
    assert caught.value.findings[0].code == "Q105"


_MEASURED = """
import resource, sys, torch
from graftlm.models import load_base
from graftlm.quantisation import quantized
folder, quantize = sys.argv[1], sys.argv[2] or None
load_base("bundled", quantize=quantize)  # what is imported and cached does not count
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, _ = load_base(folder, quantize=quantize, dtype="float32")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
largest = max((m.in_features * m.out_features * 4 for _, m in quantized(model)), default=0)
print(peak * 1024, held, largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux tells it")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_peak_memory_is_the_packed_model_and_one_weight(quantize, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((bundled_base() / "config.json").read_text())
    config |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "head_dim": 64}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 12}
    shutil.copytree(bundled_base(), tmp_path / "base")
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "base")
    file_bytes = (tmp_path / "base" / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / "base"), quantize],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, held, largest = map(int, done.stdout.split())
    assert file_bytes > 200e6
    # One weight as it stands in the file, in float32, and what packing it takes; the rest is for the allocator.
    assert peak < held + 3 * largest + 0.05 * file_bytes, (peak, held, largest)
