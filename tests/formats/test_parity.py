"""Adapters written by peft load here, ours load in peft, and both compute the same."""

from __future__ import annotations

import json

import pytest
import torch

from graftlm.core import attach
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import BitFit, Head, LoRA, Modules

from .conftest import inputs, logits, shake, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ["llama", "gpt2", "t5", "bert"]


def assert_same(one, other) -> None:
    """Equal to 1e-6 of the largest entry: float32, summed in another order."""
    largest = other.abs().max()
    assert largest > 0
    torch.testing.assert_close(one / largest, other / largest, rtol=0, atol=1e-6)


def far(model, base) -> None:
    assert (logits(model) - logits(base)).abs().max() > 1e-3, "the adapter does nothing: the comparison is empty"


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_has_pefts_logits_and_gradients(family, tmp_path):
    ours, theirs = tiny(family), tiny(family)
    adapter = attach(ours, LoRA(rank=4, alpha=12, targets="attention"))
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a", is_trainable=True).eval()
    one, other = ours(**inputs(ours)).logits, theirs(**inputs(ours)).logits
    assert_same(one, other)
    far(ours, tiny(family))
    one.square().sum().backward()
    other.square().sum().backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    own = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        largest = gradient.abs().max()
        assert largest > 0
        # Two orders of summation: float32 carries 1e-6 of the largest entry, give or take a few roundings.
        torch.testing.assert_close(gradient / largest, gradients[name] / largest, rtol=0, atol=1e-6)


