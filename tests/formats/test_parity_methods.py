"""(IA)^3, VeRA, AdaLoRA and norm tuning: files of peft's load here, ours load in peft, both compute the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.core import attach
from graftlm.errors import AdapterError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import IA3, AdaLoRA, BitFit, Head, LoRA, NormTuning, VeRA

from .conftest import inputs, logits, shake, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {"llama": "CAUSAL_LM", "gqa": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
MAPS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gqa": ["k_proj", "o_proj", "up_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "wo"],
    "bert": ["query", "output.dense"],
}
NORMS = {
    "llama": ["norm", "input_layernorm"],
    "gqa": ["post_attention_layernorm"],
    "gpt2": ["ln_1", "ln_f"],
    "t5": ["layer_norm", "final_layer_norm"],
    "bert": ["LayerNorm"],
}


def model(family):
    return tiny("qwen2" if family == "gqa" else family)


def assert_same(one, other) -> None:
    largest = other.abs().max()
    assert largest > 0
    torch.testing.assert_close(one / largest, other / largest, rtol=0, atol=1e-5)


def far(changed, base) -> None:
    assert (logits(changed) - logits(base)).abs().max() > 1e-3, "the adapter does nothing: the comparison is empty"


def trained(family, config):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model(family), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    return theirs


def kind_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


CONFIGS = {
    "ia3": lambda family: peft.IA3Config(task_type=TASKS[family]),  # PEFT's own tables, wrong or not
    "ia3 chosen": lambda family: peft.IA3Config(
        target_modules=MAPS[family], feedforward_modules=MAPS[family][-1:], task_type=TASKS[family]
    ),
    "ia3 outer": lambda family: peft.IA3Config(
        target_modules=MAPS[family], feedforward_modules=[], task_type=TASKS[family]
    ),
    "vera": lambda family: peft.VeraConfig(
        r=4, projection_prng_key=5, target_modules=MAPS[family], task_type=TASKS[family]
    ),
    "vera without maps": lambda family: peft.VeraConfig(
        r=4, projection_prng_key=5, save_projection=False, target_modules=MAPS[family], task_type=TASKS[family]
    ),
    "vera biases": lambda family: peft.VeraConfig(
        r=4, bias="vera_only", target_modules=MAPS[family], task_type=TASKS[family], d_initial=0.3
    ),
    "adalora": lambda family: peft.AdaLoraConfig(
        init_r=4, lora_alpha=6, total_step=10, target_modules=MAPS[family], task_type=TASKS[family]
    ),
    "norm": lambda family: peft.LNTuningConfig(target_modules=NORMS[family], task_type=TASKS[family]),
}


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_writes_loads_here(case, family, tmp_path):
    theirs = trained(family, CONFIGS[case](family))
    theirs.save_pretrained(tmp_path / "a")
    ours = model(family)
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    far(ours, model(family))
    save_adapter(adapter, tmp_path / "b")  # and what was read is written in peft's words again
    again = peft.PeftModel.from_pretrained(model(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))
    assert kind_of(tmp_path / "b") == ("LORA" if case == "adalora" else kind_of(tmp_path / "a"))


OURS = {
    "ia3": (IA3(), "IA3"),
    "ia3 queries": (IA3(targets="query,output", feedforward=[]), "IA3"),
    "ia3 inner": (IA3(targets=[], feedforward=["down", "output"]), "IA3"),
    "vera": (VeRA(rank=4, seed=7, start=0.3), "VERA"),
    "vera everywhere": (VeRA(rank=4, targets="all-linear", dropout=0.1), "VERA"),
    "adalora": (AdaLoRA(rank=4, target_rank=2, targets="all-linear"), "LORA"),
    "norm": (NormTuning(), "LN_TUNING"),
}


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("case", OURS)
def test_what_we_write_loads_in_peft(case, family, tmp_path):
    method, kind = OURS[case]
    ours = model(family)
    adapter = attach(ours, method + Head() if TASKS[family] == "SEQ_CLS" else method)
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "a")
    assert kind_of(tmp_path / "a") == kind
    theirs = peft.PeftModel.from_pretrained(model(family), tmp_path / "a").eval()
    assert_same(logits(theirs), logits(ours))
    far(ours, model(family))
    # What peft makes of the folder is what it holds: the same keys, none left over.
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    mine, its = (load_file(tmp_path / side / "adapter_model.safetensors").keys() for side in "ab")
    assert mine == its
    for folder in "ab":
        back = model(family)
        found = load_adapter(back, tmp_path / folder)
        if case == "adalora":  # stored as plain LoRA: E is in the rows of A
            assert_same(logits(back), logits(ours))
            continue
        assert torch.equal(logits(back), logits(ours))
        if folder == "a":
            assert found.method == adapter.method


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# --- (IA)^3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ia3_by_patterns(family, tmp_path):
    pattern = {
        "llama": (r".*\.1\..*(k|down)_proj", r".*down_proj"),
        "gpt2": (r".*\.0\..*c_(attn|proj)", r".*mlp\.c_.*"),
    }
    both, inner = pattern[family]
    theirs = trained(family, peft.IA3Config(target_modules=both, feedforward_modules=inner))
    theirs.save_pretrained(tmp_path / "a")
    ours = model(family)
    load_adapter(ours, tmp_path / "a").save(tmp_path / "b")
    assert_same(logits(ours), logits(theirs))
    far(ours, model(family))
    again = peft.PeftModel.from_pretrained(model(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))


def test_the_parts_of_a_fused_map_are_one_vector_in_peft(tmp_path):
    """PEFT scales all of GPT-2's c_attn or nothing; the paper's keys and values have ones for the queries beside them."""
    ours = model("gpt2")
    adapter = attach(ours, IA3())
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    vector = found["base_model.model.transformer.h.0.attn.c_attn.ia3_l"]
    assert vector.shape == (96, 1)
    assert (vector[:32] == 1).all()
    assert not (vector[32:] == 1).any()
    (tmp_path / "graftlm.json").unlink()  # by PEFT's words alone it is a vector for the whole map
    plain = model("gpt2")
    whole = load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(ours))
    assert str(whole.method) == "ia3(targets=[c_attn],feedforward=['mlp.c_proj'])"


class Names(torch.nn.Module):
    """Modules whose names end alike, one inside the other."""

    def __init__(self):
        super().__init__()
        self.wo, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.two(self.wo(x))


def test_feedforward_words_match_inside_a_name_as_in_peft(tmp_path):
    torch.manual_seed(0)
    base, x = Names(), torch.ones(1, 3)
    state = base.state_dict()

    def fresh():
        found = Names()
        found.load_state_dict(state)
        return found

    theirs = peft.get_peft_model(fresh(), peft.IA3Config(target_modules=["wo", "two"], feedforward_modules=["wo"]))
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    ours = fresh()
    assert {part.delta.inner for part in load_adapter(ours, tmp_path / "a").parts} == {True}  # both, said or not
    assert_same(ours(x), theirs(x))
    ours = fresh()
    adapter = attach(ours, IA3(targets="(two)", feedforward="(wo)"))
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "b")
    assert kind_of(tmp_path / "b") == "GRAFTLM"  # PEFT has no words for `wo` alone
    back = fresh()
    load_adapter(back, tmp_path / "b")
    assert torch.equal(back(x), ours(x))


@pytest.mark.parametrize("field", ["target_modules", "feedforward_modules"])
def test_ia3_without_words_is_refused(field, tmp_path):
    """PEFT would look up its table of model types, which is wrong for many."""
    trained("llama", CONFIGS["ia3"]("llama")).save_pretrained(tmp_path)
    edit(tmp_path, **{field: None})
    with pytest.raises(AdapterError, match=f"{field} is not set.*A216"):
        load_adapter(model("llama"), tmp_path)


# --- VeRA -----------------------------------------------------------------------------------------------------------


def test_shared_maps_of_a_file_are_taken_as_they_are(tmp_path):
    """Random numbers may come out otherwise elsewhere: what the file has counts, unless it says that it does not."""
    trained("llama", CONFIGS["vera"]("llama")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    save_file({key: 2 * t if key.endswith("vera_A") else t for key, t in stored.items()}, file)
    theirs = peft.PeftModel.from_pretrained(model("llama"), tmp_path).eval()
    ours = model("llama")
    load_adapter(ours, tmp_path)
    assert_same(logits(ours), logits(theirs))
    edit(tmp_path, save_projection=False)
    drawn = model("llama")
    load_adapter(drawn, tmp_path)
    assert not torch.equal(logits(drawn), logits(ours))


def test_vera_at_parts_of_a_fused_map_is_ours_alone(tmp_path):
    ours = model("gpt2")
    adapter = attach(ours, VeRA(rank=4, targets="query,value"))
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path)
    assert kind_of(tmp_path) == "GRAFTLM"
    back = model("gpt2")
    load_adapter(back, tmp_path)
    assert torch.equal(logits(back), logits(ours))


# --- AdaLoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TASKS)
def test_ranks_that_pefts_adalora_handed_out(family, tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, lora_alpha=6, total_step=3, tfinal=1, target_modules=MAPS[family],
        task_type=TASKS[family],
    )  # fmt: skip
    theirs = trained(family, config)
    for step in range(1, 3):
        logits_of = theirs(**inputs(theirs.get_base_model())).logits
        theirs.zero_grad()
        logits_of.square().sum().backward()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = [sum(each) for each in written["rank_pattern"].values()]
    assert 0 in ranks, "no map is left without a rank: the case is empty"
    assert len(set(ranks)) > 2
    ours = model(family)
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    far(ours, model(family))
    assert sum(part.delta.lora_A.shape[0] for part in adapter.parts if isinstance(part.method, LoRA)) == sum(ranks)
    adapter.save(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(model(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "no list of 4.*A216"),
        ({"init_r": 0}, "init_r cannot be 0.*A216"),
        ({"use_dora": True}, "use_dora.*A206"),
        ({"target_modules": ["q_prj"]}, "nearest: q_proj.*A217"),
        ({"target_modules": None}, "target_modules is not set.*A216"),
    ],
)
def test_adalora_that_cannot_be_read_says_why(fields, reason, tmp_path):
    trained("llama", CONFIGS["adalora"]("llama")).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(AdapterError, match=reason):
        load_adapter(model("llama"), tmp_path)


def test_adalora_with_all_biases(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, total_step=9, bias="all", target_modules=["c_attn"], task_type="CAUSAL_LM")
    theirs = trained("gpt2", config)
    theirs.save_pretrained(tmp_path)
    ours = model("gpt2")
    adapter = load_adapter(ours, tmp_path)
    assert any(isinstance(part.method, BitFit) for part in adapter.parts)
    assert_same(logits(ours), logits(theirs))


# --- norm tuning ----------------------------------------------------------------------------------------------------


def test_modules_that_are_no_norms_are_read_too(tmp_path):
    theirs = trained("gpt2", peft.LNTuningConfig(target_modules=["ln_f", "c_proj"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "a")
    ours = model("gpt2")
    load_adapter(ours, tmp_path / "a").save(tmp_path / "b")
    assert_same(logits(ours), logits(theirs))
    again = peft.PeftModel.from_pretrained(model("gpt2"), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["nrm"], "match nothing.*nearest: norm.*A217"), (["mlp"], "holds other modules.*A217"), ([], "A216")],
)
def test_norm_tuning_that_cannot_be_read_says_why(words, reason, tmp_path):
    trained("llama", CONFIGS["norm"]("llama")).save_pretrained(tmp_path)
    edit(tmp_path, target_modules=words)
    with pytest.raises(AdapterError, match=reason):
        load_adapter(model("llama"), tmp_path)
