"""LoRA's family against peft: DoRA, rsLoRA, LoRA+, starts from the weights (converted and not), stacks of experts."""

from __future__ import annotations

import json

import pytest
import torch

import models_for_tests
from graftlm.core import attach
from graftlm.errors import AdapterError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import DoRA, Head, LoRA, LoRAPlus, OLoRA, PiSSA, RsLoRA

from .conftest import MODELS, inputs, logits, shake
from .conftest import tiny as small

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = {"llama": ["q_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "wi"], "bert": ["query"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
EXPERTS = ("mixtral", "qwen3_moe")


def tiny(name):
    return small(name) if name in MODELS else models_for_tests.tiny(name)


def assert_same(one, other, tolerance=1e-5) -> None:
    largest = other.abs().max()
    assert largest > 0
    torch.testing.assert_close(one / largest, other / largest, rtol=0, atol=tolerance)


def far(model, base) -> None:
    assert (logits(model) - logits(base)).abs().max() > 1e-3, "the adapter does nothing: the comparison is empty"


def trained(family, config):
    """A peft model with noise on what it trains."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny(family), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    return theirs


SETTINGS = {
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True, "lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 3},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2, "query": 3}},
    "olora": {"init_lora_weights": "olora", "lora_alpha": 3},
}
GRID = [(family, case) for family in FAMILIES for case in SETTINGS if (family, case) != ("gpt2", "olora")]


@pytest.mark.parametrize(("family", "case"), GRID)
def test_what_peft_writes_loads_here(family, case, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=FAMILIES[family], task_type=TASKS[family], **SETTINGS[case])
    theirs = trained(family, config)
    theirs.save_pretrained(tmp_path / "a")
    ours = tiny(family)
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    far(ours, tiny(family))
    adapter.save(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["llama", "t5"])  # of a classifier, peft loses the head when it converts
def test_what_peft_converts_loads_here(family, start, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=FAMILIES[family], task_type=TASKS[family], init_lora_weights=start, lora_alpha=3
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny(family), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    shake(p for p in theirs.parameters() if p.requires_grad)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 8
    ours = tiny(family)
    load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), wanted)


def test_a_start_is_taken_from_the_base_as_it_was_before_a_merge(tmp_path):
    theirs = trained("llama", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    theirs.save_pretrained(tmp_path / "a")
    ours = tiny("llama")
    other = attach(ours, LoRA(rank=2), name="other")
    shake(other.parameters())
    other.merge()
    load_adapter(ours, tmp_path / "a")
    other.unmerge().detach()
    assert_same(logits(ours), logits(theirs))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "A206"),
        (
            {"init_lora_weights": "olora", "target_modules": ["c_attn", "c_proj"]},
            "PEFT takes their weight the wrong way",
        ),
        ({"use_dora": True, "target_modules": ["wte"]}, "T130"),
        ({"init_lora_weights": "pissa", "target_modules": ["wte"]}, "T131"),
        ({"target_parameters": ["c_attn.weight"], "target_modules": None}, "A217"),
        ({"target_parameters": ["nothing"], "target_modules": None}, "A217"),
    ],
)
def test_files_that_cannot_be_read_say_why(settings, reason, tmp_path):
    theirs = trained("gpt2", peft.LoraConfig(r=4, target_modules=["c_attn"]))
    theirs.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    ours = tiny("gpt2")
    with pytest.raises(AdapterError, match=reason):
        load_adapter(ours, tmp_path / "a")
    assert torch.equal(logits(ours), logits(tiny("gpt2")))


METHODS = {
    "dora": DoRA(rank=4, alpha=6),
    "dora patterns": DoRA(rank=4, rank_pattern={r".*\.1\..*": 2}, dropout=0.1),
    "rslora": RsLoRA(rank=4, alpha=3),
    "loraplus": LoRAPlus(rank=4, targets="all-linear"),
    "pissa": PiSSA(rank=4, alpha=2),
    "pissa rslora": PiSSA(rank=4, alpha=2, rslora=True, rank_pattern={r".*\.1\..*": 2}),
    "olora": OLoRA(rank=4, alpha=2, targets="all-linear"),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_loads_in_peft(family, case, tmp_path):
    method = METHODS[case] + Head() if family == "bert" else METHODS[case]
    ours = tiny(family)
    adapter = attach(ours, method)
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    assert_same(logits(theirs), logits(ours))
    far(ours, tiny(family))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_has_pefts_gradients(family, tmp_path):
    ours = tiny(family)
    adapter = attach(ours, DoRA(rank=4, alpha=12))
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a", is_trainable=True).eval()
    ours(**inputs(ours)).logits.square().sum().backward()
    theirs(**inputs(ours)).logits.square().sum().backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    own = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        assert_same(gradient, gradients[name])


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("targets", ["experts.down_proj", "experts.gate_up_proj", "both", "both and attention"])
def test_experts(family, targets, tmp_path):
    words = ["experts.down_proj", "experts.gate_up_proj"] if targets.startswith("both") else [targets]
    modules = ["q_proj"] if "attention" in targets else []
    config = peft.LoraConfig(r=2, lora_alpha=6, target_parameters=words, target_modules=modules)
    theirs = trained(family, config)
    theirs.save_pretrained(tmp_path / "a")
    ours = tiny(family)
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    far(ours, tiny(family))
    adapter.save(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_we_write_load_in_peft(family, tmp_path):
    ours = tiny(family)
    adapter = attach(ours, LoRA(rank=2, targets="attention,experts", rank_pattern={"experts.down_proj": 3}))
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    assert_same(logits(theirs), logits(ours))
