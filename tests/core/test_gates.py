"""Gates: ReZero and UniPELT's, against formulas written out; what padding, later tokens and zero gates must not do."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from graftlm.core import attach, parts_of, use
from graftlm.errors import MethodError
from graftlm.formats import load_adapter
from graftlm.methods import (
    MAM,
    BitFit,
    Full,
    Gated,
    LoRA,
    Modules,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    ReZero,
    SeriesAdapter,
    UniPELT,
    read_method,
)
from models_for_tests import inputs_for, logits_of, loss_of, perturb, tiny

SMALL = UniPELT(length=2, mlp=8, reduction=8, rank=3)

# --- ReZero ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        LoRA(rank=2),
        LoRA(rank=2, targets="embed"),
        LoRA(rank=2, start="pissa"),
        SeriesAdapter(width=3),
        SeriesAdapter(width=3, start="near-identity"),
        ParallelAdapter(width=3),
    ],
    ids=str,
)
def test_a_gate_of_zero_changes_nothing_and_learns(inner):
    """Behind a gate of zero a delta that starts at zero would never get a gradient; it starts elsewhere."""
    model = tiny("llama")
    before = logits_of(model)
    adapter = attach(model, ReZero(inner))
    assert torch.equal(logits_of(model), before)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1.0)
    loss_of(model).backward()
    gates = [parameter for name, parameter in adapter.named_parameters() if "_gate." in name]
    assert len(gates) == len(adapter.parts)
    assert all(gate.grad is not None and gate.grad.abs() > 0 for gate in gates)
    optimiser.step()
    optimiser.zero_grad()
    loss_of(model).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("inner", [LoRA(rank=2, bias=True), Modules("norm"), BitFit()], ids=str)
def test_a_gate_interpolates_between_without_and_with(inner):
    """At a place whose input nothing changes, a gate of 1/4 moves the output by a quarter of the method's own change."""
    model = tiny("gpt2")
    places = {"lora": "head", "modules": r"transformer\.ln_f", "bitfit": r"transformer\.ln_f"}
    inner = type(inner)(**{**inner.settings(), "targets": places[inner.name]})
    plain, gated = attach(model, inner, name="plain"), attach(model, ReZero(inner, start=0.25), name="gated")
    perturb(plain)
    with torch.no_grad():
        for part, own in zip(gated.parts, plain.parts, strict=True):
            part.delta.inner.load_state_dict(own.delta.state_dict())
    logits = {}
    for name in (None, "plain", "gated"):
        use(model, name)
        logits[name] = logits_of(model)
    assert not torch.allclose(logits["plain"], logits[None], atol=1e-2)
    wanted = logits[None] + 0.25 * (logits["plain"] - logits[None])
    assert torch.allclose(logits["gated"], wanted, atol=1e-4)
    gated.merge()
    assert torch.allclose(logits_of(model), wanted, atol=1e-4)


def test_one_gate_a_layer():
    model = tiny("t5")
    adapter = attach(model, ReZero(LoRA(rank=2), shared=True))
    gates = [name for name, _ in adapter.named_parameters() if "_gate." in name]
    assert len(gates) == 4  # two layers, two stacks; cross attention counts to the decoder
    perturb(adapter)
    wanted = logits_of(model)
    again = attach(model, ReZero(LoRA(rank=2), shared=True), name="again", state=adapter.state())
    assert torch.allclose(logits_of(model), wanted)
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


@pytest.mark.parametrize(
    ("method", "code"),
    [
        (ReZero(PrefixTuning(length=2)), "T143"),
        (ReZero(PromptTuning(length=2)), "T143"),
        (ReZero(Full()), "T142"),
        (ReZero(Modules("norm")), "T142"),
        (Gated(Modules("norm")), "T143"),
        (Gated(PromptTuning(length=2)), "T143"),
        (Gated(LoRA(targets="embed")), "T143"),
    ],
    ids=str,
)
def test_what_cannot_be_gated_is_refused(method, code):
    with pytest.raises(MethodError) as caught:
        attach(tiny("llama"), method)
    assert [finding.code for finding in caught.value.findings] == [code]


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("rezero", ReZero(LoRA())),
        ("rezero(series)", ReZero(SeriesAdapter())),
        ("rezero(lora(rank=8), shared=true)", ReZero(LoRA(rank=8), shared=True)),
        ("rezero(method=lora(rank=4)+series) + bitfit", ReZero(LoRA(rank=4) + SeriesAdapter()) + BitFit()),
        ("rezero(rezero(lora))", ReZero(ReZero(LoRA()))),
    ],
)
def test_texts(text, method):
    assert read_method(text) == method
    assert read_method(str(method)) == method


@pytest.mark.parametrize(
    ("text", "code"), [("rezero(lorra)", "T101"), ("rezero(lora(rnak=1))", "T112"), ("rezero(3)", "T101")]
)
def test_mistakes_inside_are_named(text, code):
    with pytest.raises(MethodError) as caught:
        read_method(text)
    assert [finding.code for finding in caught.value.findings] == [code]


def test_a_nested_method_is_stored(tmp_path):
    method = ReZero(LoRA(rank=2, targets=("query", "value"))) + ReZero(ReZero(SeriesAdapter(width=3)))
    model = tiny("llama")
    adapter = attach(model, method)
    perturb(adapter)
    adapter.save(tmp_path / "a")
    loaded = load_adapter(tiny("llama"), tmp_path / "a")
    assert loaded.method == method
    assert torch.equal(logits_of(loaded.model), logits_of(model))


