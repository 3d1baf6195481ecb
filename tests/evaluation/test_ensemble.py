"""Ensembles: several adapters on one batch in one forward, against each of them alone and against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

import graftlm
from conformance.cases import CASES
from graftlm.core import adapters, attach, use
from graftlm.errors import GraftError, RoutingError
from graftlm.evaluation import ensemble
from graftlm.methods import LoRA
from models_for_tests import inputs_for, logits_of, perturb, tiny

METHODS = ["lora", "prompt", "prefix", "ia3", "series", "parallel", "bitfit", "sparse"]


def model_with(model_name, count=3, case="lora"):
    """A model with `count` unlike adapters a, b, c..., the first of the case, the others LoRAs."""
    model = tiny(model_name)
    for seed, name in enumerate("abcdef"[:count]):
        method = CASES[case] if not seed else LoRA(rank=2 + seed, targets="all-linear")
        perturb(attach(model, method, name=name), seed=seed, size=0.3)
    use(model, "a")
    return model


def padded(model, side="right"):
    """Three rows of different lengths."""
    batch = inputs_for(model)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 4:] = 0
    mask[2, 2:] = 0
    if side == "left":
        mask = mask.flip(1)
    return {**batch, "attention_mask": mask}


def alone(model, name, batch):
    """The log-probabilities of one adapter, row by row without padding."""
    found = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        with use(model, name), torch.no_grad():
            logits = model(input_ids=batch["input_ids"][row : row + 1, real]).logits
        found.append(logits[0, -1] if logits.dim() == 3 else logits[0])
    return torch.stack(found).log_softmax(-1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", METHODS)
def test_each_member_answers_as_it_does_alone(case, model_name, side):
    if case not in CASES:
        pytest.skip(f"no method {case}")
    try:
        model = model_with(model_name, case=case)
    except GraftError as error:
        pytest.skip(str(error))
    batch = padded(model, side)
    names = ["a", "b", "c", None, ("a", "b")]
    found = ensemble(model, names, batch)
    for at, name in enumerate(names):
        torch.testing.assert_close(found.each[at], alone(model, name, batch), atol=2e-5, rtol=1e-4)
    assert found.names == tuple(names)


@pytest.mark.parametrize("model_name", ["llama_classifier", "bert", "llama", "t5"])
@pytest.mark.parametrize("reduce", ["mean-probability", "mean-log-probability"])
def test_an_adapter_with_itself_is_itself(model_name, reduce):
    model = model_with(model_name)
    batch = inputs_for(model)
    one = ensemble(model, ["a"], batch, reduce=reduce)
    many = ensemble(model, ["a"] * 4, batch, reduce=reduce, weights=[1, 2, 3, 4])
    logits = logits_of(model, batch)
    wanted = (logits[:, -1] if logits.dim() == 3 else logits).log_softmax(-1)
    torch.testing.assert_close(one.log_probabilities, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(many.log_probabilities, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(many.choice, wanted.argmax(-1))
    assert many.spread.max() < 1e-6
    assert many.mutual_information.max() < 1e-6


def test_sums_by_hand():
    model = model_with("llama")
    batch = padded(model)
    p = torch.stack([alone(model, name, batch).exp() for name in "abc"]).double()
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    mean = ensemble(model, ["a", "b", "c"], batch, weights=[2, 1, 1])
    wanted = (p * weights[:, None, None]).sum(0)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(mean.log_probabilities.exp().double(), wanted, **close)
    assert torch.equal(mean.choice, wanted.argmax(-1))
    assert torch.equal(mean.votes, p.argmax(-1).T)
    chosen = torch.stack([p[k, torch.arange(3), mean.choice] for k in range(3)])
    centre = (chosen * weights[:, None]).sum(0)
    spread = ((chosen - centre) ** 2 * weights[:, None]).sum(0).sqrt()
    torch.testing.assert_close(mean.spread.double(), spread, **close)

    def entropy(p):
        return -(p * p.log()).sum(-1)

    information = entropy(wanted) - (entropy(p) * weights[:, None]).sum(0)
    torch.testing.assert_close(mean.mutual_information.double(), information, **close)
    assert (mean.mutual_information > 1e-4).all()
    geometric = ensemble(model, ["a", "b", "c"], batch, weights=[2, 1, 1], reduce="mean-log-probability")
    wanted = (p.log() * weights[:, None, None]).sum(0).softmax(-1)
    torch.testing.assert_close(geometric.log_probabilities.exp().double(), wanted, **close)


def test_votes_are_counted_and_weighed():
    model = model_with("llama_classifier", count=3)
    batch = inputs_for(model, rows=12)
    p = torch.stack([ensemble(model, [name], batch).log_probabilities.exp() for name in "abc"])
    own = p.argmax(-1)
    assert (own != own[0]).any(), "the members must disagree somewhere"
    found = ensemble(model, ["a", "b", "c"], batch, reduce="vote")
    for row in range(12):
        counts = torch.bincount(own[:, row], minlength=p.shape[-1])
        torch.testing.assert_close(found.log_probabilities[row].exp() * 3, counts.float())
        if (counts == counts.max()).sum() == 1:
            assert found.choice[row] == counts.argmax()
    alone_decides = ensemble(model, ["a", "b", "c"], batch, reduce="vote", weights=[5, 1, 1])
    assert torch.equal(alone_decides.choice, own[0])
    tied = ensemble(model, ["a", "b"], batch, reduce="vote")
    for row in range(12):
        mean = p[:2, row].mean(0)
        assert tied.choice[row] in own[:2, row]
        assert mean[tied.choice[row]] >= mean[own[:2, row]].max() - 1e-6


def test_a_weight_of_nothing_leaves_a_member_out():
    model = model_with("llama")
    batch = inputs_for(model)
    for reduce in ("mean-probability", "mean-log-probability", "vote"):
        both, one = (
            ensemble(model, ["a", "b"], batch, reduce=reduce, weights=[1, 0]), ensemble(model, ["a"], batch, reduce=reduce)
        )  # fmt: skip
        torch.testing.assert_close(both.log_probabilities, one.log_probabilities)
        assert torch.equal(both.choice, one.choice)
        assert both.spread.max() == 0


def test_the_routing_and_the_mode_are_put_back():
    model = model_with("llama")
    batch = inputs_for(model)
    model.train()
    before = logits_of(model, batch)
    graftlm.ensemble(model, ["b", "c"], {**batch, "labels": batch["input_ids"]})
    assert torch.equal(logits_of(model, batch), before)
    assert model.training
    with pytest.raises(ValueError, match="exactly one"):
        ensemble(model, ["b", "c"], {**batch, "inputs_embeds": torch.zeros(3, 6, 32)})
    assert torch.equal(logits_of(model, batch), before)
    assert list(adapters(model)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "options", "code"),
    [
        (["a", "z"], {}, "R110"),
        ([], {}, "A131"),
        (["a", "b"], {"reduce": "median"}, "A130"),
        (["a", "b"], {"weights": [1.0]}, "A132"),
        (["a", "b"], {"weights": [1.0, -1.0]}, "A132"),
        (["a", "b"], {"weights": [0.0, 0.0]}, "A132"),
        (["a", "b"], {"weights": [1.0, math.nan]}, "A132"),
    ],
)
def test_refusals(names, options, code):
    model = model_with("llama", count=2)
    with pytest.raises(GraftError) as caught:
        ensemble(model, names, inputs_for(model), **options)
    assert caught.value.findings[0].code == code


def test_a_batch_must_have_tokens():
    model = model_with("llama", count=2)
    with pytest.raises(GraftError, match="no input_ids: it has text"):
        ensemble(model, ["a"], {"text": "hello"})
    with pytest.raises(RoutingError, match="no adapter is attached"):
        ensemble(tiny("llama"), ["a"], inputs_for(model))
