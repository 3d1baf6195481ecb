"""A fused model gives the losses and gradients of the model that it was, whatever acts in it; undone, nothing is left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlm
from graftlm import attach, use
from graftlm.core.lane import lane_of
from graftlm.kernels import Fused, LossHead, fuse, fusing
from graftlm.quantisation import merged_copy, quantize
from models_for_tests import DECODERS, ENCODER_DECODERS, ENCODERS, inputs_for, tiny

#: What may be fused in each model; everything else is left alone.
EXPECTED = {
    "llama": {"linear": 14, "feed-forward": 2, "norm": 5, "attention": 2},
    "qwen3": {"linear": 14, "feed-forward": 2, "norm": 9, "attention": 2},
    "gemma2": {"linear": 14, "feed-forward": 2, "norm": 9},
    "gpt2": {"linear": 8, "feed-forward": 2, "norm": 5, "attention": 2},
    "opt": {"linear": 12, "norm": 5, "attention": 2},
    "phi3": {"linear": 8, "norm": 5, "attention": 2},
    "bert": {"linear": 12, "norm": 5, "attention": 2},
    "t5_gated": {"linear": 36, "feed-forward": 4, "norm": 12, "attention": 6},
}


def shaken(model: Any, method: str, name: str = "default") -> Any:
    adapter = attach(model, graftlm.method(method), name=name)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return adapter


def step(model: Any, adapters: list[Any], batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    logits = model(**batch).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    wanted = [p for adapter in adapters for p in adapter.parameters()]
    found = torch.autograd.grad((logits.float() * weights).sum(), wanted, allow_unused=True)
    return logits.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


def same(model: Any, adapters: list[Any], close: float = 2e-5, recompute: Any = "none", **options: Any) -> Fused:
    batch = inputs_for(model, **options)
    logits, gradients = step(model, adapters, batch)
    fused = fuse(model, recompute=recompute)
    try:
        own, own_gradients = step(model, adapters, batch)
    finally:
        fused_paths = {kind: list(paths) for kind, paths in fused.fused.items()}
        fused.undo()
        fused.fused = fused_paths
    assert float((own - logits).norm()) <= close * float(logits.norm())
    size = max(float(g.norm()) for g in gradients)
    for g, other in zip(own_gradients, gradients, strict=True):
        assert float((g - other).norm()) <= 3 * close * max(float(other.norm()), 0.02 * size)
    lanes = [lane_of(module) for module in model.modules() if "forward" in module.__dict__]
    assert all(lane is not None and lane.fused is None for lane in lanes)
    again, _ = step(model, adapters, batch)
    assert torch.equal(again, logits)
    return fused


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_lora_on_every_map(name: str) -> None:
    model = tiny(name)
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    fused = same(model, [adapter])
    assert fused.fused["linear"]
    if name in EXPECTED:
        assert {kind: len(paths) for kind, paths in fused.fused.items()} == EXPECTED[name], fused.left


@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=2,targets=attention)", "lora(rank=2,targets=ffn,bias=true)", "lora(rank=2,targets='query,up')",
        "pissa(rank=2,targets=all-linear)", "dora(rank=2,targets=all-linear)", "adalora(rank=4,target_rank=2)", "vera(rank=4)", "ia3",
        "bitfit", "bitfit(norms=true)", "norm", "series", "parallel", "prefix(length=3)", "prompt(length=3)",
        "sparse(fraction=0.1)", "full", "lora(rank=2)+ia3", "lora(rank=2,targets=all-linear)+bitfit(norms=true)",
        "mam", "lora(rank=2,targets=head)", "lora(rank=2,targets=all-linear,layers='-1:')",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_method(method: str, name: str) -> None:
    model = tiny(name)
    same(model, [shaken(model, method)])


@pytest.mark.parametrize("recompute", ["feedforward", "blocks"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_recomputing(name: str, recompute: str) -> None:
    model = tiny(name).train()
    same(model, [shaken(model, "lora(rank=3,targets=all-linear)")], recompute=recompute)


@pytest.mark.parametrize(("recompute", "least_bytes"), [("none", 2**24), ("feedforward", 2**20), ("blocks", 2**20)])
def test_who_has_parts_computed_again_gets_small_memory_back(
    recompute: Any, least_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(fusing, "give_back_large_memory", given.append)
    with fuse(tiny("llama"), recompute=recompute):
        assert given == [least_bytes]


def test_half_precision() -> None:
    model = tiny("llama").bfloat16()
    same(model, [shaken(model, "lora(rank=3,targets=all-linear)")], close=0.02)


def test_several_adapters_and_rows() -> None:
    model = tiny("llama")
    adapters = [shaken(model, "lora(rank=3,targets=all-linear)", "one"), shaken(model, "lora(rank=2)", "two")]
    for routing in (("one", "two"), "two", ["one", None, ("one", "two")]):
        use(model, routing)
        same(model, adapters)


def test_parts_of_fused_maps_stay_as_they_are() -> None:
    model = tiny("gpt2")
    same(model, [shaken(model, "lora(rank=2,targets='query,value')")])


def test_dropout_in_training_is_replayed_when_blocks_are_recomputed() -> None:
    model = tiny("llama").train()
    adapter = shaken(model, "lora(rank=3,targets=all-linear,dropout=0.5)")
    batch = inputs_for(model)
    found = []
    for recompute in ("none", "blocks"):
        with fuse(model, recompute=recompute):  # type: ignore[arg-type]
            torch.manual_seed(7)
            found.append(step(model, [adapter], batch))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)


def test_feed_forward_parts_with_dropout_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").train()
    adapter = shaken(model, "lora(rank=3,targets=all-linear,dropout=0.1)")
    own, calls = fusing.feed_forward, []
    with fuse(model):
        monkeypatch.setattr(fusing, "feed_forward", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
        step(model, [adapter], inputs_for(model))
    assert len(calls) == 2


def test_several_adapters_that_drop_entries_drop_them_in_feed_forward_parts_too() -> None:
    model = tiny("llama").train()
    adapters = [shaken(model, "lora(rank=3,targets=ffn,dropout=0.5)", name) for name in ("one", "two")]
    use(model, ("one", "two"))
    batch = inputs_for(model)
    with fuse(model):
        found = [step(model, adapters, batch)[0] for _ in range(2)]
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("method", "parts", "share"),
    [("dora(rank=2,targets=all-linear)", 2, 0.55), ("bitfit", 2, 0.75), ("ia3", 2, 0.75), ("lora(targets=all-linear)+ia3", 2, 0.7)],
)  # fmt: skip
def test_other_changes_of_feed_forward_parts_are_made_with_them(
    method: str, parts: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing falls back to the classes' own forwards, and less is kept."""
    model = tiny("llama")
    adapter = shaken(model, method)
    own, calls = fusing.feed_forward, []
    monkeypatch.setattr(fusing, "feed_forward", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    same(model, [adapter])
    assert len(calls) == parts + 2  # two of them where a part was checked
    before = kept_bytes(model, [adapter])
    with fuse(model):
        assert kept_bytes(model, [adapter]) <= share * before


def test_a_gain_next_to_zero_is_not_divided_by() -> None:
    model = tiny("llama")
    adapter = shaken(model, "dora(rank=2,targets=all-linear)")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "magnitude" in name:
                parameter[0] = 0
    same(model, [adapter])


def test_a_hook_on_a_map_is_called() -> None:
    model = tiny("llama")
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 2)
    same(model, [adapter])


