"""Every method on packed bases: NF4 and int8, the same rules as on dense ones."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from conformance.cases import CASES, EXAMPLES, REFUSALS, merges, starts_as_identity
from graftlm.core import adapters, attach, use
from graftlm.errors import GraftError
from graftlm.formats import load_adapter, save_adapter
from graftlm.methods import DoRA, Prune, ReZero, Sparse
from graftlm.methods.scoring import FROM_DATA
from graftlm.quantisation import merged_copy, quantize, repacked_copy
from models_for_tests import hooks_and_attributes, inputs_for, logits_of, loss_of, perturb, tiny

#: Cases that train copies of whole weights, which codes are not.
OF_WEIGHTS = {"full", "last", "layers", "lora+full", "dora+modules"}

_FEW = (
    "prune+lora",
    "prune+sparse",
    "sparse-random",
    "lora-all",
    "lora-parts",
    "lora-bias",
    "lora-embed",
    "dora-parts",
    "pissa-parts",
    "lora+bitfit",
)
#: Every method on one decoder in NF4 and int8; a few more cases there, on an encoder, and on maps stored across.
_PAIRS = [
    *((case, "qwen2", "nf4") for case in (*EXAMPLES, *_FEW) if (case, "qwen2") not in REFUSALS),
    *((case, "qwen2", "int8") for case in EXAMPLES if (case, "qwen2") not in REFUSALS),
    *((case, "roberta", "int8") for case in ("lora", "dora", "ia3", "series", "bitfit", "prefix", "prune", "unipelt")),
    *(
        (case, "qwen2", "int8-dynamic")
        for case in ("lora", "dora", "ia3", "series", "bitfit", "prefix", "prune", "unipelt", "sparse")
    ),
    *((case, "gpt2", "nf4") for case in ("lora-all", "lora-parts", "dora", "pissa", "sparse", "prune", "prune+sparse")),
]


def packed(model_name: str, format: str):
    return quantize(tiny(model_name), format)


@pytest.mark.parametrize(("case", "model_name", "format"), _PAIRS, ids=str)
def test_a_method_on_a_packed_base(case, model_name, format, tmp_path):
    model = packed(model_name, format)
    plain, traces = logits_of(model), hooks_and_attributes(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if case in OF_WEIGHTS:
        with pytest.raises(GraftError) as caught:
            attach(model, CASES[case])
        assert {finding.code for finding in caught.value.findings} <= {"T108"}
        assert hooks_and_attributes(model) == traces
        return
    adapter = attach(model, CASES[case], name="a")
    assert {parameter.dtype for parameter in adapter.parameters()} <= {torch.float32}
    assert torch.equal(logits_of(model), plain) == starts_as_identity(CASES[case])
    perturb(adapter)
    model.eval()
    acted = logits_of(model)
    assert not torch.equal(acted, plain)
    if adapter.parameter_count:
        loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in model.parameters())
    # Rows of their own, copies, files.
    if model_name != "roberta" or "experts" not in case:
        use(model, ["a", None, "a"])
        mixed = logits_of(model)
        size = acted.abs().max()
        assert (mixed[[0, 2]] - acted[[0, 2]]).abs().max() < 1e-4 * size
        assert (mixed[1] - plain[1]).abs().max() < 1e-4 * size
        use(model, "a")
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), acted)
    save_adapter(adapter, tmp_path / "adapter")
    adapters(twin)["a"].detach()
    load_adapter(twin, tmp_path / "adapter", name="a")
    assert (logits_of(twin) - acted).abs().max() < 1e-4 * size
    # Merged in place, undone, and as a plain copy.
    if merges(adapter):
        # Merged weights are numbers, and read their inputs as they are.
        near = (0.05 if format == "int8-dynamic" else 1e-4) * size
        assert (logits_of(model) - acted).abs().max() < near
        adapter.unmerge()
        out = merged_copy(model, dtype=torch.float32)
        assert not any(parameter.dtype == torch.int8 for parameter in out.parameters())
        assert (logits_of(out) - acted).abs().max() < near
        assert torch.equal(logits_of(model), acted)
    adapter.detach()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits_of(model), plain)
    assert hooks_and_attributes(model) == traces


@pytest.mark.parametrize(
    "method",
    [
        Sparse(fraction=0.05), Sparse(fraction=0.6), Sparse(fraction=0.4, unit="head", targets="attention"),
        Prune(0.3), Prune(0.3, scope="global"), Prune(pattern="2:4"), ReZero(Sparse(fraction=0.6), start=0.5),
        Prune(0.4) + Sparse(fraction=0.05), DoRA(rank=2, targets="all-linear") + Sparse(fraction=0.05),
        DoRA(rank=2, targets="all-linear") + Prune(0.3),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_changes_of_a_packed_weight_are_those_of_its_numbers(method, model_name):
    if getattr(method, "unit", "") == "head" and model_name == "gpt2":
        method = dataclasses.replace(method, targets="output")  # its queries, keys and values are one map
    model = packed(model_name, "nf4")
    twin = merged_copy(model, [], dtype=torch.float32)  # the same numbers, not packed
    adapter = attach(model, method, name="a")
    perturb(adapter)
    other = attach(twin, method, name="a", state=adapter.state())
    wanted, found = logits_of(twin), logits_of(model)
    near = 1e-4 * wanted.abs().max()
    assert (found - wanted).abs().max() < near
    assert (logits_of(model.train()) - logits_of(twin.train())).abs().max() < near
    model.eval(), twin.eval()
    for each in (model, twin):
        use(each, ["a", None, "a"])
    assert (logits_of(model) - logits_of(twin)).abs().max() < near
    for each in (model, twin):
        use(each, "a")
    trained = [
        (one, two) for one, two in zip(adapter.parameters(), other.parameters(), strict=True) if one.requires_grad
    ]
    for each in (model, twin) if trained else ():
        loss_of(each).backward()
    for one, two in trained:
        assert (one.grad - two.grad).norm() <= 1e-4 * two.grad.norm()
    if merges(adapter):
        assert (logits_of(model) - wanted).abs().max() < near
        adapter.unmerge()
    assert torch.equal(logits_of(model), found)


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_zeros_are_kept_where_changes_are_merged_over_a_pruned_packed_base(model_name):
    model = packed(model_name, "nf4")
    pruned = attach(model, Prune(0.5), name="pruned")
    perturb(attach(model, CASES["lora-all"], name="lora"))
    use(model, ("pruned", "lora"))
    pruned.merge()
    adapters(model)["lora"].merge(keep_zeros=True)
    for part in pruned.parts:
        weight = model.get_submodule(part.site.path).weight
        kept = part.delta.mask.T if model_name == "gpt2" else part.delta.mask  # a Conv1D's is [in, out]
        assert bool((weight[~kept] == 0).all())
        assert float((weight[kept] == 0).float().mean()) < 0.5


def test_what_is_kept_of_a_packed_weight_follows_what_acts_there():
    """DoRA keeps norms of the weight that it is over: with sparse values these change at every step."""
    model = packed("llama", "nf4")
    twin = merged_copy(model, [], dtype=torch.float32)
    method = DoRA(rank=2, targets="all-linear") + Sparse(fraction=0.05)
    adapter = attach(model, method)
    perturb(adapter)
    other = attach(twin, method, state=adapter.state())
    for each in (1, 2):
        for one, two in zip(adapter.parameters(), other.parameters(), strict=True):
            with torch.no_grad():
                one.add_(0.1 * each)
                two.add_(0.1 * each)
        found, wanted = logits_of(model), logits_of(twin)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("score", ["magnitude", *FROM_DATA])
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_the_entries_of_a_packed_weight_are_chosen_as_those_of_its_numbers(score, model_name):
    model = packed(model_name, "nf4")
    twin = merged_copy(model, [], dtype=torch.float32)
    plain, traces = logits_of(model), hooks_and_attributes(model)
    batch = inputs_for(model)
    chosen = []
    for each in (model, twin):
        torch.manual_seed(0)
        adapter = attach(each, Sparse(fraction=0.05, score=score), samples=[{**batch, "labels": batch["input_ids"]}])
        chosen.append([set(part.delta.index.tolist()) for part in adapter.parts])
        adapter.detach()
    alike = sum(len(one & two) for one, two in zip(*chosen, strict=True))
    assert alike >= 0.99 * sum(map(len, chosen[0]))  # but for ties and rounding
    assert torch.equal(logits_of(model), plain)
    assert hooks_and_attributes(model) == traces


@pytest.mark.parametrize("model_name", ["qwen2", "gpt2", "bert", "t5"])
def test_a_merged_copy_is_saved_for_plain_transformers(model_name, tmp_path):
    model = packed(model_name, "nf4")
    perturb(attach(model, CASES["lora-all"], name="a"))
    wanted = logits_of(model)
    merged_copy(model, dtype=torch.float32).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert (logits_of(again) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert getattr(again.config, "quantization_config", None) is None
    half = merged_copy(model, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert (logits_of(half).float() - wanted).norm() < 0.1 * wanted.norm()


def test_packing_again_tells_what_it_loses():
    model = packed("qwen2", "nf4")
    plain = logits_of(model)
    adapter = attach(model, CASES["lora-all"], name="a")
    perturb(adapter, size=0.02)
    again = repacked_copy(model)
    assert sum(again.lost.values()) / len(again.lost) > 0.1
    assert "is lost on average" in str(again)
    eight = repacked_copy(model, format="int8")
    assert max(eight.lost.values()) < min(again.lost.values())
    adapter.merge()
    assert repacked_copy(model).lost == pytest.approx(again.lost, rel=1e-3)
    adapter.detach()
    assert repacked_copy(model).lost == {}
    assert torch.equal(logits_of(model), plain)


def test_copies_of_what_is_not_there_are_refused():
    model = packed("llama", "nf4")
    attach(model, CASES["lora-all"], name="tone")
    with pytest.raises(GraftError) as caught:
        merged_copy(model, ["tona"])
    assert [(f.code, f.fix) for f in caught.value.findings] == [("Q108", "tone")]
    dense = tiny("llama")
    with pytest.raises(GraftError) as caught:
        repacked_copy(dense)
    assert caught.value.findings[0].code == "Q109"


def test_bf16_activations_meet_float32_deltas():
    model = packed("llama", "nf4").to(torch.bfloat16)
    adapter = attach(model, CASES["lora-all"])
    perturb(adapter)
    y = logits_of(model, inputs_for(model))
    assert y.dtype == torch.bfloat16
    loss_of(model).backward()
    assert {parameter.grad.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = packed("llama", "nf4").train()
    adapter = attach(model, CASES["lora-all"])
    perturb(adapter)
    loss_of(model).backward()
    wanted = [parameter.grad.clone() for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss_of(model).backward()
    for parameter, grad in zip(adapter.parameters(), wanted, strict=True):
        assert (parameter.grad - grad).abs().max() <= 1e-5 * grad.abs().max()
