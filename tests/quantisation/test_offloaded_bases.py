"""Bases laid out over devices and disk (`device_map`): deltas act, learn, are saved and leave as on one in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from graftlm import load_adapter
from graftlm.core import attach
from graftlm.errors import GraftError
from graftlm.kernels import fuse
from graftlm.methods import read_method
from graftlm.models import bundled_base, fingerprint, load_base
from graftlm.quantisation import merged_copy
from models_for_tests import logits_of, loss_of, perturb, tiny

pytest.importorskip("accelerate")

#: The first block of a tiny Llama on disk.
PLACES = {
    "model.layers.0": "disk", "model.layers.1": "cpu", "model.embed_tokens": "cpu", "lm_head": "cpu",
    "model.norm": "cpu", "model.rotary_emb": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(made)
    AutoTokenizer.from_pretrained(bundled_base()).save_pretrained(made)
    return made


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The tiny models have fewer tokens than any real tokenizer.
    monkeypatch.setattr("graftlm.models.loading.len", lambda _: 0, raising=False)
    return lambda at=folder, **options: load_base(at, **options)[0]


def is_on_disk(model: Any) -> bool:
    return bool(model.get_submodule("model.layers.0.self_attn.q_proj").weight.is_meta)


@pytest.mark.parametrize(
    ("text", "quantize"),
    [
        ("lora(rank=2,targets=all-linear)", None),
        ("lora(rank=2,targets=all-linear)+bitfit", "nf4"),
        pytest.param("dora(rank=2)", None, marks=pytest.mark.slow),
        pytest.param("dora(rank=2)", "nf4", marks=pytest.mark.slow),
        pytest.param("pissa(rank=2,alpha=2)", "int8", marks=pytest.mark.slow),
        pytest.param("lora(rank=2,start=loftq)", "nf4", marks=pytest.mark.slow),
        pytest.param("ia3", None, marks=pytest.mark.slow),
        pytest.param("series(width=4)", None, marks=pytest.mark.slow),
    ],
)
def test_a_base_partly_on_disk_is_the_same_base(text: str, quantize: str | None, load: Any, tmp_path: Path) -> None:
    whole, apart = load(quantize=quantize), load(quantize=quantize, device_map=PLACES)
    assert is_on_disk(apart)
    assert not is_on_disk(whole)
    assert fingerprint(apart) == fingerprint(whole)
    plain = logits_of(apart)
    torch.testing.assert_close(plain, logits_of(whole), atol=1e-6, rtol=1e-5)
    here, there = (attach(model, read_method(text), name="a") for model in (whole, apart))
    perturb(here)
    with torch.no_grad():
        for own, other in zip(there.parameters(), here.parameters(), strict=True):
            own.copy_(other)
    whole.eval(), apart.eval()
    acted = logits_of(whole)
    torch.testing.assert_close(logits_of(apart), acted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(acted, plain, atol=1e-3), "the adapter changed nothing"
    with fuse(whole, recompute="blocks"), fuse(apart, recompute="blocks"):  # as a run trains
        for model in (whole, apart):
            loss_of(model).backward()
    for own, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=1e-3)
    there.save(tmp_path / "adapter")
    with torch.inference_mode():  # hooks then leave stand-ins that cannot learn
        apart(torch.tensor([[1, 2, 3]]))
    there.detach()
    assert {p.requires_grad for p in apart.parameters() if p.is_floating_point()} == {True}
    torch.testing.assert_close(logits_of(apart), plain, atol=0, rtol=0)
    here.detach()
    load_adapter(whole, tmp_path / "adapter")  # made on the base apart, it knows the one in memory
    torch.testing.assert_close(logits_of(whole), acted, atol=1e-5, rtol=1e-4)


def test_max_memory_says_how_much_lies_in_memory(load: Any) -> None:
    model = load(quantize="nf4", device_map="auto", max_memory={"cpu": "24KB"})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(logits_of(model), logits_of(load(quantize="nf4")), atol=0, rtol=0)
    with pytest.raises(GraftError) as caught:
        load(device_map="auto", max_memory={"cpu": "1KB"})
    assert [f.code for f in caught.value.findings] == ["M120"]
    # Nothing to lay out: all of it is where it would be without.
    assert not is_on_disk(load(device_map="auto"))


def test_what_was_put_on_disk_goes_with_the_model(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = load(quantize="nf4", device_map=PLACES)
    assert len(list(tmp_path.glob("graftlm-*/*"))) >= 7
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(GraftError):
        load(quantize="nf4", device_map={**PLACES, "model.layers.1": "disk", "model.embed_tokens": "disk"})
    gc.collect()
    assert not list(tmp_path.iterdir())
    load(quantize="nf4", device_map=PLACES, offload_folder=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) >= 7


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"device_map": "atuo"}, "device_map=auto"),
        ({"device_map": {"model": "dsik"}}, "device_map=disk"),
        ({"device_map": "auto", "device": "cpu"}, "leave out device"),
        ({"max_memory": {"cpu": "1GiB"}}, "device_map=auto"),
        ({"offload_folder": "x"}, "device_map=auto"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "cpu=10GiB"),
        ({"device_map": "auto", "max_memory": {"gpu": "1GiB"}}, "cpu=1GiB"),
    ],
)
def test_places_that_cannot_be_read(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(GraftError) as caught:
        load_base("bundled", **options)
    assert [(f.code, f.fix) for f in caught.value.findings] == [("M119", fix)]


def test_a_copy_of_a_base_partly_on_disk_is_refused(load: Any) -> None:
    model = load(device_map=PLACES)
    attach(model, read_method("lora(rank=2)"), name="a")
    with pytest.raises(GraftError) as caught:
        merged_copy(model)
    assert caught.value.findings[0].code == "Q107"
