"""torch.compile sees through what graftlm puts at a model: no break in the graph, and another routing is another graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from graftlm import Adapter, attach, read_method, use
from graftlm.core.junction import junction_of
from graftlm.core.routing import Routing
from models_for_tests import tiny

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def changed(model: torch.nn.Module, method: str, name: str = "default") -> Adapter:
    """An adapter that changes the output."""
    adapter = attach(model, read_method(method), name=name)
    torch.manual_seed(1)
    for part in adapter.parts:
        for parameter in part.delta.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model(IDS)  # brings the deltas into the model's mode
    return adapter


@pytest.mark.parametrize("method", ["ia3", "lora(rank=2,targets=all-linear)+bitfit+series"])
def test_what_acts_at_maps_is_part_of_one_graph(method: str) -> None:
    model = tiny("llama").eval()
    with torch.no_grad():
        base = model(IDS).logits
    adapter = changed(model, method)
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises where the graph breaks
    graphs = torch._dynamo.utils.counters["stats"]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)
    made = graphs["unique_graphs"]
    for _ in range(3):
        compiled(IDS)
    assert graphs["unique_graphs"] == made, "compiled anew for the same call"
    with use(model, None), torch.no_grad():
        assert torch.allclose(compiled(IDS).logits, base, atol=1e-6)
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)
    trained = [p for part in adapter.parts for p in part.delta.parameters() if p.requires_grad]
    found = torch.autograd.grad(compiled(IDS).logits.square().sum(), trained)
    for one, other in zip(found, torch.autograd.grad(model(IDS).logits.square().sum(), trained), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora(rank=2)", "prefix(length=2)"])
def test_what_cannot_be_followed_breaks_the_graph_and_is_right(method: str) -> None:
    model = tiny("llama").eval()
    changed(model, method)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)


def test_rows_with_adapters_of_their_own_and_two_together() -> None:
    model = tiny("llama").eval()
    changed(model, "lora(rank=2)", "one")
    changed(model, "ia3", "two")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for routing in (["one", None], ("one", "two")):
            with use(model, routing):
                assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6), routing


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = tiny("llama").train()
    changed(model, "lora(rank=2,dropout=0.5)")
    compiled = torch.compile(model, backend="eager")
    assert not torch.equal(compiled(IDS).logits, compiled(IDS).logits)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)


def test_what_is_recomputed_meets_the_routing_of_its_forward() -> None:
    model = tiny("llama").eval()
    changed(model, "lora(rank=2)", "one")
    changed(model, "ia3", "two")
    switch = next(found.switch for module in model.modules() if (found := junction_of(module)) is not None)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with use(model, "one"):
            wanted = model(IDS).logits
        with use(model, "two"):
            assert not torch.allclose(compiled(IDS).logits, wanted, atol=1e-3)
            switch.recomputing = Routing(whole=("one",))
            assert torch.allclose(compiled(IDS).logits, wanted, atol=1e-6)