# --- gates that read the input --------------------------------------------------------------------------------------


def test_gated_lora_by_hand():
    model = tiny("bert")
    adapter = attach(model, Gated(LoRA(rank=2, alpha=2, targets="0.attention.self.query")))
    perturb(adapter, size=0.5)
    batch = inputs_for(model)
    batch["attention_mask"][0, 4:] = 0
    seen = {}
    place = model.bert.encoder.layer[0].attention.self.query
    handle = place.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    logits_of(model, batch)
    handle.remove()
    state = {key.partition("query.")[2]: value for key, value in adapter.state().items()}
    x, mask = seen["x"], batch["attention_mask"].unsqueeze(-1)
    each = torch.sigmoid(F.linear(x, state["lora_gate.weight"], state["lora_gate.bias"]))
    gate = (each * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    change = x @ state["inner.lora_A"].T @ state["inner.lora_B"].T
    assert torch.allclose(seen["y"], F.linear(x, place.weight, place.bias) + gate * change, atol=1e-5)


def placed(batch, start, width):
    """The rows of `batch` with padding before and behind, and their own positions."""
    rows, tokens = batch["input_ids"].shape
    found = {
        name: torch.zeros(rows, width, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")
    }
    found["input_ids"][:, start : start + tokens] = batch["input_ids"]
    found["attention_mask"][:, start : start + tokens] = 1
    found["position_ids"][:, start : start + tokens] = torch.arange(tokens)
    return found


@pytest.mark.parametrize("model_name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("start", [0, 3], ids=["right", "left"])
def test_padding_does_not_move_the_gates(model_name, start):
    model = tiny(model_name)
    classifies = model_name == "bert"
    if classifies:  # the pooler reads the first place, which may be padding
        model = tf.BertForTokenClassification(model.config).eval()
    perturb(attach(model, SMALL), size=0.3)
    batch = inputs_for(model)
    wanted = logits_of(model, placed(batch, 0, 6))
    found = logits_of(model, placed(batch, start, 9))[:, start : start + 6]
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_padding_does_not_move_the_gates_of_an_encoder_decoder():
    model = tiny("t5")
    perturb(attach(model, SMALL), size=0.3)
    batch = inputs_for(model)
    wanted = logits_of(model, batch)
    more = {
        "input_ids": F.pad(batch["input_ids"], (0, 4)),
        "attention_mask": F.pad(batch["attention_mask"], (0, 4)),
        "decoder_input_ids": batch["decoder_input_ids"],
    }
    assert torch.allclose(logits_of(model, more), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "phi3", "t5"])
def test_later_tokens_do_not_move_the_gates(model_name):
    model = tiny(model_name)
    perturb(attach(model, SMALL), size=0.3)
    batch = inputs_for(model)
    wanted = logits_of(model, batch)
    name = "decoder_input_ids" if model_name == "t5" else "input_ids"
    batch[name] = batch[name].clone()
    batch[name][:, -1] += 1
    found = logits_of(model, batch)
    assert torch.allclose(found[:, :-1], wanted[:, :-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, -1], wanted[:, -1], rtol=1e-3)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_is_generation_without(model_name):
    model = tiny(model_name)
    perturb(attach(model, SMALL), size=0.3)
    batch = inputs_for(model)
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_a_stored_hybrid_has_no_mlp(tmp_path):
    model = tiny("bert")
    adapter = attach(model, SMALL)
    perturb(adapter, size=0.3)
    wanted = logits_of(model)
    adapter.save(tmp_path / "a")
    loaded = load_adapter(tiny("bert"), tmp_path / "a")
    assert not any("mlp" in name for name in loaded.state())
    assert torch.allclose(logits_of(loaded.model), wanted, atol=1e-5)


# --- published sizes ------------------------------------------------------------------------------------------------


def count(model, method):
    return sum(parameter.numel() for part in parts_of(model, method) for parameter in part.delta.parameters())


def test_mam_on_bart_large():
    """The prefixes as stored, 2 P d for each of 36 attention calls, and the adapters of 24 feed-forward parts."""
    with torch.device("meta"):
        model = tf.BartForConditionalGeneration(
            tf.BartConfig(
                d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
                decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
            )
        )  # fmt: skip
    assert count(model, MAM(mlp=0)) == 27_414_528
    assert [count(model, part) for part in MAM(mlp=0).parts] == [2_211_840, 25_202_688]


def test_unipelt_on_bert_base():
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    method = UniPELT(mlp=0)
    assert [count(model, part.method) for part in method.parts] == [184_320, 894_528, 294_912]
    gates = 12 * 4 * 769  # at the prefix, the adapter, query and value of each layer
    assert count(model, method) == 1_373_760 + gates


def test_a_gate_learns_at_the_rate_of_what_is_behind_it():
    assert ReZero(SeriesAdapter(), start=0.5).learning_rate == SeriesAdapter.learning_rate
    assert ReZero(SeriesAdapter()).learning_rate == 5 * SeriesAdapter.learning_rate  # from a gate that is closed
    assert Gated(LoRA() + SeriesAdapter()).learning_rate == min(LoRA.learning_rate, SeriesAdapter.learning_rate)


def test_a_gate_at_a_module_without_tensors_is_where_the_model_is():
    """BERT's series adapters stand at Dropout modules, which have no tensor to tell a device."""
    with torch.device("meta"):
        model = tf.BertForSequenceClassification(
            tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        )
    adapter = attach(model, ReZero(SeriesAdapter(width=4)))
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
