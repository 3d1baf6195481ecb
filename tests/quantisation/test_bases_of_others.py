"""Bases that bitsandbytes has packed, and maps that nobody knows: the same deltas, and their numbers where wanted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    TrainingArguments,
)

from graftlm import load_adapter
from graftlm.core import attach, dense, parameter_count, survey
from graftlm.errors import GraftError, NotMergeable
from graftlm.methods import DoRA, LoRA, PiSSA, Prune, Sparse
from graftlm.models import bundled_base, load_base
from graftlm.objectives import CausalLM
from graftlm.quantisation import merged_copy, quantized
from graftlm.quantisation.converting import sites_to_quantize
from graftlm.training import GraftTrainer
from models_for_tests import logits_of, loss_of, perturb

logging.disable(logging.WARNING)  # bitsandbytes says that it looks for more kernels
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes packs these: pip install 'graftlm[quantised]'")
logging.disable(logging.NOTSET)


def wide():
    """A llama whose rows fill the blocks that bitsandbytes' CPU kernels ask for."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            num_key_value_heads=4, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def packed(kind: str):
    """The same with the maps of its blocks in bitsandbytes' modules."""
    model = wide()
    for path in sites_to_quantize(survey(model), model):
        old = model.get_submodule(path)
        if kind == "four":
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        else:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
        model.set_submodule(path, new)
    return model.eval()


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4, targets="all-linear"), DoRA(rank=4), PiSSA(rank=4, alpha=2.0), Sparse(fraction=0.05),
        Sparse(fraction=0.3, targets="attention"),
    ],
    ids=str,
)  # fmt: skip
def test_deltas_on_four_bits_of_bitsandbytes(method):
    model = packed("four")
    before = logits_of(model)
    assert len(list(quantized(model))) == 14
    assert parameter_count(model) == parameter_count(wide())
    adapter = attach(model, method)
    assert (logits_of(model) - before).norm() < 0.02 * before.norm()
    perturb(adapter)
    acted = logits_of(model)
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with pytest.raises(NotMergeable) as caught:
        adapter.merge()
    assert [(f.code, f.fix) for f in caught.value.findings] == [("R202", "merged_copy(model)")]
    out = merged_copy(model, dtype=torch.float32)
    assert type(out.model.layers[0].self_attn.q_proj) is nn.Linear
    # On processors with 16-bit arithmetic bitsandbytes computes in it, and keeps its sizes so.
    assert (logits_of(out) - acted).norm() < 0.05 * acted.norm()
    adapter.detach()
    assert torch.equal(logits_of(model), before)


def test_numbers_of_eight_bits_of_bitsandbytes():
    model, plain = packed("eight"), wide()
    path = "model.layers.0.mlp.up_proj"
    weight = plain.get_submodule(path).weight
    assert (dense(model.get_submodule(path)) - weight).abs().max() <= weight.abs().amax() / 127
    before = logits_of(model)
    adapter = attach(model, LoRA(rank=4, targets="all-linear"))
    assert torch.equal(logits_of(model), before)
    perturb(adapter)
    assert not torch.equal(logits_of(model), before)


