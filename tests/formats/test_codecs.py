"""A method gets its place in PEFT's format by one class and one entry, even where its tensors lie otherwise there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from graftlm.core import LinearDelta, Method, attach
from graftlm.formats import CODECS, Codec, load_adapter
from graftlm.methods import METHODS, Head, LoRA, NormTuning

from .conftest import logits, shake, tiny


class Shift(LinearDelta):
    def __init__(self, width):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(width))

    def add(self, x):
        return self.shift.to(x.dtype)


@dataclass(frozen=True)
class Shifts(Method):
    name: ClassVar[str] = "shifts"

    def sites(self, survey):
        return survey.select("down")

    def build(self, site, module):
        return Shift(site.out_features)


class ShiftsCodec(Codec):
    """One tensor for all layers, under a bare name, as PEFT has for prompts."""

    peft_type = "SHIFTS"
    method = Shifts
    defaults: ClassVar[Mapping[str, Any]] = {"modules_to_save": None}
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {"modules_to_save": (list, type(None))}
    prefix = "base_model."

    def shapes(self, parts):
        return {"shifts": (len(parts), parts[0].site.out_features)}

    def pack(self, parts, state):
        return {"shifts": torch.stack([state[part.state_key("shift")] for part in parts])}

    def unpack(self, parts: Sequence[Any], tensors):
        return {part.state_key("shift"): row for part, row in zip(parts, tensors["shifts"], strict=True)}

    def describe(self, parts, model):
        return {}

    def understand(self, config, model):
        return Shifts()


@pytest.fixture(autouse=True)
def _one_more(monkeypatch):
    codec = ShiftsCodec()
    monkeypatch.setitem(CODECS, codec.peft_type, codec)
    monkeypatch.setitem(METHODS, codec.method.name, codec.method)


@pytest.mark.parametrize("with_our_file", [True, False])
def test_tensors_that_lie_otherwise_in_the_file(with_our_file, tmp_path):
    from safetensors.torch import load_file

    ours = tiny("llama")
    adapter = attach(ours, Shifts() + Head())
    shake(adapter.parameters())
    adapter.save(tmp_path / "a")
    assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == {"shifts", "base_model.lm_head.weight"}
    if not with_our_file:
        (tmp_path / "a" / "graftlm.json").unlink()
    again = tiny("llama")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))


def test_two_methods_of_pefts_at_once_are_written_in_our_words(tmp_path):
    ours = tiny("llama")
    adapter = attach(ours, LoRA() + NormTuning() + Shifts())
    shake(adapter.parameters())
    adapter.save(tmp_path / "a")
    assert '"GRAFTLM"' in (tmp_path / "a" / "adapter_config.json").read_text()
    again = tiny("llama")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))
