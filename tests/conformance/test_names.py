"""Names, compositions, the state of an adapter, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conformance.cases import CASES, cross, starts_as_identity
from graftlm.core import adapters, attach, summary, survey, use
from graftlm.errors import AdapterError, GraftError, MethodError, RoutingError
from graftlm.methods import Full, Head, Layers, LoRA, Modules
from models_for_tests import MODELS, hooks_and_attributes, logits_of, perturb, tiny


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def three(model):
    for seed, (name, method) in enumerate(
        (("a", LoRA(rank=2)), ("b", LoRA(rank=4, targets="all-linear")), ("c", Head()))
    ):
        perturb(attach(model, method, name=name), seed=seed)
    return model


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " ", "a b", "a/b", "../a", ".a", "-a", "a.b", "a\n", "a+b"])
def test_bad_names_are_refused(model, name):
    traces = hooks_and_attributes(model)
    with pytest.raises(AdapterError) as caught:
        attach(model, LoRA(), name=name)
    assert caught.value.findings[0].code == "A105"
    assert hooks_and_attributes(model) == traces


@pytest.mark.parametrize("name", ["a", "support", "v2", "2", "a-b_c", "A"])
def test_good_names_are_taken(model, name):
    assert attach(model, LoRA(), name=name).name == name
    assert adapters(model).keys() == {name}


def test_a_taken_name_is_refused_and_another_offered(three):
    before = logits_of(three)
    with pytest.raises(AdapterError) as caught:
        attach(three, LoRA(), name="a")
    assert caught.value.findings[0].code == "A106"
    assert 'name="a-2"' in str(caught.value)
    assert torch.equal(logits_of(three), before)
    adapters(three)["a"].detach()
    attach(three, LoRA(), name="a")


@pytest.mark.parametrize("method", [LoRA, "lora", None, 8])
def test_what_is_not_a_method_is_refused(model, method):
    with pytest.raises(MethodError):
        attach(model, method)
    assert adapters(model) == {}


@pytest.mark.parametrize("path", ["model", "model.layers.0", "model.layers.0.self_attn.q_proj"])
def test_attach_inside_a_grafted_model_is_refused(model, path):
    attach(model, LoRA(), name="outer")
    traces = hooks_and_attributes(model)
    inner = model.get_submodule(path)
    with pytest.raises(AdapterError) as caught:
        attach(inner, LoRA(targets="all-linear"), name="inner")
    assert caught.value.findings[0].code == "A107"
    assert hooks_and_attributes(model) == traces


def test_a_part_without_deltas_of_its_own(model):
    """It cannot tell that it belongs to a grafted model; then the whole must go on as before, and both must detach."""
    outer = attach(model, LoRA(targets="attention"), name="outer")
    perturb(outer)
    wanted = logits_of(model)
    try:
        inner = attach(model.model.layers[0].mlp, LoRA(targets="all-linear,gate_proj,up_proj"), name="inner")
    except GraftError:
        return
    assert torch.equal(logits_of(model), wanted)
    inner.detach()
    outer.detach()
    assert torch.equal(logits_of(model), logits_of(tiny("llama")))


def test_attach_on_a_part_and_then_on_the_whole_is_refused(model):
    adapter = attach(model.model, LoRA(), name="inner")
    with pytest.raises(AdapterError) as caught:
        attach(model, LoRA(), name="outer")
    assert caught.value.findings[0].code == "A107"
    holder = nn.ModuleDict({"language": model})
    with pytest.raises(AdapterError):
        attach(holder, LoRA(targets="q_proj"), name="outer")
    adapter.detach()
    attach(model, LoRA(), name="outer")


def test_a_detached_adapter_does_nothing_more(model):
    adapter = attach(model, LoRA(), name="a")
    adapter.detach()
    assert "detached" in repr(adapter)
    for verb in (adapter.merge, adapter.unmerge, adapter.detach):
        with pytest.raises(AdapterError) as caught:
            verb()
        assert caught.value.findings[0].code == "A104"
    attach(model, LoRA(), name="a")
    with pytest.raises(AdapterError):
        adapter.merge()


# --- use and compositions -------------------------------------------------------------------------------------------


def test_attach_makes_the_new_adapter_act(three):
    now = logits_of(three)
    use(three, "c")
    assert torch.equal(logits_of(three), now)


@pytest.mark.parametrize("model_name", [name for name in MODELS if name != "gemma2"])  # squeezes its logits
def test_a_sum_of_adapters_is_the_sum_of_their_changes(model_name):
    """At the head, whose input no adapter changes, the changes of the logits add up."""
    model = tiny(model_name)
    last = next(site.path for site in reversed(survey(model).with_role("head")) if site.kind == "linear")
    for seed, name in enumerate("ab"):
        perturb(attach(model, LoRA(rank=2, targets=last), name=name), seed=seed)
    logits = {}
    for spec in (None, "a", "b", ("a", "b"), ("b", "a")):
        use(model, spec)
        logits[spec] = logits_of(model)
    wanted = logits["a"] + logits["b"] - logits[None]
    size = wanted.abs().max().item()
    assert torch.allclose(logits["a", "b"], wanted, rtol=0, atol=1e-5 * size)
    assert torch.allclose(logits["a", "b"], logits["b", "a"], rtol=0, atol=1e-5 * size)
    assert not torch.allclose(logits["a"], logits["b"], rtol=0, atol=1e-3 * size)


@pytest.mark.parametrize("case", ["full", "head", "layers", "modules"])
def test_parameter_changes_add_up(case):
    model = tiny("gpt2")
    first, second = attach(model, CASES[case], name="a"), attach(model, CASES[case], name="b")
    perturb(first, seed=1, size=0.05)
    perturb(second, seed=2, size=0.05)
    use(model, ("a", "b"))
    together = logits_of(model)
    base = dict(model.state_dict())
    both = attach(model, CASES[case], name="c")
    with torch.no_grad():
        for (key, sum_), (_, one), (_, two) in zip(
            both.named_parameters(), first.named_parameters(), second.named_parameters(), strict=True
        ):
            sum_.copy_(one + two - base[key])
    assert torch.allclose(logits_of(model), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [None, "a", ("a", "b"), ["a", None, "b"]], ids=str)
def test_use_as_a_context_gives_the_routing_back(three, spec):
    use(three, spec)
    before = logits_of(three)
    with use(three, "c"):
        inside = logits_of(three)
        with use(three, ["c", "b", "a"]):
            assert not torch.equal(logits_of(three), inside)
        assert torch.equal(logits_of(three), inside)
    assert torch.equal(logits_of(three), before)
    with pytest.raises(ZeroDivisionError), use(three, "c"):
        _ = 1 / 0
    assert torch.equal(logits_of(three), before)


def test_a_context_around_a_detach_does_not_bring_the_adapter_back(three):
    with use(three, "b"):
        adapters(three)["c"].detach()
    other = attach(three, LoRA(rank=2), name="c")
    perturb(other)
    use(three, "a")
    wanted = logits_of(three)
    with use(three, "c"):
        other.detach()
    assert torch.equal(logits_of(three), wanted)


def test_a_context_around_an_attach_gives_the_routing_back(three):
    use(three, "a")
    wanted = logits_of(three)
    with use(three, "b"):
        perturb(attach(three, LoRA(rank=2), name="d"))
    assert torch.equal(logits_of(three), wanted)


@pytest.mark.parametrize(
    ("spec", "codes"),
    [
        ("supprt", ["R110"]),
        (("a", "x"), ["R110"]),
        (["a", "x", "y"], ["R110", "R110"]),
        ([], ["R101"]),
        (("a", "a"), ["R102"]),
        (7, ["R103"]),
        ([["a"]], ["R103"]),
        ([("a", None)], ["R103"]),
        ({"a"}, ["R103"]),
    ],
    ids=str,
)
def test_what_cannot_be_routed_is_refused_and_changes_nothing(three, spec, codes):
    use(three, ("a", "b"))
    before = logits_of(three)
    with pytest.raises(RoutingError) as caught:
        use(three, spec)
    assert [finding.code for finding in caught.value.findings] == codes
    assert torch.equal(logits_of(three), before)


def test_an_unknown_name_is_answered_with_the_nearest(model):
    attach(model, LoRA(), name="support")
    with pytest.raises(RoutingError, match=r'use\(model, "support"\)'):
        use(model, "supprt")


def test_use_without_adapters_is_refused(model):
    with pytest.raises(RoutingError) as caught:
        use(model, None)
    assert caught.value.findings[0].code == "R109"


def test_use_reaches_through_a_wrapper(three):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    use(three, "b")
    wanted = logits_of(three)
    use(three, "a")
    use(Wrapper(three), "b")
    assert torch.equal(logits_of(three), wanted)


# --- state ----------------------------------------------------------------------------------------------------------


@cross()
def test_state_goes_round(case, model_name):
    model = tiny(model_name)
    first = attach(model, CASES[case], name="a")
    fresh = logits_of(model)
    perturb(first)
    wanted = logits_of(model)
    state = {key: value.clone() for key, value in first.state().items()}
    assert all(value.dtype == torch.float32 for value in first.parameters())
    assert not any(value.dtype in (torch.float16, torch.bfloat16) for value in state.values())
    buffers = sum(buffer.numel() for part in first.parts for buffer in part.delta.buffers())
    assert sum(value.numel() for value in state.values()) == first.parameter_count + buffers
    second = attach(model, CASES[case], name="b")
    if starts_as_identity(CASES[case]):
        assert torch.equal(logits_of(model), fresh)
    assert second.state().keys() == state.keys()
    second.load_state(state)
    assert torch.equal(logits_of(model), wanted)
    perturb(second)
    assert all(torch.equal(value, first.state()[key]) for key, value in state.items())  # copied, not shared


def test_load_state_refuses_all_misfits_before_any_copy(model):
    adapter = attach(model, LoRA(rank=2, targets="query"))
    perturb(adapter)
    before = {key: value.clone() for key, value in adapter.state().items()}
    state = {key: value + 1 for key, value in before.items()}
    missing, misshapen, *_ = sorted(state)
    del state[missing]
    state[misshapen] = torch.zeros(5, 5)
    state["nothing.lora_A"] = torch.zeros(1)
    with pytest.raises(AdapterError) as caught:
        adapter.load_state(state)
    assert sorted(finding.code for finding in caught.value.findings) == ["A101", "A102", "A103"]
    assert all(name in str(caught.value) for name in (missing, misshapen, "nothing.lora_A"))
    assert all(torch.equal(value, before[key]) for key, value in adapter.state().items())


def test_state_of_another_rank_is_refused(model):
    small, large = attach(model, LoRA(rank=2), name="a"), attach(model, LoRA(rank=4), name="b")
    with pytest.raises(AdapterError) as caught:
        large.load_state(small.state())
    assert {finding.code for finding in caught.value.findings} == {"A103"}
    assert len(str(caught.value).splitlines()) <= 12


def test_summary_counts(three):
    text = str(summary(three))
    assert summary(three).trainable_parameters == sum(a.parameter_count for a in adapters(three).values())
    assert all(part in text for part in ("a  lora(rank=2)", "query:2", "c  head", "head:1"))
    adapters(three)["b"].merge()
    assert "merged" in str(summary(three))


def test_seeds_make_the_start_repeatable(model):
    def start():
        torch.manual_seed(11)
        adapter = attach(model, LoRA(rank=4, targets="all-linear,embed"))
        state = {key: value.clone() for key, value in adapter.state().items()}
        adapter.detach()
        return state

    one, two = start(), start()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("name", [None, 7])
def test_a_name_that_is_no_text_is_refused(model, name):
    with pytest.raises(AdapterError):
        attach(model, LoRA(), name=name)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LoRA(targets="nothing_like_it"),
        lambda: LoRA(rank=0),
        lambda: LoRA(rank="8"),
        lambda: LoRA(alpha=0),
        lambda: LoRA(dropout=1.0),
        lambda: LoRA(rank_pattern={"(": 3}),
        lambda: LoRA(rank_pattern={"nothing": 3}),
        lambda: LoRA(targets="embed", bias=True),
        lambda: LoRA(targets="("),
        lambda: LoRA(targets=""),
        lambda: LoRA(layers="7"),
        lambda: LoRA(layers="x"),
        lambda: LoRA(exclude="attention"),
        lambda: Modules("nothing_like_it"),
        lambda: Modules("(") + Full(),
        lambda: Layers("9"),
        lambda: Layers("2:1"),
    ],
    ids=range(17),
)
def test_every_wrong_setting_is_a_graft_error_without_a_trace(model, wrong):
    traces = hooks_and_attributes(model)
    with pytest.raises(GraftError):
        attach(model, wrong())
    assert hooks_and_attributes(model) == traces
