"""Gradients: every delta gets one, and recomputation under gradient checkpointing meets the forward's adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from conformance.cases import CASES, cross, grid, only
from graftlm.core import adapters, attach, trainable, use
from graftlm.errors import RoutingError
from graftlm.methods import LoRA
from models_for_tests import DECODERS, MODELS, inputs_for, logits_of, loss_of, perturb, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*is deprecated:FutureWarning")


def gradients(adapter):
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}


def clear(adapter):
    for parameter in adapter.parameters():
        parameter.grad = None


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step(model, adapter, batch=None):
    clear(adapter)
    torch.manual_seed(4)
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), gradients(adapter)


def assert_same(found, wanted, tolerance=1e-5):
    """Equal up to rounding, which is measured against the largest gradient: a key's bias has none but rounding."""
    assert found.keys() == wanted.keys()
    size = max(gradient.abs().max() for gradient in wanted.values() if gradient is not None and gradient.numel())
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
        elif gradient.numel():  # where entries are chosen over all weights, some weights may have none
            assert (found[name] - gradient).abs().max() <= tolerance * size, name


@cross()
def test_every_delta_gets_a_gradient(case, model_name):
    model = tiny(model_name).train()
    adapter = attach(model, CASES[case])
    if not adapter.parameter_count:  # a mask on the base trains nothing
        return
    perturb(adapter)
    # Many tokens, so that every expert and every row of every table is met.
    _, found = step(model, adapter, inputs_for(model, rows=8, tokens=12))
    empty = {name for name, tensor in adapter.state().items() if not tensor.numel()}  # chosen over all weights
    lacking = [name for name, grad in found.items() if name not in empty and (grad is None or not grad.abs().sum() > 0)]
    assert not lacking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {f"default/{name}" for name in found} == trainable(model).keys()


@cross()
def test_gradient_checkpointing_gives_the_same_gradients(case, model_name):
    model = tiny(model_name).train()
    adapter = attach(model, CASES[case])
    if not adapter.parameter_count:
        return
    perturb(adapter)
    loss, wanted = step(model, adapter)
    again, found = step(checkpointed(model), adapter)
    assert model.is_gradient_checkpointing
    assert torch.allclose(again, loss, rtol=1e-5, atol=1e-6)  # T5 takes another path to its mask without a cache
    assert_same(found, wanted)


@grid(only("lora", "full"))
def test_recomputation_uses_the_routing_of_the_forward(case, model_name):
    model = tiny(model_name).train()
    adapter, other = attach(model, CASES[case], name="a"), attach(model, CASES[case], name="b")
    perturb(adapter, seed=1)
    perturb(other, seed=2)
    use(model, "a")
    loss, wanted = step(model, adapter)
    checkpointed(model)
    for later in ("b", None, ("a", "b"), [None, "b", "a"]):
        clear(adapter)
        clear(other)
        use(model, "a")
        torch.manual_seed(4)
        loss_of(model)  # a forward whose graph is thrown away does no harm where its routing is the same
        loss = loss_of(model)
        use(model, later)
        loss.backward()
        assert_same(gradients(adapter), wanted)
        assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize("model_name", MODELS)
def test_mixed_rows_under_checkpointing(model_name):
    model = tiny(model_name).train()
    made = [attach(model, LoRA(rank=2, targets="all-linear,head"), name=name) for name in "ab"]
    for seed, adapter in enumerate(made):
        perturb(adapter, seed=seed)
    use(model, ["a", None, ("a", "b")])
    step(model, made[0])
    wanted = [gradients(adapter) for adapter in made]
    for adapter in made:
        clear(adapter)
    checkpointed(model)
    use(model, ["a", None, ("a", "b")])
    loss = loss_of(model)
    use(model, "b")
    loss.backward()
    for adapter, expected in zip(made, wanted, strict=True):
        assert_same(gradients(adapter), expected)


@pytest.fixture
def two_on_llama():
    model = tiny("llama").train()
    for seed, name in enumerate("ab"):
        perturb(attach(model, LoRA(rank=2), name=name), seed=seed)
    return model, *adapters(model).values()


def alone(model, adapter):
    """The gradients of `adapter` for a forward of its own, without checkpointing."""
    twin = copy.deepcopy(model)
    use(twin, adapter.name)
    return step(twin, adapters(twin)[adapter.name])[1]


def test_two_routings_before_one_backward_under_checkpointing(two_on_llama):
    """Each forward is recomputed with its own adapters."""
    model, first, second = two_on_llama
    wanted = alone(model, first), alone(model, second)
    checkpointed(model)
    use(model, "a")
    loss = loss_of(model)
    use(model, "b")
    loss = loss + loss_of(model)
    use(model, None)
    loss.backward()
    assert_same(gradients(first), wanted[0])
    assert_same(gradients(second), wanted[1])