def test_a_copy_has_its_own_deltas_and_a_fused_model_can_be_stored() -> None:
    model = tiny("llama")
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    batch = inputs_for(model)
    fuse(model)
    wanted, _ = step(model, [adapter], batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (own,) = graftlm.adapters(twin).values()
        assert torch.equal(step(twin, [own], batch)[0], wanted)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.zero_()
        assert not torch.allclose(step(twin, [own], batch)[0], wanted)
        assert torch.equal(step(model, [adapter], batch)[0], wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert", "bart", "t5"])
def test_padding(name: str, side: str) -> None:
    model = tiny(name)
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    batch = inputs_for(model, tokens=9)
    batch["attention_mask"][0, : 4 if side == "left" else None] = 0
    batch["attention_mask"][0, 4 if side == "left" else slice(5)] = 1
    if side == "right":
        batch["attention_mask"][0] = torch.tensor([1] * 5 + [0] * 4)
    real = batch["attention_mask"].bool() if not model.config.is_encoder_decoder else slice(None)

    def logits() -> Tensor:
        found = model(**batch).logits
        return found if found.dim() == 2 else found[real]

    wanted = logits()
    before = torch.autograd.grad(wanted.square().sum(), list(adapter.parameters()), allow_unused=True)
    with fuse(model):
        own = logits()
        after = torch.autograd.grad(own.square().sum(), list(adapter.parameters()), allow_unused=True)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    size = max(float(each.abs().max()) for each in before if each is not None)
    for one, other in zip(after, before, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * size)


def test_names_and_checkpoint_stay() -> None:
    model = tiny("llama")
    shaken(model, "lora(rank=3)")
    shown, keys = repr(model), list(model.state_dict())
    with fuse(model):
        assert repr(model) == shown
        assert list(model.state_dict()) == keys


def test_what_looks_alike_and_is_not_is_left_alone() -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    plain = type(mlp).forward

    class Strange(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return plain(self, x) + 1

    mlp.__class__ = Strange
    norm = model.model.norm
    with torch.no_grad():
        norm.weight[3] = 0  # what is multiplied by nothing cannot be had back
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    fused = same(model, [adapter])
    assert "model.layers.0.mlp" in fused.left
    assert len(fused.fused["feed-forward"]) == 1


def test_maps_that_hold_no_plain_weight_are_left_alone() -> None:
    class Packed(torch.nn.Module):
        def __init__(self, plain: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = plain.in_features, plain.out_features
            self.register_buffer("weight", plain.weight.detach().half())

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype))

    model = tiny("llama")
    for layer in model.model.layers:
        for part, names in ((layer.mlp, ("gate_proj", "up_proj", "down_proj")), (layer.self_attn, ("q_proj",))):
            for name in names:
                setattr(part, name, Packed(getattr(part, name)))
    fused = same(model, [shaken(model, "lora(rank=3,targets=all-linear)")])
    assert "feed-forward" not in fused.fused
    assert len(fused.fused["linear"]) == 6


def kept_bytes(model: Any, adapters: list[Any]) -> int:
    """What a training step keeps for its backward."""
    head = LossHead.of(model)
    assert head is not None
    batch = inputs_for(model, rows=4, tokens=32)
    parameters = [*model.parameters(), *(p for adapter in adapters for p in adapter.parameters())]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            sizes[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = head.losses(model, batch, batch["input_ids"])  # keeps what is kept, so that no place is used twice
    del held
    return sum(sizes.values())


@pytest.mark.parametrize("recompute", ["none", "feedforward"])
def test_less_is_kept(recompute: Any) -> None:
    model = tiny("llama")
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    before = kept_bytes(model, [adapter])
    with fuse(model, recompute=recompute):
        assert kept_bytes(model, [adapter]) <= (0.7 if recompute == "none" else 0.55) * before


# --- packed bases ---


@pytest.mark.parametrize("recompute", ["none", "feedforward", "blocks"])
@pytest.mark.parametrize(
    "method",
    ["lora(rank=3,targets=all-linear)", "ia3", "lora(rank=2,targets=all-linear)+ia3", "bitfit",
     "dora(rank=2,targets=all-linear)", "lora(rank=3,targets=all-linear)+sparse(fraction=0.05)"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_packed_maps_are_fused_alike(name: str, method: str, recompute: Any) -> None:
    model = quantize(tiny(name), "nf4" if name == "llama" else "int8")
    fused = same(model, [shaken(model, method)], recompute=recompute)
    if method == "lora(rank=3,targets=all-linear)":
        assert {kind: len(paths) for kind, paths in fused.fused.items()} == EXPECTED[name]


def test_packed_maps_in_half_precision() -> None:
    model = quantize(tiny("llama"), "nf4").bfloat16()
    same(model, [shaken(model, "lora(rank=3,targets=all-linear)")], close=3e-2)


def test_dropout_over_packed_maps_is_that_over_their_numbers() -> None:
    model = quantize(tiny("llama"), "nf4")
    plain = merged_copy(model, [], dtype=torch.float32)
    found = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(5)
        adapter = shaken(each, "lora(rank=3,targets=all-linear,dropout=0.5)")
        for recompute in ("none", "feedforward", "blocks"):
            with fuse(each, recompute=recompute):  # type: ignore[arg-type]
                torch.manual_seed(7)
                found.append(step(each, [adapter], inputs_for(each)))
    for logits, gradients in found[1:]:
        torch.testing.assert_close(logits, found[0][0])
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_numbers_merged_in_place_of_codes_are_left_to_the_map() -> None:
    model = quantize(tiny("llama"), "nf4")
    shaken(model, "lora(rank=2,targets=ffn)", "first").merge()
    same(model, [shaken(model, "lora(rank=3,targets=all-linear)", "second")])


@pytest.mark.parametrize("recompute", ["none", "feedforward"])
def test_less_is_kept_over_packed_maps(recompute: Any) -> None:
    model = quantize(tiny("llama"), "nf4")
    adapter = shaken(model, "lora(rank=3,targets=all-linear)")
    before = kept_bytes(model, [adapter])
    with fuse(model, recompute=recompute):
        assert kept_bytes(model, [adapter]) <= (0.75 if recompute == "none" else 0.6) * before
