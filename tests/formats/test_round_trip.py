"""What is saved comes back exactly: every method, its settings, its numbers, the caller's facts, in the same bytes."""

from __future__ import annotations

import cProfile
import gc
import json
import pstats

import pytest
import torch

from graftlm.core import attach, use
from graftlm.errors import AdapterError
from graftlm.formats import CODECS, load_adapter, read_facts, save_adapter
from graftlm.methods import METHODS, BitFit, Full, Head, Layers, LoRA, Modules, TrainableTokens

from .conftest import logits, shake, tiny

#: Settings that are not the defaults, for methods whose defaults do not fit the tiny models.
SPECIAL = {
    "lora": LoRA(
        rank=3, alpha=7.5, dropout=0.25, targets=["query", "v_proj"], layers="0", exclude="1.self_attn.v_proj",
        rslora=True, rank_pattern={"q_proj": 2},
    ),
    "modules": Modules(("model.norm", "o_proj")),
    "layers": Layers([1]),
    "tokens": TrainableTokens([*range(5, 60)]),
}  # fmt: skip
SUMS = {
    "lora+bitfit+head": LoRA() + BitFit() + Head(),
    "two loras": LoRA(targets="query") + LoRA(targets="value", dropout=0.1),
    "lora over full": LoRA() + Full(),
    "lora over modules": LoRA(targets="query") + Modules("q_proj"),
    "tied": LoRA(targets="embed") + Modules("head"),
}


@pytest.mark.parametrize("family", ["llama-biases", "llama-tied"])
@pytest.mark.parametrize("case", [*METHODS, *SUMS])
def test_every_method_comes_back(case, family, tmp_path):
    method = SUMS.get(case) or SPECIAL.get(case) or METHODS[case]()
    if family == "llama-tied" and "bitfit" in str(method):
        pytest.skip("no biases there")
    if case == "attempt":
        family = "llama-cls"  # models that predict the next token are refused
    model = tiny(family)
    adapter = attach(model, method, name="support")
    shake(adapter.parameters())
    baked = adapter.baked()  # what only training needs is not stored
    wanted, state = logits(model), {key: tensor.clone() for key, tensor in baked.state().items()}
    assert not torch.equal(wanted, logits(tiny(family)))
    folder = save_adapter(adapter, tmp_path / "a", facts={"labels": ["no", "yes"]})
    fresh = tiny(family)
    loaded = load_adapter(fresh, folder)
    assert loaded.method == baked.method
    assert str(loaded.method) == str(baked.method)
    assert loaded.name == "support"
    assert loaded.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state().items())
    assert all(tensor.dtype == torch.float32 for tensor in loaded.parameters())
    if baked.method == method:
        assert torch.equal(logits(fresh), wanted)
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-5, atol=1e-5)
    assert read_facts(folder) == {"labels": ["no", "yes"]}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = attach(tiny("bert"), LoRA() + BitFit() + Head())
    shake(adapter.parameters())
    for name in "ab":
        adapter.save(tmp_path / name, facts={"z": 1, "a": [2]})
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "graftlm.json"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_trainable_and_a_name_of_ones_own(tmp_path):
    attach(tiny("llama"), LoRA()).save(tmp_path / "a")
    model = tiny("llama")
    adapter = load_adapter(model, tmp_path / "a", name="tone", trainable=True)
    assert adapter.name == "tone"
    assert all(parameter.requires_grad for parameter in adapter.parameters())


@pytest.mark.parametrize(("folder", "name"), [("My Ad.apter!", "My-Ad-apter"), ("__é__", "adapter"), ("v1.2", "v1-2")])
def test_a_folder_of_pefts_gives_the_name(folder, name, tmp_path):
    attach(tiny("llama"), LoRA()).save(tmp_path / folder)
    (tmp_path / folder / "graftlm.json").unlink()
    assert load_adapter(tiny("llama"), tmp_path / folder).name == name


def test_another_type_of_the_same_base_is_the_same_base(tmp_path):
    attach(tiny("llama"), LoRA()).save(tmp_path / "a")
    adapter = load_adapter(tiny("llama").bfloat16(), tmp_path / "a")
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_a_merged_adapter_is_saved_as_it_was_and_does_not_change_the_base(tmp_path):
    model = tiny("llama-tied")
    one = attach(model, LoRA(targets="embed,query") + Head(), name="one")
    shake(one.parameters())
    one.save(tmp_path / "before")
    one.merge().save(tmp_path / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors", "graftlm.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert load_adapter(model, tmp_path / "before", name="two").name == "two"


def test_loading_beside_another_adapter(tmp_path):
    model = tiny("llama")
    one = attach(model, LoRA(targets="query"), name="one")
    shake(one.parameters())
    wanted = logits(model)
    one.save(tmp_path / "a")
    load_adapter(model, tmp_path / "a", name="two")
    assert torch.equal(logits(model), wanted)
    use(model, "one")
    assert torch.equal(logits(model), wanted)


def test_facts_that_json_cannot_hold(tmp_path):
    adapter = attach(tiny("llama"), LoRA())
    for facts in ({"a": {1, 2}}, {"a": float("nan")}):
        with pytest.raises(AdapterError, match="A219"):
            adapter.save(tmp_path / "a", facts=facts)
    assert not (tmp_path / "a").exists()


def test_peft_ignores_what_is_in_our_file_and_we_need_none_of_it(tmp_path):
    """Without graftlm.json a folder in PEFT's words means the same."""
    model = tiny("qwen2")
    adapter = attach(model, LoRA(targets="query", rank_pattern={"q_proj": 3}) + BitFit(add=False) + Modules("lm_head"))
    shake(adapter.parameters())
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "graftlm.json").unlink()
    fresh = tiny("qwen2")
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))
    assert read_facts(tmp_path / "a") == {}


def test_the_table_of_codecs_names_itself():
    assert CODECS
    for name, codec in CODECS.items():
        assert codec.peft_type == name
        assert codec.method in METHODS.values()
        json.dumps(dict(codec.defaults), sort_keys=True)
        assert codec.reads.keys() <= codec.defaults.keys()
        assert codec.inert <= codec.defaults.keys()


def test_a_later_adapter_loads_with_as_many_calls_as_the_first(tmp_path):
    """Calls are counted, not seconds: these depend on what else the machine does."""
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2, targets="all-linear"), name="saved")
    save_adapter(adapter, tmp_path / "adapter")
    adapter.detach()

    def calls(name):
        gc.collect()
        profile = cProfile.Profile()
        profile.enable()
        load_adapter(model, tmp_path / "adapter", name=name)
        profile.disable()
        return pstats.Stats(profile).total_calls

    load_adapter(model, tmp_path / "adapter", name="first")  # what is imported and looked up once
    early = calls("second")
    for number in range(30):
        load_adapter(model, tmp_path / "adapter", name=f"a{number}")
    assert calls("last") < 1.02 * early