class CheckpointedByHand(torch.nn.Module):
    """A layer that recomputes itself without transformers knowing."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


@pytest.fixture
def two_by_hand():
    model = tiny("llama").train()
    model.model.layers = torch.nn.ModuleList(CheckpointedByHand(layer) for layer in model.model.layers)
    for seed, name in enumerate("ab"):
        perturb(attach(model, LoRA(rank=2, targets="q_proj,v_proj"), name=name), seed=seed)
    return model, *adapters(model).values()


def test_checkpointing_by_hand_uses_the_routing_of_the_forward(two_by_hand):
    model, first, second = two_by_hand
    for adapter in (first, second, first):
        wanted = alone(model, adapter)
        use(model, adapter.name)
        clear(adapter)
        loss = loss_of(model)
        use(model, None)
        loss.backward()
        assert_same(gradients(adapter), wanted)


def test_two_routings_before_one_backward_work_without_checkpointing(two_on_llama):
    model, first, second = two_on_llama
    wanted = alone(model, first), alone(model, second)
    use(model, "a")
    loss = loss_of(model)
    use(model, "b")
    (loss + loss_of(model)).backward()
    assert_same(gradients(first), wanted[0])
    assert_same(gradients(second), wanted[1])


def test_alternating_routings_step_by_step_under_checkpointing(two_on_llama):
    model, first, second = two_on_llama
    wanted = {adapter: alone(model, adapter) for adapter in (first, second)}
    checkpointed(model)
    for adapter in (first, second, second, first, second):
        use(model, adapter.name)
        assert_same(step(model, adapter)[1], wanted[adapter])


def test_an_evaluation_with_other_adapters_between_steps(two_on_llama):
    model, first, _ = two_on_llama
    wanted = alone(model, first)
    checkpointed(model)
    for _ in range(2):
        use(model, "a")
        clear(first)
        loss = loss_of(model)
        with use(model, "b"):
            model.eval()
            logits_of(model)
            model.train()
            logits_of(model)
        loss.backward()
        assert_same(gradients(first), wanted)


def test_two_waiting_forwards_of_one_routing_then_another(two_on_llama):
    """Forwards f1(a) f2(a), backward of f1, forward f3(b), backward of f2: f2 is recomputed with a or refused."""
    model, first, second = two_on_llama
    wanted = alone(model, first)
    checkpointed(model)
    use(model, "a")
    one, two = loss_of(model), loss_of(model)
    one.backward()
    use(model, "b")
    loss_of(model)
    clear(first)
    clear(second)
    try:
        two.backward()
    except RoutingError:
        return
    assert_same(gradients(first), wanted)
    assert all(parameter.grad is None for parameter in second.parameters())


def test_checkpointing_switched_on_after_steps_with_other_adapters(two_on_llama):
    model, first, second = two_on_llama
    wanted = alone(model, second)
    for name in "ab":  # ordinary steps leave nothing to wait for
        use(model, name)
        step(model, first)
    clear(second)
    checkpointed(model)
    use(model, "b")
    assert_same(step(model, second)[1], wanted)


def test_dropout_follows_the_mode_of_the_model():
    model = tiny("llama")
    adapter = attach(model, LoRA(rank=4, dropout=0.5))
    perturb(adapter)
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))
    with use(model, None):
        assert torch.equal(logits_of(model), logits_of(model))
    model.eval()
    assert torch.equal(logits_of(model), logits_of(model))


def test_only_trainable_adapters_get_gradients():
    model = tiny("llama").train()
    kept = attach(model, LoRA(rank=2), name="kept", trainable=False)
    moved = attach(model, LoRA(rank=2), name="moved")
    perturb(kept)
    perturb(moved)
    use(model, ("kept", "moved"))
    loss_of(model).backward()
    assert all(parameter.grad is None for parameter in kept.parameters())
    assert all(parameter.grad is not None for parameter in moved.parameters())
    assert trainable(model).keys() == {f"moved/{name}" for name, _ in moved.named_parameters()}


@pytest.mark.parametrize("model_name", [name for name in DECODERS if name in ("llama", "gpt2", "mixtral")])
@pytest.mark.parametrize("case", ["lora", "full", "lora+full"])
def test_a_few_steps_lower_the_loss_and_leave_the_base(case, model_name):
    model = tiny(model_name).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batch = inputs_for(model)
    adapter = attach(model, CASES[case])
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
