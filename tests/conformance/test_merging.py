"""Merging: the folded weights compute what the attached adapter computes, and unmerging is bit-exact."""

from __future__ import annotations

import copy

import pytest
import torch

from conformance.cases import ADDS_BIAS, CASES, Scale, Unfoldable, cross, grid, merges, only
from graftlm.core import adapters, attach, use
from graftlm.errors import NotMergeable, RoutingError
from graftlm.methods import BitFit, Full, Head, LoRA, Modules, TrainableTokens
from models_for_tests import MODELS, logits_of, perturb, tiny


def assert_close(found, wanted, tolerance=1e-5):
    size = wanted.abs().max().clamp(min=1e-3)
    assert (found - wanted).abs().max() / size < tolerance


def frozen_copy(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, state):
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@cross()
def test_merged_computes_what_attached_computes(case, model_name):
    model = tiny(model_name)
    state, plain = frozen_copy(model), logits_of(model)
    tied = model.config.tie_word_embeddings
    adapter = attach(model, CASES[case])
    perturb(adapter)
    attached = logits_of(model)
    if not merges(adapter):
        assert torch.equal(logits_of(model), attached)
        return
    assert adapter.merged
    assert_close(logits_of(model), attached)
    now = model.state_dict()
    assert len(now) > len(state) or not all(torch.equal(value, now[key]) for key, value in state.items())
    adapter.unmerge()
    assert not adapter.merged
    assert_same_state(model, state)
    assert model.config.tie_word_embeddings == tied
    assert torch.equal(logits_of(model), attached)
    adapter.merge().detach()
    assert_same_state(model, state)
    assert torch.equal(logits_of(model), plain)


@cross({name: method for name, method in CASES.items() if name not in ADDS_BIAS})
def test_merged_state_runs_in_a_plain_model(case, model_name):
    model = tiny(model_name)
    adapter = attach(model, CASES[case])
    perturb(adapter)
    attached = logits_of(model)
    if not merges(adapter):
        return
    plain = type(model)(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_close(logits_of(plain), attached)


@grid(
    only("lora-all", "lora-embed", "lora-head", "head", "full", "modules-embed"),
    models=("qwen2", "gpt2", "t5", "t5_gated", "bart", "bert", "modernbert", "qwen3_moe"),
)
def test_merged_model_survives_saving_and_loading(case, model_name, tmp_path):
    model = tiny(model_name)
    adapter = attach(model, CASES[case])
    perturb(adapter)
    attached = logits_of(model)
    adapter.merge()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_close(logits_of(again), attached)
    adapter.unmerge()
    assert torch.equal(logits_of(model), attached)


PAIRS = {
    "lora-lora": (LoRA(rank=2), LoRA(rank=4, targets="all-linear")),
    "lora-full": (LoRA(rank=2, targets="all-linear"), Full()),
    "full-lora": (Full(), LoRA(rank=2, targets="all-linear")),
    "full-full": (Full(), Full()),
    "head-head": (Head(), Head()),
    "norm-full": (Modules("norm"), Full()),
    "embed-tokens": (Modules("embed"), TrainableTokens(ids=[*range(5, 60, 3)])),
    "tokens-embed": (TrainableTokens(ids=[*range(5, 60, 3)]), LoRA(rank=2, targets="embed")),
    "embed-lora": (Modules("embed"), LoRA(rank=2, targets="embed,head")),
}


_FEW = ("qwen2", "gpt2", "roberta", "t5", "bart", "qwen3_moe")


@pytest.mark.parametrize(
    ("model_name", "pair"),
    [(model, pair) for model in MODELS for pair in PAIRS if model in _FEW or pair == "lora-full"],
)
@pytest.mark.parametrize("off", ["first", "second"])
def test_two_adapters_merge_and_unmerge_in_either_order(pair, model_name, off):
    model = tiny(model_name)
    state = frozen_copy(model)
    first, second = attach(model, PAIRS[pair][0], name="a"), attach(model, PAIRS[pair][1], name="b")
    perturb(first, seed=1, size=0.05)
    perturb(second, seed=2, size=0.05)
    use(model, ("a", "b"))
    both = logits_of(model)
    with use(model, "a"):
        alone = {first: logits_of(model)}
    with use(model, "b"):
        alone[second] = logits_of(model)
    first.merge()
    assert_close(logits_of(model), both)  # b attached over merged a
    second.merge()
    assert_close(logits_of(model), both)
    gone, left = (first, second) if off == "first" else (second, first)
    gone.unmerge()
    assert_close(logits_of(model), both)
    use(model, left.name)
    assert_close(logits_of(model), alone[left])
    left.unmerge()
    assert_same_state(model, state)
    for adapter, wanted in alone.items():
        use(model, adapter.name)
        assert torch.equal(logits_of(model), wanted)


def test_two_bitfits_merge_together():
    model = tiny("gpt2")
    for seed, name in enumerate("ab"):
        perturb(attach(model, BitFit(), name=name), seed=seed)
    use(model, ("a", "b"))
    both = logits_of(model)
    for adapter in adapters(model).values():
        adapter.merge()
    assert_close(logits_of(model), both)


def test_detach_of_one_merged_adapter_keeps_the_other():
    model = tiny("llama")
    first, second = attach(model, LoRA(rank=2), name="a"), attach(model, LoRA(rank=4), name="b")
    perturb(first, seed=1)
    perturb(second, seed=2)
    use(model, "b")
    wanted = logits_of(model)
    use(model, ("a", "b"))
    first.merge()
    second.merge()
    first.detach()
    assert_close(logits_of(model), wanted)
    assert second.merged
    second.unmerge()
    assert torch.equal(logits_of(model), wanted)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5"])
def test_scalings_fold_after_additions(model_name):
    model = tiny(model_name)
    adapter = attach(model, LoRA(rank=2) + Scale())
    perturb(adapter)
    attached = logits_of(model)
    adapter.merge()
    assert_close(logits_of(model), attached)


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("methods", ["lora-scale", "scale-lora", "scale-scale"])
def test_two_merged_adapters_fold_additions_first(methods, order):
    """As at a junction, where every addition comes before every scaling, whichever adapter it belongs to."""
    kinds = {"lora": LoRA(rank=2), "scale": Scale()}
    model = tiny("llama")
    made = {name: attach(model, kinds[kind], name=name) for name, kind in zip("ab", methods.split("-"), strict=True)}
    for seed, adapter in enumerate(made.values()):
        perturb(adapter, seed=seed)
    use(model, ("a", "b"))
    attached = logits_of(model)
    for name in order:
        made[name].merge()
    assert_close(logits_of(model), attached)


def test_what_cannot_be_folded_is_refused_before_anything_changes():
    model = tiny("llama")
    state = frozen_copy(model)
    adapter = attach(model, LoRA(rank=2) + Unfoldable())
    perturb(adapter)
    attached = logits_of(model)
    with pytest.raises(NotMergeable, match="unfoldable"):
        adapter.merge()
    assert not adapter.merged
    assert_same_state(model, state)
    assert torch.equal(logits_of(model), attached)


def test_merging_twice_and_unmerging_twice_change_nothing_more():
    model = tiny("llama")
    state = frozen_copy(model)
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter)
    adapter.merge()
    once = frozen_copy(model)
    adapter.merge()
    assert_same_state(model, once)
    adapter.unmerge()
    adapter.unmerge()
    assert_same_state(model, state)


