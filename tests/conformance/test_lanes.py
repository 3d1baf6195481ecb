"""The short way through a linear map computes what the junction's own way computes, and is taken where it should be."""

from __future__ import annotations

import copy

import pytest
import torch

from conformance.cases import CASES, grid
from conformance.test_rows import ROWS, assert_close, generate, padded, with_two
from graftlm.core import attach, use
from graftlm.core.lane import Lane
from graftlm.methods import IA3, BitFit, DoRA, LoRA, ParallelAdapter, SeriesAdapter, Sparse
from models_for_tests import inputs_for, logits_of, perturb, tiny

#: One choice for all rows, both for all, and three ways in which rows may lie.
ROUTINGS = [("a",), ("b", "a"), ROWS, ["a", "b", "b", "a"], ["b", ("b", "a"), None, "b"]]


@pytest.fixture
def long_way(monkeypatch):
    """Calls what it is given with every lane on the long way."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "__call__", lambda self, *args, **kwargs: self._long(args, kwargs))
            return function(*args)

    return call


@pytest.fixture
def long_calls(monkeypatch):
    """The modules that went the long way so far."""
    found = []
    own = Lane._long

    def counted(self, args, kwargs):
        found.append(self.module)
        return own(self, args, kwargs)

    monkeypatch.setattr(Lane, "_long", counted)
    return found


@grid(models=("llama", "gpt2"))
def test_both_ways_give_the_same(case, model_name, long_way):
    model = with_two(model_name, CASES[case], LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4)
    for routing in ROUTINGS:
        use(model, routing if isinstance(routing, list) else tuple(routing))
        assert_close(logits_of(model, batch), long_way(logits_of, model, batch), 5e-6)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "opt", "t5"])
def test_both_ways_generate_the_same(model_name, long_way):
    model = tiny(model_name)
    for n in range(6):
        perturb(attach(model, LoRA(rank=1 + n % 3, targets="all-linear"), name=f"a{n}"), seed=n)
    batch = inputs_for(model, rows=6)
    if not model.config.is_encoder_decoder:
        batch, _ = padded(batch, "left")
    for routing in ([f"a{n}" for n in range(6)], ["a1", "a0", None, "a1", ("a2", "a3"), "a1"], "a4"):
        use(model, routing)
        for options in ({}, {"num_beams": 2}):
            assert torch.equal(
                generate(model, batch, **options), long_way(lambda o=options: generate(model, batch, **o))
            )


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=3, targets="all-linear"), IA3(), BitFit(), Sparse(fraction=0.01), SeriesAdapter(width=3),
        ParallelAdapter(width=3),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_simple_takes_the_short_way(method, long_calls):
    model = with_two("llama", method, LoRA(rank=2, targets="all-linear"))
    batch = inputs_for(model, rows=4, tokens=1)
    for routing in ("a", None, ROWS):
        use(model, routing)
        logits_of(model, batch)
    assert not long_calls
    use(model, ROWS)
    model(**batch)  # with gradients
    assert long_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_single_tokens_of_many_methods(model_name, dtype, long_way):
    """Scalings, biases, chosen entries and bottlenecks of all rows at once, also for several entries a row."""
    model = tiny(model_name).to(dtype)
    methods = {
        "ia3": IA3(), "bias": BitFit(add=True), "sparse": Sparse(fraction=0.05), "lora": LoRA(rank=2),
        "more": Sparse(fraction=0.02, score="random"), "other": LoRA(rank=3, targets="attention"),
        "series": SeriesAdapter(width=4), "second": SeriesAdapter(width=3), "relu": SeriesAdapter(activation="relu"),
        "parallel": ParallelAdapter(width=4), "wide": SeriesAdapter(width=100),
    }  # fmt: skip
    adapters = {name: attach(model, method, name=name) for name, method in methods.items()}
    for seed, adapter in enumerate(adapters.values()):
        perturb(adapter, seed=seed)
    rows = ["ia3", ("sparse", "ia3"), None, "bias", ("more", "bias", "sparse"), ("ia3", "bias", "lora"), "lora"]
    rows += ["series", ("series", "second"), ("second", "series", "ia3"), "relu", ("parallel", "other"), "series", None]
    close = 0.03 if dtype == torch.bfloat16 else 2e-6
    use(model, rows)
    single = inputs_for(model, rows=len(rows), tokens=1)
    found = logits_of(model, single)
    assert_close(found, long_way(logits_of, model, single), close)
    with torch.no_grad():
        for name in ("ia3", "bias", "sparse", "second", "parallel"):
            for parameter in adapters[name].parameters():
                parameter.mul_(1.5)
    later = logits_of(model, single)
    assert_close(later, long_way(logits_of, model, single), close)
    moved = (later - found).abs().amax(dim=(1, 2)) > 0
    assert moved.tolist() == [True, True, False, True, True, True, False, False, True, True, False, True, False, False]
    use(model, [*rows[:-1], "wide"])  # too wide to be made for all rows
    assert_close(logits_of(model, single), long_way(logits_of, model, single), close)
    use(model, rows)
    if dtype == torch.float32:
        batch = inputs_for(model, rows=len(rows))
        options = {"num_beams": 2}
        assert torch.equal(generate(model, batch, **options), long_way(lambda: generate(model, batch, **options)))


def test_what_is_not_simple_takes_the_long_way(long_calls):
    model = with_two("llama", DoRA(rank=2, targets="query"), LoRA(rank=2, targets="all-linear"))
    use(model, ROWS)
    logits_of(model, inputs_for(model, rows=4))
    assert {module.out_features for module in long_calls} == {32}
    assert len(long_calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["a", ["a", "b"]], ids=str)
def test_what_is_kept_of_a_delta_follows_it(dtype, routing, long_way):
    model = with_two("llama", LoRA(rank=2), LoRA(rank=2)).to(dtype)
    batch = inputs_for(model, rows=2)
    use(model, routing)
    model_before = logits_of(model, batch)
    down = next(iter(model.model.layers[0].self_attn.q_proj.__dict__["_graftlm_junction"].deltas.values()))[0][2].lora_A

    def changed():
        found, wanted = logits_of(model, batch), long_way(logits_of, model, batch)
        assert (found - wanted).abs().max() <= (0.02 if dtype == torch.bfloat16 else 1e-6) * wanted.abs().max()
        return found

    with torch.no_grad():
        down.mul_(30)  # as an optimizer does
    first = changed()
    assert not torch.equal(first, model_before)
    down.data.mul_(-1)  # past the count of writes: seen by the next forward
    second = changed()
    assert not torch.equal(second, first)
    q_proj = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32, dtype=dtype)
    with torch.no_grad():
        q_proj(x)
        down.mul_(3)
        assert_close(q_proj(x), long_way(q_proj, x), 0.02 if dtype == torch.bfloat16 else 1e-6)


def test_a_lane_leaves_with_its_junction_and_a_copy_has_its_own():
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2, targets="query"))
    perturb(adapter)
    q_proj = model.model.layers[0].self_attn.q_proj
    assert isinstance(q_proj.forward, Lane)
    wanted = logits_of(model)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].self_attn.q_proj.forward.module is twin.model.layers[0].self_attn.q_proj
    adapter.detach()
    assert "forward" not in q_proj.__dict__
    assert torch.equal(logits_of(twin), wanted)
    assert not torch.equal(logits_of(model), wanted)


def test_a_forward_that_others_have_put_in_place_stays():
    model = tiny("llama")
    q_proj = model.model.layers[0].self_attn.q_proj
    own, calls = q_proj.forward, []
    q_proj.forward = lambda x: calls.append(1) or own(x)
    theirs = q_proj.forward
    adapter = attach(model, LoRA(rank=2))
    plain = logits_of(model)
    perturb(adapter)
    assert not torch.equal(logits_of(model), plain)
    assert len(calls) == 2
    adapter.detach()
    assert q_proj.forward is theirs
    assert torch.equal(logits_of(model), plain)


def test_autocast(long_way):
    model = with_two("llama", LoRA(rank=2, targets="all-linear"), IA3())
    batch = inputs_for(model, rows=4)
    use(model, ROWS)
    wanted = logits_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        short, long = logits_of(model, batch), long_way(logits_of, model, batch)
    assert short.dtype == torch.bfloat16
    # Both round, each in its way.
    assert (short - wanted).abs().mean() < 1.2 * (long - wanted).abs().mean() < 0.02 * wanted.abs().max()


def test_many_routings_one_after_another():
    model = with_two("llama", LoRA(rank=2), LoRA(rank=3))
    batch = inputs_for(model, rows=3)
    use(model, "a")
    wanted = logits_of(model, batch)
    options = [None, "a", "b", ("a", "b")]
    for number in range(70):
        use(model, [options[number % 4], options[number // 4 % 4], options[number // 16 % 4]])
        logits_of(model, batch)
    use(model, "a")
    assert torch.equal(logits_of(model, batch), wanted)
