"""Trained rows of embeddings: what they change, what they cost, what is refused."""

from __future__ import annotations

import pytest
import torch

from graftlm.core import adapters, attach, use
from graftlm.errors import GraftError
from graftlm.methods import LoRA, Modules, ReZero, TrainableTokens, read_method
from graftlm.methods.tokens import TrainableTokensDelta
from models_for_tests import inputs_for, tiny

SEEN = [7, 20]


def ready(name, method, ids=SEEN):
    model = tiny(name)
    inputs = inputs_for(model)
    inputs["input_ids"][:, -2:] = torch.tensor(ids)
    adapter = attach(model, method)
    with torch.no_grad():
        for seed, parameter in enumerate(adapter.parameters()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    return model, inputs, adapter


def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("trains", [True, False])
def test_it_is_the_model_with_those_rows_in_its_matrix(name, trains):
    model, inputs, adapter = ready(name, TrainableTokens([7, 40, 20]))
    (part,) = adapter.parts
    other = tiny(name)
    with torch.no_grad():
        other.get_input_embeddings().weight[[7, 40, 20]] = part.delta.rows
    with torch.set_grad_enabled(trains):
        found, wanted = logits(model, inputs), logits(other, inputs)
        assert not torch.allclose(found, logits(tiny(name), inputs))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
        if not trains:
            return
        found.square().sum().backward()
        wanted.square().sum().backward()
        gradient = other.get_input_embeddings().weight.grad[[7, 40, 20]]
        torch.testing.assert_close(part.delta.rows.grad, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_no_changed_matrix_and_no_gradient_of_one_is_built(name, monkeypatch):
    built = []
    whole = TrainableTokensDelta.parameter
    monkeypatch.setattr(TrainableTokensDelta, "parameter", lambda *given: built.append(1) or whole(*given))
    model, inputs, adapter = ready(name, TrainableTokens(SEEN))
    logits(model, inputs).square().sum().backward()
    use(model, [None, "default", ("default",)])
    logits(model, {key: tensor[:3] for key, tensor in inputs.items()})
    assert not built
    adapter.merge()
    assert built


def test_more_logits_than_a_matrix_without_gradients_take_the_matrix():
    delta = TrainableTokensDelta(torch.zeros(64, 32), SEEN, 1.0)
    few, many = torch.zeros(1, 3, 32), torch.zeros(4, 8, 32)
    with torch.no_grad():
        assert [delta.adds(x, rows=False) for x in (few, many)] == [True, False]
        assert delta.adds(many, rows=True)
    assert delta.adds(many, rows=False)


def test_what_is_merged_by_another_adapter_counts_once():
    """Two adapters at the same rows add up, whether one of them is merged or not."""
    model, inputs, one = ready("qwen2", TrainableTokens([7, 20]))
    with torch.no_grad():
        start = tiny("qwen2").get_input_embeddings().weight[[20, 21]].clone()
        other = attach(model, TrainableTokens([20, 21]), name="other")
        other.parts[0].delta.rows.copy_(start + 0.3)
        use(model, ("default", "other"))
        wanted = logits(model, inputs)
        one.merge()
        torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=1e-5)
        one.unmerge()
        other.merge()
        torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=1e-5)


def test_a_tied_matrix_stays_tied_when_merged():
    model, inputs, adapter = ready("qwen2", TrainableTokens(SEEN))
    attached = logits(model, inputs)
    adapter.merge()
    torch.testing.assert_close(logits(model, inputs), attached, rtol=0, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_a_head_of_its_own_is_trained_where_it_is_named():
    model, inputs, adapter = ready("llama", TrainableTokens(SEEN, targets=["embed", "head"]))
    assert [part.site.path for part in adapter.parts] == ["model.embed_tokens", "lm_head"]
    with torch.no_grad():
        before = logits(tiny("llama"), {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 9)})
        after = logits(model, {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 9)})
    changed = (before != after).any(0).any(0).nonzero().flatten().tolist()
    assert changed == SEEN


def test_beside_others_at_the_same_matrix():
    for method in (
        TrainableTokens(SEEN) + Modules("embed"),
        LoRA(rank=2, targets="embed") + TrainableTokens(SEEN),
        ReZero(TrainableTokens(SEEN), start=0.5),
    ):
        model, inputs, adapter = ready("gemma3", method)
        with torch.no_grad():
            attached = logits(model, inputs)
            adapter.merge()
            torch.testing.assert_close(logits(model, inputs), attached, rtol=0, atol=1e-5)


def test_the_text_of_it():
    assert read_method("tokens([5,6])") == TrainableTokens([5, 6])
    assert read_method("tokens(5)").rows == (5,)
    assert str(TrainableTokens((5, 6))) == "tokens(ids=[5,6])"
    with pytest.raises(GraftError, match="is called ids here"):
        read_method("tokens(token_indices=[5])")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TrainableTokens([3, -1]), "no token ids.*T102"),
        (lambda: TrainableTokens(["<tag>"]), "no token ids.*T102"),
        (lambda: TrainableTokens([True]), "no token ids.*T102"),
        (lambda: TrainableTokens([3, 4, 3]), r"\[3\] twice.*T102"),
        (lambda: TrainableTokens(), r"no token ids .T162.[\s\S]*tokens\(ids=\[5\]\)"),
        (lambda: TrainableTokens([5, 64, 70]), r"token 64 is not one of the 64[\s\S]*resize_token_embeddings\(71\)"),
        (lambda: TrainableTokens([5], targets="norm"), "C10"),
        (lambda: TrainableTokens([5], targets="embd"), r"C101[\s\S]*embed"),
    ],
)
def test_what_is_refused(make, reason):
    model = tiny("llama")
    with pytest.raises(GraftError, match=reason):
        attach(model, make())
    assert not adapters(model)