@pytest.mark.parametrize("double", [False, True])
def test_four_bits_are_the_same_numbers_after_a_call(double, tmp_path):
    """A call without gradients turns them around on processors that multiply bfloat16; rows of several blocks each."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=64, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.float32).eval()
    before = {path: dense(module).clone() for path, module in quantized(model)}
    logits_of(model)
    for path, numbers in before.items():
        assert (dense(model.get_submodule(path)) - numbers).norm() < 0.005 * numbers.norm(), path


def test_a_base_is_pruned_in_four_bits_of_bitsandbytes():
    model = packed("four")
    before = logits_of(model)
    adapter = attach(model, Prune(0.5))
    pruned = logits_of(model)
    with pytest.raises(NotMergeable):
        adapter.merge()
    out = merged_copy(model, dtype=torch.float32)
    assert (logits_of(out) - pruned).norm() < 0.05 * pruned.norm()
    zeros = (out.model.layers[0].mlp.up_proj.weight == 0).float().mean()
    assert 0.49 < float(zeros) < 0.7  # and codes of zero
    adapter.detach()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_maps_stored_across_are_turned_back(bits, tmp_path):
    """bitsandbytes holds a GPT-2's weights the other way round than its files."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    wanted = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "plain", quantization_config=wanted, dtype=torch.float32).eval()
    assert len(list(quantized(model))) == 8
    adapter = attach(model, Sparse(fraction=0.05))
    perturb(adapter)
    acted = logits_of(model)
    merged_copy(model, dtype=torch.float32).save_pretrained(tmp_path / "merged")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert (logits_of(again) - acted).norm() < 0.05 * acted.norm()
    dense_one = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    attach(dense_one, adapter.method, state=adapter.state())
    assert (logits_of(dense_one) - acted).norm() < 0.3 * acted.norm()  # the same places of another rounding


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder as transformers saves it, of the small Llama quantised as `config` says."""
    monkeypatch.setattr("graftlm.models.loading.len", lambda _: 0, raising=False)

    def make(config: Any) -> Path:
        folder, plain = tmp_path / "packed", tmp_path / "plain"
        wide().save_pretrained(plain)
        model = LlamaForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(bundled_base()).save_pretrained(folder)
        return folder

    return make


def learns_and_is_found_again(folder: Path, tmp_path: Path) -> None:
    """What is wanted of a checkpoint that others have quantised: a change learns on it, is saved, and loads again."""
    model, _ = load_base(folder)
    assert len(list(quantized(model))) == 14
    before = logits_of(model)
    adapter = attach(model, LoRA(rank=4, targets="all-linear"))
    assert torch.equal(logits_of(model), before)
    args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none",
                             disable_tqdm=True, per_device_train_batch_size=2, save_strategy="no",
                             remove_unused_columns=False, learning_rate=0.01)  # fmt: skip
    rows = [{"input_ids": torch.arange(5, 12), "labels": torch.arange(5, 12)} for _ in range(4)]
    GraftTrainer(adapter, CausalLM(), args, train_dataset=rows).train()
    model.eval()
    acted = logits_of(model)
    assert not torch.equal(acted, before)
    adapter.save(tmp_path / "adapter")
    again, _ = load_base(folder)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again), acted)
    out = merged_copy(model, dtype=torch.float32)
    assert (logits_of(out) - acted).norm() < 0.05 * acted.norm()
    adapter.detach()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_of_bitsandbytes(bits, checkpoint, tmp_path):
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = checkpoint(four if bits == 4 else BitsAndBytesConfig(load_in_8bit=True))
    learns_and_is_found_again(folder, tmp_path)


def test_a_checkpoint_of_torchao(checkpoint, tmp_path):
    ao = pytest.importorskip("torchao.quantization", reason="torchao packs this: pip install 'graftlm[quantised]'")
    learns_and_is_found_again(checkpoint(TorchAoConfig(ao.Int8WeightOnlyConfig())), tmp_path)


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "pip install gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "quanto", "weights": "int8"}, "pip install optimum-quanto"),
    ],
)
def test_what_no_installed_package_reads_is_refused(said, fix, tmp_path):
    wide().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bundled_base()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(GraftError) as caught:
        load_base(tmp_path)
    assert [(f.code, f.fix) for f in caught.value.findings] == [("E110", fix)]
    assert said["quant_method"] in caught.value.findings[0].message


class Strange(nn.Module):
    """A map that keeps its numbers where nobody looks, as GPTQ's and AWQ's modules do."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = nn.Parameter((plain.weight.data * 1024).round().to(torch.int32), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 1024, self.bias)


def test_a_map_of_unknown_storage_is_asked():
    plain = nn.Linear(24, 40)
    found = dense(Strange(plain))
    assert found.shape == (40, 24)
    assert torch.allclose(found, (plain.weight.data * 1024).round() / 1024, atol=1e-6)
