"""Bases partly on disk (`device_map` of transformers and accelerate): deltas act, learn and leave as on one in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core import attach
from graftlm.errors import GraftError
from graftlm.methods import read_method
from graftlm.quantisation import merged_copy
from models_for_tests import logits_of, loss_of, perturb, tiny

pytest.importorskip("accelerate")


@pytest.fixture
def offloaded(tmp_path: Path) -> Any:
    """A tiny Llama whose first block lies on disk."""
    tiny("llama").save_pretrained(tmp_path / "base")
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.embed_tokens": "cpu", "lm_head": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = type(tiny("llama")).from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float32
    )
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.is_meta
    return model.eval()


@pytest.mark.parametrize("text", ["lora(rank=2,targets=all-linear)", "dora(rank=2)", "ia3", "series(width=4)"])
def test_a_base_partly_on_disk_is_the_same_base(text: str, offloaded: Any) -> None:
    whole: Any = tiny("llama")
    plain = logits_of(offloaded)
    torch.testing.assert_close(plain, logits_of(whole), atol=1e-6, rtol=1e-5)
    here, there = (attach(model, read_method(text), name="a") for model in (whole, offloaded))
    perturb(here)
    with torch.no_grad():
        for own, other in zip(there.parameters(), here.parameters(), strict=True):
            own.copy_(other)
    offloaded.eval()
    torch.testing.assert_close(logits_of(offloaded), logits_of(whole), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits_of(offloaded), plain, atol=1e-3), "the adapter changed nothing"
    for model in (whole, offloaded):
        loss_of(model).backward()
    for own, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=1e-3)
    there.detach()
    torch.testing.assert_close(logits_of(offloaded), plain, atol=0, rtol=0)


def test_a_copy_of_a_base_partly_on_disk_is_refused(offloaded: Any) -> None:
    attach(offloaded, read_method("lora(rank=2)"), name="a")
    with pytest.raises(GraftError) as caught:
        merged_copy(offloaded)
    assert caught.value.findings[0].code == "Q107"
