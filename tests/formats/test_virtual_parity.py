"""Prompts and prefixes: files of peft's load here, ours load in peft, and both compute the same without padding."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from graftlm.core import attach
from graftlm.errors import AdapterError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import Head, PrefixTuning, PromptTuning, PTuning

from .conftest import inputs, logits, shake, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS",
    "llama-cls": "SEQ_CLS",
}  # fmt: skip
LENGTH = 4


def assert_same(one, other) -> None:
    largest = other.abs().max()
    torch.testing.assert_close(one / largest, other / largest, rtol=0, atol=1e-5)


def theirs_on(model):
    """The logits of a peft model for the rows' own tokens: theirs have the virtual ones in front too."""
    with torch.no_grad():
        return model(**inputs(model.get_base_model())).logits


def own_tokens(found, wanted):
    return found[:, -wanted.shape[1] :] if found.dim() == 3 else found


CONFIGS = {
    "prompt": lambda task: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type=task),
    "ptuning": lambda task: peft.PromptEncoderConfig(num_virtual_tokens=LENGTH, encoder_hidden_size=8, task_type=task),
    "ptuning-lstm": lambda task: peft.PromptEncoderConfig(
        num_virtual_tokens=LENGTH, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", task_type=task
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type=task),
    "prefix-projection": lambda task: peft.PrefixTuningConfig(
        num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=8, task_type=task
    ),
}


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_of_pefts_computes_the_same_here(kind, family, tmp_path):
    made = peft.get_peft_model(tiny(family), CONFIGS[kind](TASKS[family])).eval()
    shake(parameter for parameter in made.parameters() if parameter.requires_grad)
    made.save_pretrained(tmp_path)
    ours = tiny(family)
    adapter = load_adapter(ours, tmp_path)
    found = logits(ours)
    assert_same(found, own_tokens(theirs_on(made), found))
    assert (found - logits(tiny(family))).abs().max() > 1e-3
    # ... and written again it is the same tensor under the same key.
    save_adapter(adapter, tmp_path / "again")
    if family == "t5" and kind.startswith("prefix"):  # a layer has values of its own here, for which peft has no words
        fresh = tiny(family)
        load_adapter(fresh, tmp_path / "again")
        assert torch.equal(logits(fresh), found)
        return
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    before = load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == before.keys()
    rows = LENGTH
    assert torch.equal(again["prompt_embeddings"], before["prompt_embeddings"][:rows])


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_a_t5_prefix_of_pefts_computes_the_same_at_every_depth(layers, tmp_path):
    """PEFT gives layer i the keys and values of layer 2i mod L, and the tokens positions behind the prefix."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, vocab_size=64, relative_attention_num_buckets=8
    )
    base = transformers.T5ForConditionalGeneration(config).eval()
    for stack in (base.encoder, base.decoder):  # so that a place more or less is seen
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_()
    made = peft.get_peft_model(copy.deepcopy(base), CONFIGS["prefix"]("SEQ_2_SEQ_LM")).eval()
    shake(parameter for parameter in made.parameters() if parameter.requires_grad)
    made.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    wanted = theirs_on(made)
    assert_same(logits(base), wanted)
    batch = inputs(base)
    with torch.no_grad():  # ... and token by token
        cache = base(**{**batch, "decoder_input_ids": batch["decoder_input_ids"][:, :2]}, use_cache=True)
        for place in (2, 3):
            rest = {**batch, "decoder_input_ids": batch["decoder_input_ids"][:, place : place + 1]}
            cache = base(**rest, past_key_values=cache.past_key_values, use_cache=True)
            assert_same(cache.logits[:, -1], wanted[:, place])


def test_a_prefix_of_pefts_is_refused_where_a_decoder_counts_its_positions(tmp_path):
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.BartForConditionalGeneration(config)
    peft.get_peft_model(copy.deepcopy(base), CONFIGS["prefix"]("SEQ_2_SEQ_LM")).save_pretrained(tmp_path)
    with pytest.raises(AdapterError) as caught:
        load_adapter(base, tmp_path)
    assert [finding.code for finding in caught.value.findings] == ["A206"]


OURS = {
    "prompt": PromptTuning(length=LENGTH),
    "ptuning": PTuning(length=LENGTH),
    "prefix": PrefixTuning(length=LENGTH, positions="shifted"),
    "prefix-mlp": PrefixTuning(length=LENGTH, positions="shifted", mlp=8),
}


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("kind", OURS)
def test_a_file_of_ours_computes_the_same_in_peft(kind, family, tmp_path):
    if family == "t5" and kind.startswith("prefix"):
        pytest.skip("peft has no words for a prefix of the encoder, nor for one of its own in each layer")
    ours, base = tiny(family), tiny(family)
    method = OURS[kind] + Head() if TASKS[family] == "SEQ_CLS" else OURS[kind]
    adapter = attach(ours, method)
    shake(adapter.parameters())
    wanted = logits(ours)
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == ("PREFIX_TUNING" if kind.startswith("prefix") else "PROMPT_TUNING")
    made = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_same(own_tokens(theirs_on(made), wanted), wanted)
    fresh = tiny(family)
    back = load_adapter(fresh, tmp_path)
    assert_same(logits(fresh), wanted)
    assert not any("mlp" in name or "lstm" in name for name in back.state())


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(length=3),
        PrefixTuning(length=3, layers="0", positions="shifted"),
        PromptTuning(length=3, position="end"),
        PromptTuning(length=3, start="text", tokens=[5, 6], position="after-bos"),
    ],
    ids=str,
)
def test_what_peft_has_no_words_for_is_written_in_ours(method, tmp_path):
    model = tiny("llama")
    adapter = attach(model, method)
    save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GRAFTLM"
    fresh = tiny("llama")
    assert load_adapter(fresh, tmp_path).method == method
    assert torch.equal(logits(fresh), logits(model))


def test_a_prompt_of_a_classifier_without_its_head_is_ours_alone(tmp_path):
    """PEFT would want the head in the file."""
    save_adapter(attach(tiny("bert"), PromptTuning(length=3)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GRAFTLM"
