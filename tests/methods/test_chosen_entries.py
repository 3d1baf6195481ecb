"""Methods that choose: sparse entries by score, masks on the base, ranks by importance, vectors around shared maps."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from graftlm.core import Samples, adapters, attach, use
from graftlm.errors import MethodError, NotMergeable
from graftlm.methods import AdaLoRA, LoRA, Prune, ReZero, Sparse, VeRA
from graftlm.methods.prune import lowest
from graftlm.methods.scoring import FROM_DATA, best, scores_from_data
from graftlm.methods.sparse import SparseDelta
from models_for_tests import inputs_for, logits_of, loss_of, perturb, tiny


def batches(model):
    return [{**batch, "labels": batch["input_ids"]} for batch in (inputs_for(model, seed=s) for s in (1, 2))]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_the_best_over_all_tensors_are_those_of_sorting_everything(count):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator) for shape in ((3, 4), (5, 6), (2, 2))]
    threshold = torch.cat([score.flatten() for score in scores]).sort(descending=True).values[count - 1]
    found = best(scores, count)
    assert sum(map(len, found)) == count
    for score, index in zip(scores, found, strict=True):
        assert torch.equal(index, (score.flatten() >= threshold).nonzero().flatten())


def test_empirical_fisher_is_the_mean_of_squares_of_single_examples():
    model = tiny("llama")
    data = batches(model)
    method = Sparse(fraction=0.01, score="empirical-fisher", targets="value")
    adapter = attach(model, method, samples=data)
    chosen = [part.delta.index for part in adapter.parts]
    adapter.detach()
    weights = [layer.self_attn.v_proj.weight for layer in model.model.layers]
    totals = [torch.zeros_like(weight) for weight in weights]
    for batch, row in itertools.product(data, range(3)):
        loss = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient**2
    wanted = best(totals, int(0.01 * sum(weight.numel() for weight in weights)))
    assert all(torch.equal(one.long(), other) for one, other in zip(chosen, wanted, strict=True))


def test_snip_is_the_mean_of_weight_times_gradient():
    model = tiny("gpt2")
    (batch, _) = batches(model)
    place = model.transformer.h[0].mlp.c_fc
    (found,) = scores_from_data(model, [place], "snip", Samples([batch]))
    total = torch.zeros_like(place.weight)
    for row in range(3):
        loss = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss
        total += (torch.autograd.grad(loss, place.weight)[0] * place.weight).abs()
    torch.testing.assert_close(found, total / 3)


@pytest.mark.parametrize("score", FROM_DATA)
@pytest.mark.parametrize("model_name", ["gpt2", "bert"])
def test_scores_from_data_leave_the_model_as_it_was(score, model_name):
    model = tiny(model_name)
    data = batches(model)
    if model_name == "bert":
        data = [{**batch, "labels": torch.tensor([0, 1, 1])} for batch in data]
    plain = logits_of(model)
    other = attach(model, LoRA(rank=2), name="other")
    perturb(other)
    with pytest.raises(MethodError) as caught:
        attach(model, Sparse(score=score))
    assert caught.value.findings[0].code == "T122"
    adapter = attach(model, Sparse(fraction=0.02, score=score), name="few", samples=Samples(data))
    assert torch.equal(logits_of(model), plain)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *other.parameters()))
    entries = sum(part.site.in_features * part.site.out_features for part in adapter.parts)
    assert adapter.parameter_count == int(0.02 * entries)
    perturb(adapter)
    changed = logits_of(model)
    assert not torch.equal(changed, plain)
    adapter.merge()
    assert torch.allclose(logits_of(model), changed, rtol=1e-5, atol=1e-6)


def test_the_optimiser_holds_as_many_numbers_as_are_trained():
    model = tiny("llama").train()
    adapter = attach(model, Sparse(fraction=0.01))
    optimiser = torch.optim.AdamW(adapter.groups(1e-2))
    loss_of(model).backward()
    optimiser.step()
    moments = sum(v.numel() for s in optimiser.state.values() for k, v in s.items() if k != "step")
    assert moments == 2 * adapter.parameter_count
    assert {part.delta.index.dtype for part in adapter.parts} == {torch.int32}


def test_masks_of_each_kind():
    for method, share in ((Prune(0.5), 0.5), (Prune(0.25, scope="tensor"), 0.25), (Prune(pattern="2:4"), 0.5)):
        for name in ("llama", "gpt2"):
            adapter = attach(tiny(name), method)
            for part in adapter.parts:
                gone = (~part.delta.mask).float()
                assert abs(float(gone.mean()) - share) < 0.02
                by_row = gone.T if part.site.kind == "conv1d" else gone
                if method.pattern:
                    assert bool((by_row.reshape(by_row.shape[0], -1, 4).sum(-1) == 2).all())
                elif method.scope == "row":
                    assert by_row.sum(1).unique().numel() == 1


def test_wanda_is_the_weight_times_the_norm_of_its_input():
    model = tiny("llama")
    seen = []
    place = model.model.layers[1].mlp.down_proj
    handle = place.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 48)))
    data = batches(model)
    for batch in data:
        with torch.no_grad():
            model(**batch)
    handle.remove()
    adapter = attach(model, Prune(0.5, score="wanda", targets="down"), samples=data)
    score = place.weight.abs() * torch.cat(seen).norm(dim=0)
    gone = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(24, dim=1, largest=False).indices, True)
    assert torch.equal(adapter.parts[1].delta.mask, ~gone)


def test_a_pruning_schedule_ends_at_its_sparsity_and_stores_the_mask_alone(tmp_path):
    from graftlm.formats import load_adapter

    model = tiny("llama")
    adapter = attach(model, Prune(0.6, initial=0.1, begin=0.2, end=0.8))
    shares = []
    for step in range(1, 11):
        adapter.after_step(step, 10)
        shares.append(float((~adapter.parts[0].delta.mask).float().mean()))
    assert shares == sorted(shares)
    assert abs(shares[0] - 0.1) < 0.04
    assert abs(shares[-1] - 0.6) < 0.04
    adapter.save(tmp_path / "a")
    fresh = tiny("llama")
    loaded = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits_of(fresh), logits_of(model))
    assert "scores" not in " ".join(loaded.state())


def test_adalora_hands_out_its_budget_as_planned():
    method = AdaLoRA(rank=4, target_rank=1, begin=0.1, end=0.5, every=5)
    budgets = [method.budget(step, 100, 6) for step in range(1, 101)]
    assert budgets[:10] == [24] * 10
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[49:] == [6] * 51
    assert budgets[29] == 6 + -(-18 // 8)  # half-way the cubic has an eighth left


def test_adalora_keeps_the_triplets_that_matter():
    model = tiny("llama").train()
    method = AdaLoRA(rank=4, target_rank=1, begin=0.0, end=0.5, every=1)
    adapter = attach(model, method)
    with torch.no_grad():
        for part in adapter.parts:
            part.delta.lora_E.fill_(1e-3)
        adapter.parts[0].delta.lora_E.fill_(5.0)  # this site works hardest
        adapter.parts[0].delta.lora_A.mul_(20)
    optimiser = torch.optim.SGD(adapter.groups(0.0))
    for step in range(1, 7):
        loss_of(model).backward()
        optimiser.step()
        adapter.after_step(step, 10)
        optimiser.zero_grad()
    kept = [int(part.delta.kept.sum()) for part in adapter.parts]
    assert sum(kept) == len(adapter.parts)
    assert kept[0] == 4
    assert all(torch.equal(p.delta.lora_E == 0, p.delta.kept == 0) for p in adapter.parts)
    attached = logits_of(model)
    baked = adapter.baked()
    assert isinstance(baked.method, LoRA)
    state = baked.state()
    adapter.detach()
    attach(model, baked.method, state=state)
    assert torch.allclose(logits_of(model), attached, rtol=1e-5, atol=1e-6)


def test_adalora_penalty_is_zero_for_orthonormal_factors():
    model = tiny("llama")
    adapter = attach(model, AdaLoRA(rank=4, target_rank=2))
    assert float(adapter.penalty()) > 0.5
    for part in adapter.parts:
        torch.nn.init.orthogonal_(part.delta.lora_A)
        torch.nn.init.orthogonal_(part.delta.lora_B)
    assert float(adapter.penalty()) < 1e-5


def test_vera_draws_pefts_numbers_and_shares_them():
    import peft

    theirs = peft.get_peft_model(
        tiny("llama"), peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], projection_prng_key=3)
    )
    model = tiny("llama")
    adapter = attach(model, VeRA(rank=8, targets="query,output", seed=3))
    shared = adapter.parts[0].delta.shared
    assert all(part.delta.shared is shared for part in adapter.parts)
    assert torch.equal(shared.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.vera_B, theirs.base_model.vera_B["default"])
    assert adapter.parameter_count == 4 * (32 + 8)
    perturb(adapter)
    with torch.no_grad():
        for part in adapter.parts:
            place = theirs.get_submodule(f"base_model.model.{part.site.path}")
            place.vera_lambda_b["default"].copy_(part.delta.vera_lambda_b)
            place.vera_lambda_d["default"].copy_(part.delta.vera_lambda_d)
    assert torch.allclose(logits_of(model), logits_of(theirs.eval()), rtol=1e-5, atol=1e-5)


def test_mixed_rows_of_every_kind_of_choice():
    model = tiny("llama")
    for name, method in {
        "s": Sparse(0.02),
        "p": Prune(0.3),
        "v": VeRA(rank=8),
        "a": AdaLoRA(rank=4, target_rank=2),
    }.items():
        perturb(attach(model, method, name=name))
    batch = inputs_for(model, rows=5)
    spec = ["s", None, ("p", "v"), "a", ("s", "p", "a")]
    alone = []
    for row, choice in enumerate(spec):
        use(model, choice)
        alone.append(logits_of(model, {name: tensor[row : row + 1] for name, tensor in batch.items()}))
    use(model, spec)
    found = logits_of(model, batch)
    assert F.l1_loss(found, torch.cat(alone)) < 1e-6


@pytest.mark.parametrize("method", [Sparse(targets="query"), Prune(targets="value")], ids=str)
def test_a_part_of_a_fused_weight_is_refused(method):
    with pytest.raises(MethodError) as caught:
        attach(tiny("gpt2"), method)
    assert caught.value.findings[0].code == "T161"
    assert caught.value.findings[0].fix == "targets=c_attn"


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])  # weights [out, in] and [in, out]
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_sparse_product_beside_the_map_is_the_changed_weight(model_name, gated, tokens, monkeypatch):
    model = tiny(model_name).double()
    method = Sparse(fraction=0.05, score="random")
    adapter = attach(model, ReZero(method, start=0.5) if gated else method)
    perturb(adapter)
    for part in adapter.parts:  # as another tool might have stored them
        delta = part.delta.inner if gated else part.delta
        delta.index.copy_(delta.index[torch.randperm(len(delta.index))])
    batch = inputs_for(model, rows=1, tokens=tokens)

    def values_and_gradients():
        adapter.requires_grad_()
        logits = model(**batch).logits
        found = torch.autograd.grad(logits.square().sum(), list(adapter.parameters()))
        with torch.no_grad():
            return logits, model(**batch).logits, *found

    counted = []
    add = SparseDelta.add
    monkeypatch.setattr(SparseDelta, "add", lambda self, *given: counted.append(1) or add(self, *given))
    beside = values_and_gradients()
    # Without gradients and for many tokens it is cheaper to build the weight.
    assert len(counted) == (2 if tokens == 1 else 1) * len(adapter.parts)
    monkeypatch.setattr(SparseDelta, "adds", lambda self, x, rows: False)
    for found, wanted in zip(beside, values_and_gradients(), strict=True):
        # llama has its norms in float32; one token has no gradient at query and key, only rounding
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max() + 1e-12


def test_training_a_few_entries_keeps_no_weight_for_the_backward_pass():
    model = tiny("llama").train()
    adapter = attach(model, Sparse(fraction=0.01))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {part.delta.shape for part in adapter.parts}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss_of(model).backward()
    others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert others
    assert not shapes & {shape for tensor in others for shape in (tuple(tensor.shape), tuple(tensor.shape[::-1]))}


def test_a_threshold_trains_what_reaches_it():
    model = tiny("llama")
    weights = [layer.self_attn.v_proj.weight for layer in model.model.layers]
    every = torch.cat([weight.detach().abs().flatten() for weight in weights])
    threshold = float(every.sort(descending=True).values[9])
    adapter = attach(model, Sparse(threshold=threshold, targets="value"))
    assert adapter.parameter_count == 10
    for part, weight in zip(adapter.parts, weights, strict=True):
        assert torch.equal(part.delta.index.long(), (weight.abs().flatten() >= threshold).nonzero().flatten())
    adapter.detach()
    for unit in ("entry", "head", "layer"):
        with pytest.raises(MethodError) as caught:
            attach(model, Sparse(threshold=99.0, unit=unit, targets="attention"))
        assert caught.value.findings[0].code == "T163"
        assert unit in str(caught.value)


@pytest.mark.parametrize("score", ["magnitude", "snip"])
def test_whole_layers_by_their_mean_score(score):
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(3)
    adapter = attach(model, Sparse(fraction=0.5, unit="layer", score=score), samples=batches(model))
    chosen = {part.site.layer for part in adapter.parts if len(part.delta.index)}
    assert len(chosen) == 1
    assert chosen == {1} or score != "magnitude"
    for part in adapter.parts:
        entries = part.site.in_features * part.site.out_features
        assert len(part.delta.index) == (entries if part.site.layer in chosen else 0)
    perturb(adapter)
    changed = logits_of(model)
    adapter.merge()
    assert torch.allclose(logits_of(model), changed, rtol=1e-5, atol=1e-6)
    adapter.unmerge().detach()
    mean = torch.cat(
        [p.detach().abs().flatten() for n, p in model.model.layers[1].named_parameters() if "proj" in n]
    ).mean()
    adapter = attach(model, Sparse(threshold=float(mean) * 0.99, unit="layer"))
    assert {part.site.layer for part in adapter.parts if len(part.delta.index)} == {1}


@pytest.mark.parametrize("model_name", ["llama", "bert", "opt", "t5"])
def test_whole_heads_by_their_mean_score(model_name):
    """A head that is made large is the one that is trained: all of it, and nothing else."""
    model = tiny(model_name)
    sites = attach(model, Sparse(unit="head", targets="attention"), name="look").parts
    calls = sorted({part.site.entry for part in sites})
    wanted = sites[0].site
    adapter_count = len(calls) * wanted.kv_heads
    for part in sites:
        part.delta.requires_grad_(False)
    adapters(model)["look"].detach()
    head, chosen = wanted.kv_heads - 1, calls[-1]
    expected = {}
    for part in sites:
        if part.site.entry != chosen:
            continue
        weight = model.get_submodule(part.site.path).weight
        size = weight.shape[1 if part.site.role == "output" else 0] // wanted.kv_heads
        mark = torch.zeros_like(weight, dtype=torch.bool)
        own = slice(head * size, (head + 1) * size)
        mark[(slice(None), own) if part.site.role == "output" else (own,)] = True
        with torch.no_grad():
            weight[mark] *= 20
        expected[part.site.path] = mark.flatten().nonzero().flatten()
    assert len(expected) == 4
    adapter = attach(model, Sparse(fraction=1.01 / adapter_count, unit="head", targets="attention"))
    for part in adapter.parts:
        assert torch.equal(part.delta.index.long(), expected.get(part.site.path, torch.empty(0, dtype=torch.long)))


@pytest.mark.parametrize(
    ("model_name", "method"),
    [("llama", Sparse(unit="head")), ("gpt2", Sparse(unit="head", targets="attention"))],
    ids=["feed-forward", "fused"],
)
def test_heads_where_there_are_none_are_refused(model_name, method):
    with pytest.raises(MethodError) as caught:
        attach(tiny(model_name), method)
    assert caught.value.findings[0].code == "T164"


@pytest.mark.parametrize("options", [{"unit": "heads"}, {"unit": "layer", "scope": "tensor"}, {"threshold": 0.0}])
def test_settings_of_sparse_that_cannot_be(options):
    with pytest.raises(MethodError):
        Sparse(**options)


@pytest.mark.parametrize("share", [0.0, 0.013, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_lowest_over_all_tensors_are_those_of_sorting_everything(share, kind):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator).to(kind).float() for shape in ((30, 40), (5, 6), (200,))]
    scores[2][:7] = 0.0
    count = int(share * 1430)
    value, ties = lowest(lambda: scores, count)
    every = torch.cat([score.flatten() for score in scores]).sort().values
    if count:
        assert value == float(every[count - 1])
    assert sum(int((score < value).sum()) for score in scores) + ties == count


def test_one_threshold_over_all_weights():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(100)
    for method in (Prune(0.5, scope="global"), Prune(0.5, scope="global", score="wanda")):
        adapter = attach(model, method, samples=batches(model))
        gone = {part.site.path: ~part.delta.mask for part in adapter.parts}
        total = sum(mask.numel() for mask in gone.values())
        assert sum(int(mask.sum()) for mask in gone.values()) == int(0.5 * total)
        assert gone["model.layers.1.mlp.up_proj"].float().mean() < 0.05
        if method.score == "magnitude":
            sizes = {path: model.get_submodule(path).weight.abs() for path in gone}
            assert max(float(sizes[p][gone[p]].max()) for p in gone) <= min(
                float(sizes[p][~gone[p]].min()) for p in gone
            )
        adapter.detach()


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("scope", ["row", "global"])
def test_a_schedule_holds_masks_alone_and_ends_where_pruning_at_once_would(score, scope):
    model = tiny("llama")
    adapter = attach(model, Prune(0.6, score, scope, initial=0.1), name="late", samples=batches(model))
    for part in adapter.parts:
        floats = sum(t.numel() for t in part.delta.state_dict().values() if t.is_floating_point())
        assert floats == (part.site.in_features if score == "wanda" else 0)
        assert part.delta.mask.dtype == torch.bool
    before = logits_of(model)
    for step in range(1, 401):
        adapter.after_step(step, 400)
    masks = [part.delta.mask.clone() for part in adapter.parts]
    assert not torch.equal(logits_of(model), before)
    twin = copy.deepcopy(model)
    assert adapters(twin)["late"].parts[0].delta.at[0] is twin.get_submodule(adapter.parts[0].site.path)
    adapter.detach()
    at_once = attach(model, Prune(0.6, score, scope), samples=batches(model))
    assert all(torch.equal(part.delta.mask, mask) for part, mask in zip(at_once.parts, masks, strict=True))


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_a_merge_that_keeps_the_zeros(model_name):
    model = tiny(model_name)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = attach(model, Prune(0.5, targets="output,down") + LoRA(rank=2, targets="output,down"), name="p")
    other = attach(model, LoRA(rank=2, targets="output"), name="other")
    perturb(pruned)
    perturb(other, seed=1)

    def zeros():
        return [
            float((model.get_submodule(p.site.path).weight == 0).float().mean())
            for p in pruned.parts
            if hasattr(p.delta, "mask")
        ]

    with pytest.raises(NotMergeable) as caught:
        other.merge(keep_zeros=True)
    assert caught.value.findings[0].code == "R203"
    assert not other.merged
    pruned.merge()
    assert max(zeros()) < 0.1
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned.merge(keep_zeros=True)
    assert all(abs(share - 0.5) < 0.02 for share in zeros())
    other.merge()  # what comes later keeps them too
    assert all(abs(share - 0.5) < 0.02 for share in zeros())
    other.unmerge()
    for part in pruned.parts:
        if hasattr(part.delta, "mask"):
            name = f"{part.site.path}.weight"
            assert torch.equal(model.state_dict()[name], dense[name] * part.delta.mask)
    pruned.unmerge()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())
    pruned.merge()
    assert max(zeros()) < 0.1


def test_the_fisher_information_of_several_labels_is_that_of_coins():
    """A label that a row may have beside others is drawn by itself: p (1 - p) for its bias, whatever the others are."""
    model = tiny("bert")
    model.config.problem_type = "multi_label_classification"
    model.classifier = torch.nn.Linear(model.config.hidden_size, 4)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([3.0, 3.0, -3.0, 0.0])
    data = [{**batch, "labels": torch.zeros(3, 4)} for batch in batches(model) for _ in range(100)]
    torch.manual_seed(0)
    (score,) = scores_from_data(model, [model.classifier.bias], "fisher", Samples(data))
    chance = model.classifier.bias.sigmoid()
    # The loss is a mean of 4.
    torch.testing.assert_close(16 * score, (chance * (1 - chance)).detach(), rtol=0.25, atol=0)


def test_the_fisher_information_of_numbers_is_that_of_a_normal_distribution():
    """Its variance is 1 whatever the number is, and a number's share in the loss is one of four."""
    model = tiny("bert")
    model.config.problem_type = "regression"
    model.classifier = torch.nn.Linear(model.config.hidden_size, 4)
    model.classifier.bias.data = torch.tensor([9.0, 0.0, 0.0, -9.0])
    data = [{**batch, "labels": torch.zeros(3, 4)} for batch in batches(model) for _ in range(100)]
    torch.manual_seed(0)
    (score,) = scores_from_data(model, [model.classifier.bias], "fisher", Samples(data))
    torch.testing.assert_close(16 * score, torch.ones(4), rtol=0.25, atol=0)


def test_the_fisher_information_needs_logits():
    model = tiny("bert").bert  # a body without a head
    with pytest.raises(MethodError) as caught:
        scores_from_data(model, [model.encoder.layer[0].output.dense.weight], "fisher", Samples(batches(tiny("bert"))))
    assert [finding.code for finding in caught.value.findings] == ["T166"]


def test_the_fisher_information_of_a_number_is_not_nothing():
    """Labels of a model with one output are drawn around it: by a softmax every score would be zero."""
    model = tiny("bert")
    model.classifier = torch.nn.Linear(model.config.hidden_size, 1)
    data = [{**batch, "labels": torch.randn(3)} for batch in batches(model)]
    (score,) = scores_from_data(model, [model.bert.encoder.layer[0].output.dense.weight], "fisher", Samples(data))
    assert float(score.sum()) > 0
