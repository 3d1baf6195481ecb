"""(IA)^3 acts at the paper's sites: keys, values, and what the feed-forward part holds between its maps."""

from __future__ import annotations

import pytest
import torch

from graftlm.core import attach
from graftlm.methods import IA3
from models_for_tests import inputs_for, logits_of, perturb, tiny

#: Model -> the maps of a layer whose output is scaled, and those whose input is.
PLACES = {
    "llama": ("k_proj v_proj", "down_proj"),
    "qwen2": ("k_proj v_proj", "down_proj"),
    "gemma3": ("k_proj v_proj", "down_proj"),
    "opt": ("k_proj v_proj", "fc2"),
    "bert": ("attention.self.key attention.self.value", "0.output.dense 1.output.dense"),
    "t5_gated": ("SelfAttention.k SelfAttention.v EncDecAttention.k EncDecAttention.v", "DenseReluDense.wo"),
    "mixtral": ("k_proj v_proj", ""),
}


@pytest.mark.parametrize("model_name", PLACES)
def test_scaled_weights_are_the_same_model(model_name):
    outer, inner = (tuple(words.split()) for words in PLACES[model_name])
    model, by_hand = tiny(model_name), tiny(model_name)
    adapter = attach(model, IA3())
    perturb(adapter)
    vectors = adapter.state()
    with torch.no_grad():
        for path, module in by_hand.named_modules():
            scale = vectors.pop(f"{path}.ia3_l", None)
            assert (scale is not None) == path.endswith((*outer, *inner))
            if scale is None:
                continue
            module.weight.mul_(scale)  # [out, 1] scales rows, [1, in] columns
            if path.endswith(outer) and module.bias is not None:
                module.bias.mul_(scale[:, 0])
    assert not vectors
    found, wanted = logits_of(model), logits_of(by_hand)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits_of(tiny(model_name)), rtol=1e-3)


def test_of_a_fused_map_keys_and_values_alone_are_scaled():
    model, by_hand = tiny("gpt2"), tiny("gpt2")
    adapter = attach(model, IA3())
    perturb(adapter)
    with torch.no_grad():
        for number, block in enumerate(by_hand.transformer.h):
            state = adapter.state()
            path = f"transformer.h.{number}"
            for part, columns in (("key", slice(32, 64)), ("value", slice(64, 96))):
                scale = state[f"{path}.attn.c_attn:{part}.ia3_l"][:, 0]
                block.attn.c_attn.weight[:, columns] *= scale
                block.attn.c_attn.bias[columns] *= scale
            block.mlp.c_proj.weight.mul_(state[f"{path}.mlp.c_proj.ia3_l"].T)
    assert adapter.parameter_count == 2 * (32 + 32 + 128)
    assert torch.allclose(logits_of(model, inputs_for(model)), logits_of(by_hand), rtol=1e-5, atol=1e-6)