PEFTS = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear", "use_rslora": True, "task_type": "CAUSAL_LM"}),
    "all-linear classifier": ("bert", {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "regex": ("llama", {"r": 4, "target_modules": r".*\.[01]\.mlp\.(up|down)_proj", "task_type": "CAUSAL_LM"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, r".*\.1\..*v_proj": 3},
            "alpha_pattern": {r".*\.0\..*v_proj": 5.5},
            "task_type": "CAUSAL_LM",
        },
    ),
    "layers": ("llama", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers of t5": (
        "t5",
        {"r": 4, "target_modules": ["q", "wi"], "layers_to_transform": 0, "task_type": "SEQ_2_SEQ_LM"},
    ),
    "excluded": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.v_proj"]}),
    "lora_bias": ("llama-biases", {"r": 4, "target_modules": ["q_proj"], "lora_bias": True, "task_type": "CAUSAL_LM"}),
    "bias all": ("llama-biases", {"r": 4, "target_modules": ["q_proj"], "bias": "all", "task_type": "CAUSAL_LM"}),
    "bias lora_only": (
        "llama-biases",
        {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only", "task_type": "CAUSAL_LM"},
    ),
    "bias all gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "bias": "all", "task_type": "CAUSAL_LM"}),
    "bias all classifier": ("bert", {"r": 4, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias lora_only classifier": (
        "bert",
        {"r": 4, "target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"},
    ),
    "head llama": ("llama-cls", {"r": 4, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "head roberta": ("roberta", {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "head distilbert": ("distilbert", {"r": 4, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "head by name": ("bert", {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "modules": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
            "task_type": "CAUSAL_LM",
        },
    ),
    "modules by a piece of a name": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "modules tied": (
        "llama-tied",
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
            "task_type": "CAUSAL_LM",
        },
    ),
    "embedding": ("llama", {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}),
    "embedding tied": ("llama-tied", {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}),
    "lm_head tied": ("llama-tied", {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}),
    "gpt2 default": ("gpt2", {"r": 4, "task_type": "CAUSAL_LM"}),
    "gaussian start": ("llama", {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", PEFTS)
def test_what_peft_writes_loads_here(case, tmp_path):
    family, settings = PEFTS[case]
    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(**settings)).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    ours = tiny(family)
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    far(ours, tiny(family))
    adapter.save(tmp_path / "b")  # and what was read is written in peft's words again
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))


def test_pefts_other_key_forms(tmp_path):
    model = tiny("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    theirs = peft.inject_adapter_in_model(config, tiny("llama")).eval()
    shake(p for name, p in theirs.named_parameters() if "lora_" in name)
    state = peft.get_peft_model_state_dict(_with_config(theirs, config))
    assert not any(key.startswith("base_model") for key in state)
    from safetensors.torch import save_file

    for number, prefix in enumerate(["", "base_model.model._orig_mod.", "_orig_mod."]):
        folder = tmp_path / f"form{number}"
        folder.mkdir()
        save_file({prefix + key: value.clone() for key, value in state.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)
        adapter = load_adapter(model, folder)
        assert_same(logits(model), logits(theirs))
        adapter.detach()


def _with_config(model, config):
    model.peft_config = {"default": config}
    return model


def test_a_second_adapter_of_peft_lies_in_a_folder_below(tmp_path):
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="tone")
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.eval().save_pretrained(tmp_path / "a")
    ours = tiny("llama")
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    assert adapter.attached


def test_the_head_of_a_task_needs_no_word(tmp_path):
    """Peft keeps the head of a classifier by its task alone."""
    theirs = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.eval().save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    again = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path / "a").eval()
    ours = tiny("bert")
    load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    assert_same(logits(again), logits(theirs))


def test_an_embedding_that_peft_stored_after_a_resize(tmp_path):
    """Peft stores both matrices of a resized vocabulary without a word in its configuration."""
    grown = tiny("llama-tied")
    grown.resize_token_embeddings(66)
    theirs = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ours = tiny("llama-tied")
    with pytest.raises(ValueError, match=r"66 rows[\s\S]*resize_token_embeddings\(66\)"):
        load_adapter(ours, tmp_path / "a")
    ours.resize_token_embeddings(66)  # the new rows have other random values here
    load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))


OURS = {
    "all-linear": ("llama", LoRA(rank=4, targets="all-linear", rslora=True)),
    "conv1d": ("gpt2", LoRA(rank=4, targets="attention,down")),
    "t5 stacks": ("t5", LoRA(rank=4, targets=["encoder/query", "cross/key", "decoder/down"])),
    "layers": ("llama", LoRA(rank=4, targets="ffn", layers="-1:")),
    "ranks": (
        "llama",
        LoRA(rank=4, targets="query,value", rank_pattern={r".*\.0\..*": 2}, alpha_pattern={"v_proj": 3.5}),
    ),
    "two ranks": ("llama", LoRA(rank=4, targets="query") + LoRA(rank=2, alpha=3, targets="value")),
    "order of patterns": ("llama", LoRA(rank=4, targets="query", rank_pattern={"q_proj": 2, "0.self_attn.q_proj": 3})),
    "lora_bias": ("llama", LoRA(rank=4, targets="query", bias=True)),
    "embedding": ("llama", LoRA(rank=4, targets="query,embed")),
    "embedding tied": ("llama-tied", LoRA(rank=4, targets="query,embed")),
    "t5 embedding": ("t5", LoRA(rank=4, targets="query,embed")),
    "head": ("bert", LoRA(rank=4) + Head()),
    "no head": ("bert", LoRA(rank=4)),
    "head of llama": ("llama-cls", LoRA(rank=4) + Head()),
    "head in parts": ("roberta", LoRA(rank=4) + Head()),
    "tokens": ("bert-tokens", LoRA(rank=4) + Head()),
    "two heads": ("distilbert", LoRA(rank=4) + Head()),
    "lm_head tied": ("llama-tied", LoRA(rank=4) + Head()),
    "modules tied": ("llama-tied", LoRA(rank=4) + Modules(["embed_tokens", "lm_head"])),
    "norm alone": ("llama", LoRA(rank=4) + Modules("model.norm")),
    "biases": ("qwen2", LoRA(rank=4, targets="query") + BitFit(add=False)),
    "biases and head": ("bert", LoRA(rank=4, targets="query") + BitFit() + Head()),
    "biases of gpt2": ("gpt2", LoRA(rank=4) + BitFit()),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_loads_in_peft(case, tmp_path):
    family, method = OURS[case]
    ours = tiny(family)
    adapter = attach(ours, method)
    shake(adapter.parameters())
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    assert_same(logits(theirs), logits(ours))
    far(ours, tiny(family))
    # What peft makes of the folder is what it holds: the same keys, none left over.
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    mine, its = (_keys(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    junk = {key for key in its if ".original_module." in key or ".modules_to_save." in key}
    assert mine == its - junk


def _keys(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return set(file.keys())


def test_the_configuration_has_pefts_fields(tmp_path):
    model = tiny("llama")
    attach(model, LoRA(rank=4, targets="query")).save(tmp_path / "a")
    theirs = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "b")
    mine, its = ((tmp_path / side / "adapter_config.json").read_text() for side in "ab")
    assert mine == its.replace('"base_model_name_or_path": ""', '"base_model_name_or_path": null')


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("bert", BitFit()),
        ("llama", LoRA(rank=4) + Modules("q_proj")),
        ("llama", LoRA(rank=4) + LoRA(rank=4, targets="ffn", dropout=0.1)),
    ],
)
def test_peft_refuses_by_name_what_it_has_no_words_for(family, method, tmp_path):
    attach(tiny(family), method).save(tmp_path / "a")
    with pytest.raises(KeyError, match="GRAFTLM"):
        peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a")