@pytest.mark.parametrize("spec", [None, ("b",), ["a", None], ["b", "b"]])
def test_a_merged_adapter_cannot_be_left_out(spec):
    model = tiny("llama")
    first = attach(model, LoRA(rank=2), name="a")
    attach(model, LoRA(rank=2), name="b")
    first.merge()
    with pytest.raises(RoutingError, match="merged"):
        use(model, spec)
    use(model, ["a", ("a", "b")])


def test_merged_in_a_mixed_batch():
    model = tiny("llama")
    made = [attach(model, LoRA(rank=2), name=name) for name in "ab"]
    for seed, adapter in enumerate(made):
        perturb(adapter, seed=seed)
    rows = ["a", ("a", "b"), "a"]
    use(model, rows)
    wanted = logits_of(model)
    made[0].merge()
    use(model, rows)
    assert_close(logits_of(model), wanted)


@pytest.mark.parametrize(
    "spec", ["a", "b", ("a", "b"), ("b", "a"), None, ["a", "a", ("a", "b")], ["a", None, "b"]], ids=str
)
def test_unmerge_gives_back_what_was_before_the_merge(spec):
    model = tiny("llama")
    made = [attach(model, LoRA(rank=2), name=name) for name in "ab"]
    for seed, adapter in enumerate(made):
        perturb(adapter, seed=seed)
    use(model, spec)
    before = logits_of(model)
    made[0].merge().unmerge()
    assert torch.equal(logits_of(model), before)


def test_merging_inside_a_with_block_does_not_count_twice():
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2), name="a")
    perturb(adapter)
    attached = logits_of(model)
    with use(model, "a"):
        adapter.merge()
    assert_close(logits_of(model), attached)


def test_loading_into_a_merged_adapter_folds_anew():
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter)
    state = {key: value.clone() for key, value in adapter.state().items()}
    wanted = logits_of(model)
    perturb(adapter, seed=5)
    adapter.merge()
    adapter.load_state(state)
    assert_close(logits_of(model), wanted)


def test_a_base_that_changes_its_type_while_merged_can_be_unmerged():
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter)
    adapter.merge()
    model.to(torch.bfloat16)
    adapter.unmerge()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits_of(model)


@cross({name: CASES[name] for name in sorted(ADDS_BIAS)})
def test_an_added_bias_is_merged_and_taken_back(case, model_name):
    model = tiny(model_name)
    keys = list(model.state_dict())
    adapter = attach(model, CASES[case])
    perturb(adapter)
    attached = logits_of(model)
    if not merges(adapter):
        return
    assert_close(logits_of(model), attached)
    adapter.unmerge()
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("model_name", ["llama", "gemma2", "t5"])
def test_training_state_of_a_merged_model_is_frozen(model_name):
    model = tiny(model_name)
    adapter = attach(model, LoRA(rank=2, bias=True))
    adapter.merge()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    adapter.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
