"""LoRA that starts by making up for what packing lost (LoftQ): nearer to the weights and the model before packing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm import load_adapter
from graftlm.core import attach, dense
from graftlm.errors import GraftError
from graftlm.methods import LoRA
from graftlm.models import bundled_base, load_base
from graftlm.quantisation import FORMATS, Format, quantize

WORDS = torch.tensor([[5, 66, 7, 801, 93, 104, 11, 1200, 13, 140]])


def codes_of(caught: Any) -> list[str]:
    return [finding.code for finding in caught.value.findings]


@pytest.mark.parametrize("format", [*FORMATS, Format("nf4", block=128, double=False)], ids=str)
def test_the_start_is_the_best_change_towards_the_weight(format: Any) -> None:
    plain, _ = load_base("bundled")
    model, _ = load_base("bundled", quantize=format)
    adapter = attach(model, LoRA(rank=16, alpha=5, targets="up,key", layers="-1:", start="loftq"))
    assert len(adapter.parts) == 2
    for part in adapter.parts:
        weight, packed = (dense(m.get_submodule(part.site.path)).detach() for m in (plain, model))
        missing = weight - packed
        down, up = part.delta.lora_A.data, part.delta.lora_B.data
        left = missing - 5 / 16 * up @ down
        # No change of that rank comes nearer: what is left are the other singular values (Eckart and Young).
        values = torch.linalg.svdvals(missing)
        assert left.norm() == pytest.approx(values[16:].norm().item(), rel=1e-3)
        assert left.norm() < missing.norm()


def test_it_is_pefts_step() -> None:
    loftq = pytest.importorskip("peft.utils.loftq_utils")
    model, _ = load_base("bundled", quantize=Format("nf4", double=False))
    plain, _ = load_base("bundled")
    adapter = attach(model, LoRA(rank=8, alpha=8, targets="query", layers="0", start="loftq"))
    for part in adapter.parts:
        path = part.site.path
        missing = plain.get_submodule(path).weight.data - dense(model.get_submodule(path))
        theirs = loftq._low_rank_decomposition(missing, reduced_rank=8)
        wanted = theirs["L"] @ theirs["R"]
        found = part.delta.lora_B.data @ part.delta.lora_A.data
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_the_model_begins_nearer_to_the_one_before_packing(format: str) -> None:
    plain, _ = load_base("bundled")
    model, _ = load_base("bundled", quantize=format)
    with torch.no_grad():
        wanted, before = plain(WORDS).logits, model(WORDS).logits
        attach(model, LoRA(rank=32, targets="all-linear", start="loftq"))
        after = model(WORDS).logits
    assert (after - wanted).norm() < 0.85 * (before - wanted).norm()


def test_a_change_from_there_is_saved_and_loaded_on_the_packed_base(tmp_path: Path) -> None:
    model, _ = load_base("bundled", quantize="nf4")
    adapter = attach(model, LoRA(rank=4, targets="down,query", start="loftq"))
    model(WORDS, labels=WORDS).loss.backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.1 * parameter.grad
    wanted = model(WORDS).logits
    adapter.save(tmp_path / "adapter")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(WORDS).logits, wanted)
    fresh, _ = load_base("bundled", quantize="nf4")
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(WORDS).logits, wanted, atol=1e-5, rtol=1e-5)
    # Attached anew, it begins from the weights again; merged, it folds.
    adapter.merge()
    torch.testing.assert_close(model(WORDS).logits, wanted, atol=1e-3, rtol=1e-4)
    adapter.unmerge()
    adapter.detach()
    attach(model, LoRA(rank=4, targets="query", start="loftq"))


def test_parts_of_fused_maps_and_weights_stored_across(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from models_for_tests import tiny

    tiny("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(bundled_base()).save_pretrained(tmp_path)
    monkeypatch.setattr("graftlm.models.loading.len", lambda _: 0, raising=False)
    model, _ = load_base(tmp_path, quantize="int4")
    adapter = attach(model, LoRA(rank=8, alpha=8, targets="key", start="loftq"))
    for part in adapter.parts:
        weight = tiny("gpt2").get_submodule(part.site.path).weight.data.T
        missing = (weight - dense(model.get_submodule(part.site.path)))[32:64]
        left = missing - part.delta.lora_B.data @ part.delta.lora_A.data
        assert left.norm() == pytest.approx(torch.linalg.svdvals(missing)[8:].norm().item(), rel=1e-3)


def test_where_the_weight_before_packing_cannot_be_had(tmp_path: Path) -> None:
    method = LoRA(rank=4, targets="query", start="loftq")
    plain, tokenizer = load_base("bundled")
    with pytest.raises(GraftError) as caught:
        attach(plain, method)
    assert codes_of(caught) == ["T135"]
    assert "nothing is packed" in str(caught.value)
    with pytest.raises(GraftError) as caught:
        attach(quantize(load_base("bundled")[0], "nf4"), method)
    assert codes_of(caught) == ["T135"]
    assert "not known" in str(caught.value)
    with pytest.raises(GraftError) as caught:
        attach(load_base("bundled", quantize="nf4")[0], LoRA(rank=4, targets="embed", start="loftq"))
    assert codes_of(caught) == ["T131"]
    # A file that changed, or went, since the base was loaded.
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_base(tmp_path, quantize="nf4")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = -tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GraftError) as caught:
        attach(model, method)
    assert codes_of(caught) == ["Q110"]
    file.unlink()
    with pytest.raises(GraftError) as caught:
        attach(model, method)
    assert codes_of(caught) == ["Q110"]
    assert "graftlm" not in str(sorted(vars(model)))


def test_a_run_says_before_it_loads_anything(tmp_path: Path) -> None:
    from graftlm.settings import resolve

    with pytest.raises(GraftError) as caught:
        resolve(flags={"method": "lora(rank=4,start=loftq)"})
    assert codes_of(caught) == ["S107"]
    assert "quantize" in caught.value.findings[0].fix
    resolve(flags={"method": "lora(rank=4,start=loftq)", "quantize": "nf4"})
