"""Every folder that does not fit is refused with all its faults at once, and the model stays as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.core import adapters, attach, use
from graftlm.errors import AdapterError
from graftlm.formats import load_adapter, read_facts
from graftlm.methods import Head, LoRA

from .conftest import inputs, logits, shake, tiny

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "graftlm.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    adapter = attach(tiny("llama"), LoRA(rank=4, targets="query"), name="support")
    shake(adapter.parameters())
    return adapter.save(tmp_path_factory.mktemp("saved") / "a")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of our folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "a")


@pytest.fixture
def pefts(folder):
    """The same as PEFT would have written it."""
    (folder / OURS).unlink()
    return folder


def refused(folder, model=None, **options):
    """The findings of a refused load, by code; the model must be untouched."""
    model = tiny("llama") if model is None else model
    other = attach(model, LoRA(rank=2, targets="key"), name="other")
    shake(other.parameters())
    use(model, ["other", None, "other"])
    before, wanted = adapters(model), logits(model)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder, **options)
    assert adapters(model) == before
    assert torch.equal(logits(model), wanted)
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())
    other.detach()
    assert len(str(caught.value).splitlines()) <= 12
    found: dict[str, list] = {}
    for finding in caught.value.findings:
        found.setdefault(finding.code, []).append(finding)
    return found


def change(folder, name, **fields):
    data = json.loads((folder / name).read_text())
    data.update(fields)
    (folder / name).write_text(json.dumps(data))


def test_the_folder_loads_before_it_is_damaged(folder, tmp_path):
    model = tiny("llama")
    load_adapter(model, folder)
    assert not torch.equal(logits(model), logits(tiny("llama")))


def test_no_folder_and_the_nearest_name(folder, tmp_path):
    (finding,) = refused(tmp_path / "aa")["A201"]
    assert finding.fix == str(folder)
    (finding,) = refused(folder / CONFIG)["A201"]
    assert "is a file" in finding.message


def test_an_empty_folder_and_several_adapters_below(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refused(tmp_path / "empty")["A202"][0].message
    shutil.copytree(folder, tmp_path / "runs" / "one" / "adapter")
    assert load_adapter(tiny("llama"), tmp_path / "runs").attached  # the only one below
    shutil.copytree(folder, tmp_path / "runs" / "two")
    (finding,) = refused(tmp_path / "runs")["A221"]
    assert finding.detail == (str(tmp_path / "runs" / "two"), str(tmp_path / "runs" / "one" / "adapter"))


def test_pickles_are_not_read(pefts):
    (pefts / WEIGHTS).unlink()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"a": Bomb()}, pefts / "adapter_model.bin")
    (finding,) = refused(pefts)["A203"]
    assert "save_pretrained" in finding.fix


def test_no_weights_and_no_configuration(folder):
    (folder / WEIGHTS).unlink()
    assert refused(folder).keys() == {"A207"}
    (folder / CONFIG).write_text("{")
    assert refused(folder).keys() == {"A204", "A207"}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 3])
def test_files_that_are_not_json(text, folder):
    (folder / CONFIG).write_text(text)
    (folder / OURS).write_text(text)
    assert refused(folder).keys() == {"A204", "A214"}


@pytest.mark.parametrize("kind", ["IA3_OF_TOMORROW", None, 3, ["LORA"]])
def test_an_unknown_method_of_pefts(kind, pefts):
    change(pefts, CONFIG, peft_type=kind)
    (finding,) = refused(pefts)["A205"]
    assert "LORA" in finding.message


def test_features_that_are_not_there_are_all_named(pefts):
    asked = {
        "use_bdlora": True, "megatron_config": {"tp": 2},
        "layer_replication": [[0, 1]], "use_qalora": True, "alora_invocation_tokens": [7], "a_thing_of_tomorrow": 1,
        "ensure_weight_tying": True,
    }  # fmt: skip
    change(pefts, CONFIG, **asked, another_of_tomorrow=None)
    found = refused(pefts)["A206"]
    assert len(found) == len(asked)
    for name in asked:
        assert any(f" {name}=" in finding.message for finding in found)


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_starts_that_change_the_base(start, pefts):
    change(pefts, CONFIG, init_lora_weights=start)
    assert start in refused(pefts)["A206"][0].message


@pytest.mark.parametrize(
    "fields",
    [{"r": "eight"}, {"r": True}, {"lora_alpha": None}, {"target_modules": 3}, {"bias": "some"}, {"r": 0},
     {"target_modules": "(q_proj"}, {"rank_pattern": {"(": 2}}, {"rank_pattern": {"q_proj": "x"}},
     {"alpha_pattern": {"q_proj": "x"}}, {"lora_dropout": 2.0}, {"target_modules": None}, {"target_modules": [1]},
     {"modules_to_save": [None]}],
)  # fmt: skip
def test_values_that_mean_nothing(fields, pefts):
    change(pefts, CONFIG, **fields)
    assert refused(pefts).keys() <= {"A216", "A217", "T102", "A208", "A209"}


def test_names_that_match_nothing(pefts):
    change(pefts, CONFIG, target_modules=["q_prj"])
    (finding,) = refused(pefts)["A217"]
    assert "q_proj" in finding.message


def test_a_module_that_lora_cannot_target(pefts):
    change(pefts, CONFIG, target_modules=["q_proj", "norm"])
    assert "LlamaRMSNorm" in refused(pefts)["A217"][0].message


def test_tensors_missing_unexpected_misshapen_and_not_finite_are_told_together(pefts):
    tensors = load_file(pefts / WEIGHTS)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors[Q0] = torch.ones(4, 31)
    tensors[Q1][0, 0], tensors[Q1][1, 0] = float("nan"), float("inf")
    del tensors[Q0.replace("lora_A", "lora_B")]
    save_file(tensors, pefts / WEIGHTS)
    found = refused(pefts)
    assert {code: len(findings) for code, findings in found.items()} == {"A208": 1, "A209": 1, "A210": 1, "A211": 1}
    assert "(4, 31), wanted (4, 32)" in found["A210"][0].message
    assert "2 of 128" in found["A211"][0].message


def test_a_tensor_under_two_names(pefts):
    tensors = load_file(pefts / WEIGHTS)
    tensors[Q0.removeprefix("base_model.model.")] = torch.ones(4, 32)
    save_file(tensors, pefts / WEIGHTS)
    assert refused(pefts).keys() == {"A220"}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_cut_short(share, pefts):
    data = (pefts / WEIGHTS).read_bytes()
    (pefts / WEIGHTS).write_bytes(data[: int(len(data) * share)])
    assert refused(pefts).keys() == {"A207"}


def test_one_flipped_bit(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    (finding,) = refused(folder)["A212"]
    assert "q_proj" in finding.message


def test_another_base_of_the_same_shape(folder):
    model = tiny("llama")
    shake(model.parameters())
    (finding,) = refused(folder, model)["A213"]
    assert "trained on LlamaForCausalLM (fingerprint" in finding.message
    assert "this is LlamaForCausalLM (fingerprint" in finding.message
    assert load_adapter(model, folder, check_base=False).attached


def test_another_class_on_the_same_backbone(folder):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny("llama").config).eval()
    model.model.load_state_dict(tiny("llama").model.state_dict())
    (finding,) = refused(folder, model)["A213"]
    assert "this is LlamaForSequenceClassification" in finding.message
    assert load_adapter(model, folder, check_base=False).attached


def test_another_architecture_is_refused_even_unchecked(folder):
    model = tiny("gpt2")
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder)
    assert {"A213", "A208"} <= {finding.code for finding in caught.value.findings}
    with pytest.raises(AdapterError):
        load_adapter(model, folder, check_base=False)
    assert not adapters(model)


def test_other_widths(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**tiny("llama").config.to_dict(), "hidden_size": 64, "head_dim": 16})
    found = refused(folder, LlamaForCausalLM(config).eval())
    assert found.keys() == {"A213", "A210"}
    assert len(found["A210"]) == 4


def test_a_head_of_other_labels(tmp_path):
    from transformers import BertForSequenceClassification

    attach(tiny("bert"), LoRA() + Head()).save(tmp_path / "a")
    model = BertForSequenceClassification(
        type(tiny("bert").config)(**{**tiny("bert").config.to_dict(), "num_labels": 5})
    )
    model.bert.load_state_dict(tiny("bert").bert.state_dict())
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, tmp_path / "a")
    assert {finding.code for finding in caught.value.findings} == {"A210"}


@pytest.mark.filterwarnings("ignore")
def test_the_base_embedding_that_peft_stores_tells_the_base(pefts):
    """A targeted embedding lies in PEFT's file; another base shows by it even without a fingerprint."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny("llama-tied"), peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    shake(p for p in theirs.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.eval().save_pretrained(pefts / "b")
    model = tiny("llama-tied")
    shake(model.parameters())
    (finding,) = refused(pefts / "b", model)["A213"]
    assert "embed_tokens" in finding.message
    load_adapter(model, pefts / "b", check_base=False)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        again = peft.PeftModel.from_pretrained(_shaken(tiny("llama-tied")), pefts / "b").eval()
    torch.testing.assert_close(logits(model), logits(again), rtol=0, atol=1e-5)


