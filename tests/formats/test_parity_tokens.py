"""Trained rows of embeddings: files of peft's load here, ours load in peft, by themselves and beside LoRA."""

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
from graftlm.methods import Head, LoRA, Modules, NormTuning, TrainableTokens

from .conftest import WIDTHS, inputs, logits, shake, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "llama": "CAUSAL_LM", "llama-tied": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM",
    "bert": "SEQ_CLS",
}  # fmt: skip
MAPS = {"gpt2": ["c_attn"], "t5": ["q"], "bert": ["query"]}


@pytest.fixture
def ids():
    """Tokens that the rows hold, and two that they do not."""
    return [*sorted({int(each) for each in inputs(tiny("llama"))["input_ids"].flatten()})[::3], 61, 62]


def assert_same(one, other) -> None:
    largest = other.abs().max()
    assert largest > 0
    torch.testing.assert_close(one / largest, other / largest, rtol=0, atol=1e-5)


def far(changed, base) -> None:
    assert (logits(changed) - logits(base)).abs().max() > 1e-3, "the adapter does nothing: the comparison is empty"


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def trained(base, config):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    return theirs


def there_and_back(theirs, family, tmp_path):
    """Load peft's model here, write it, and load that in peft."""
    theirs.save_pretrained(tmp_path / "a")
    ours = tiny(family)
    adapter = load_adapter(ours, tmp_path / "a")
    assert_same(logits(ours), logits(theirs))
    far(ours, tiny(family))
    save_adapter(adapter, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()
    assert_same(logits(again), logits(theirs))
    assert config_of(tmp_path / "b")["peft_type"] == config_of(tmp_path / "a")["peft_type"]
    mine, its = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ba")
    assert mine.keys() == its.keys()
    return adapter


@pytest.mark.parametrize("family", TASKS)
def test_a_file_of_pefts_computes_the_same_here(family, ids, tmp_path):
    theirs = trained(tiny(family), peft.TrainableTokensConfig(token_indices=ids, task_type=TASKS[family]))
    adapter = there_and_back(theirs, family, tmp_path)
    assert adapter.method == TrainableTokens(tuple(ids))


@pytest.mark.parametrize("family", TASKS)
def test_a_file_of_pefts_lora_with_rows_computes_the_same_here(family, ids, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=MAPS.get(family, ["q_proj"]), trainable_token_indices=ids, task_type=TASKS[family]
    )
    adapter = there_and_back(trained(tiny(family), config), family, tmp_path)
    assert TrainableTokens(tuple(ids)) in adapter.method.parts


def test_rows_of_a_head_of_its_own(ids, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens", "lm_head"])
    there_and_back(trained(tiny("llama"), config), "llama", tmp_path)


def test_other_rows_of_each_matrix_beside_lora(ids, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids, "lm_head": ids[:2]}
    )
    there_and_back(trained(tiny("llama"), config), "llama", tmp_path)


OURS = {
    "alone": lambda ids: (TrainableTokens(ids), "TRAINABLE_TOKENS"),
    "lora": lambda ids: (LoRA(rank=4) + TrainableTokens(ids), "LORA"),
    "lora and norms": lambda ids: (NormTuning() + LoRA(rank=4) + TrainableTokens(ids), "LORA"),
    "with the embedding": lambda ids: (LoRA(rank=4, targets="query,embed") + TrainableTokens(ids), "GRAFTLM"),
    "and all of it": lambda ids: (LoRA(rank=4) + TrainableTokens(ids) + Modules("embed"), "GRAFTLM"),
    "norms": lambda ids: (NormTuning() + TrainableTokens(ids), "GRAFTLM"),
}


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("case", OURS)
def test_a_file_of_ours_computes_the_same_in_peft(case, family, ids, tmp_path):
    method, kind = OURS[case](ids)
    if TASKS[family] == "SEQ_CLS" and case.startswith("lora"):
        method = method + Head()
    ours = tiny(family)
    adapter = attach(ours, method)
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path)
    far(ours, tiny(family))
    assert config_of(tmp_path)["peft_type"] == kind
    back = tiny(family)
    assert load_adapter(back, tmp_path).method == method
    assert torch.equal(logits(back), logits(ours))
    if kind == "GRAFTLM":
        return
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    assert_same(logits(theirs), logits(ours))
    # ... and without our file it is what PEFT reads.
    (tmp_path / "graftlm.json").unlink()
    plain = tiny(family)
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(ours))


