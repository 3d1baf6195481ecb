"""Optimizers of bitsandbytes in runs: near AdamW, taken up where they stopped, planned, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftlm.errors import GraftError
from graftlm.planning import plan
from training.test_checkpoints import stopped
from training.tiny_runs import Tiny, same, save_llama, weights

pytest.importorskip("bitsandbytes", reason="8-bit optimizers are bitsandbytes': pip install 'graftlm[quantised]'")

LORA = "lora(rank=8,targets=all-linear)"


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A base with maps so wide that their changes are held in 8 bits."""
    return save_llama(tmp_path / "wide", intermediate_size=1024)


def test_moments_in_eight_bits_are_near_and_taken_up_again(
    tiny: Tiny, answered: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"base": wide, "method": LORA, "steps": 4, "save_every": 2}
    plain = weights(tiny(answered, out="plain", **given))
    whole = tiny(answered, out="whole", optimizer="adamw_8bit", **given)
    stored = load_file(whole.folder / "checkpoints" / "checkpoint-4" / "optimizer.safetensors")
    kinds = {tensor.dtype for name, tensor in stored.items() if name.endswith(("state1", "state2"))}
    assert kinds == {torch.uint8, torch.float32}  # small tensors stay as they are
    eight = weights(whole)
    learnt = [name for name in plain if "lora_B" in name]  # from zero
    off = sum((eight[name] - plain[name]).norm() for name in learnt) / sum(plain[name].norm() for name in learnt)
    assert 0 < off < 0.1
    stopped(tiny, answered, 2, monkeypatch, optimizer="adamw_8bit", **given)
    assert same(weights(tiny(resume_only=True)), eight)


def test_what_needs_a_gpu_is_refused_before_anything_is_read(tiny: Tiny, answered: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GraftError) as caught:
        tiny(answered, optimizer="paged_adamw_8bit")
    assert [(f.code, f.fix) for f in caught.value.findings] == [("E107", "--set train.optimizer=adamw_8bit")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(GraftError) as caught:
        tiny(answered, optimizer="adamw_8bit")
    assert "E106" in [f.code for f in caught.value.findings]


def test_the_plan_counts_them() -> None:
    full, eight = (plan("bundled", "lora(rank=16)", optimizer=name, length=64) for name in ("adamw", "adamw_8bit"))
    assert full.terms["optimizer"] == 8 * full.trainable
    # Tensors of 4,096 numbers and more: two bytes a number, and two sizes in float32 for each 256. Narrower ones stay.
    wide = plan("bundled", "lora(rank=16,targets=query)", optimizer="adamw_8bit", length=64)
    assert wide.terms["optimizer"] == (2 + 8 / 256) * wide.trainable
    assert eight.terms["optimizer"] < 0.5 * full.terms["optimizer"]
    assert eight.total_bytes - full.total_bytes == eight.terms["optimizer"] - full.terms["optimizer"]