def _shaken(model):
    shake(model.parameters())
    return model


def test_our_file_of_a_later_format_or_without_its_parts(folder):
    change(folder, OURS, format=2)
    assert "newer" in refused(folder)["A222"][0].fix
    with pytest.raises(AdapterError, match="A222"):
        read_facts(folder)
    change(folder, OURS, format=1, method="lora")
    assert "method" in refused(folder)["A214"][0].message


@pytest.mark.parametrize(
    "parts",
    [[{"name": "lora2", "settings": {}}], [], [{}], ["lora"], [{"name": "lora", "settings": {"rnk": 4}}],
     [{"name": "lora", "settings": {"rank": "x"}}], [{"name": ["lora"], "settings": {}}]],
)  # fmt: skip
def test_a_method_of_tomorrow(parts, folder):
    change(folder, OURS, method={"parts": parts, "text": ""})
    assert refused(folder).keys() <= {"A215", "T102"}


def test_what_peft_has_no_words_for_needs_our_file(tmp_path):
    attach(tiny("llama"), Head()).save(tmp_path / "a")
    (tmp_path / "a" / OURS).unlink()
    assert refused(tmp_path / "a").keys() == {"A214"}


def test_a_name_that_is_taken(folder):
    model = tiny("llama")
    load_adapter(model, folder)
    with pytest.raises(AdapterError, match="A106"):
        load_adapter(model, folder)
    assert list(adapters(model)) == ["support"]
    model(**inputs(model))