def test_new_words_go_to_a_base_that_was_grown_again(tmp_path):
    """The new rows are random each time; those of the file take their place."""
    words = [64, 65, 66]
    seen = {"input_ids": torch.tensor([[5, 64, 6, 65]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}

    def grown(seed):
        torch.manual_seed(seed)
        model = tiny("gpt2")
        model.resize_token_embeddings(67)
        return model

    def found(model):
        with torch.no_grad():
            return model(**seen).logits

    ours = grown(1)
    adapter = attach(ours, LoRA(rank=2) + TrainableTokens(words))
    shake(adapter.parameters())
    save_adapter(adapter, tmp_path / "a")
    other = grown(2)
    assert not torch.equal(found(grown(1)), found(other))
    load_adapter(other, tmp_path / "a")
    assert_same(found(other), found(ours))
    theirs = peft.PeftModel.from_pretrained(grown(3), tmp_path / "a").eval()
    assert_same(found(theirs), found(ours))
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=True)  # as where PEFT finds the vocabulary grown
    again = grown(4)
    load_adapter(again, tmp_path / "b")
    assert_same(found(again), found(ours))
    with pytest.raises(AdapterError, match=r"token 64 is not one of the 64 of[\s\S]*resize_token_embeddings\(67\)"):
        load_adapter(tiny("gpt2"), tmp_path / "a", check_base=False)


def test_peft_forgets_the_bias_of_a_tied_output(tmp_path):
    """Fresh rows change nothing, but PEFT's model is another one; here its file means what it should."""
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(**WIDTHS)).eval()
    with torch.no_grad():
        base.cls.predictions.decoder.bias.normal_()
    bias, wanted = base.cls.predictions.decoder.bias.detach().clone(), logits(base)
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=[7])).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_same(logits(ours), wanted)
    assert_same(logits(theirs) + bias, wanted)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**config_of(folder), **fields}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_indices": []}, "token_indices cannot be.*A216"),
        ({"token_indices": [5, True]}, "token_indices cannot be.*A216"),
        ({"token_indices": [5, 64]}, "token 64 is not one of the 64.*T153"),
        ({"token_indices": [5, 5]}, "ids has .5. twice.*T102"),
        ({"target_modules": ["lm_head"]}, "lm_head.*A206|without these.*A206"),
        ({"target_modules": ["c_attn"]}, "c_attn is a Conv1D.*A217"),
        ({"target_modules": ["nowhere"]}, "match nothing.*A217"),
    ],
)
def test_files_that_cannot_be_read_say_why(fields, reason, tmp_path):
    trained(tiny("gpt2"), peft.TrainableTokensConfig(token_indices=[5, 6])).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    model = tiny("gpt2")
    with pytest.raises(AdapterError, match=reason):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(tiny("gpt2")))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([5, "6"], "trainable_token_indices cannot be.*A216"),
        ({"nowhere": [5]}, "match nothing.*A217"),
        ({"lm_head": [5]}, "A206"),
        ({"wte": [5], "lm_head": [6]}, "A206"),
    ],
)
def test_rows_beside_lora_that_cannot_be_read_say_why(value, reason, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], trainable_token_indices=[5, 6])
    trained(tiny("gpt2"), config).save_pretrained(tmp_path)
    edit(tmp_path, trainable_token_indices=value)
    with pytest.raises(AdapterError, match=reason):
        load_adapter(tiny("gpt2"), tmp_path)
