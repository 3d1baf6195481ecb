"""Every fused operation gives what its plain form gives: values, and gradients of everything that is trained."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import LowRank
from graftlm.kernels import (
    Map,
    attention,
    blocked_attention,
    feed_forward,
    low_rank_linear,
    plain_attention,
    plain_feed_forward,
    plain_low_rank_linear,
)
from graftlm.kernels.linear import dropped
from graftlm.kernels.native import why_not, without_loops
from graftlm.kernels.norm import frozen_norm, invertible


@pytest.fixture(autouse=True, params=["native", "torch"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test with the loops of native.c and without."""
    if request.param == "native":
        if why_not():
            pytest.skip(why_not())
        yield
    else:
        with without_loops():
            yield


def change(
    width_in: int, width_out: int, rank: int = 3, shift: bool = False, kind: torch.dtype = torch.float32,
    gain: bool = False,
) -> LowRank:  # fmt: skip
    def drawn(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, dtype=kind)).requires_grad_()

    n = (1 + 0.3 * torch.rand(width_out, dtype=kind)).requires_grad_() if gain else None
    return LowRank(drawn(rank, width_in), drawn(width_out, rank), 1.7, 0.0, drawn(width_out) if shift else None, n)


def tensors_of(*changes: LowRank | None) -> list[Tensor]:
    return [t for c in changes if c is not None for t in (c.down, c.up, c.bias, c.gain) if t is not None]


def compare(fused: Tensor, plain: Tensor, wanted: list[Tensor], close: float, close_gradient: float) -> None:
    """Outputs and gradients, relative to the size of each."""
    above = torch.randn_like(plain)
    ours = torch.autograd.grad(fused, wanted, above)
    theirs = torch.autograd.grad(plain, wanted, above)
    assert float((fused - plain).detach().norm()) <= close * float(plain.detach().norm())
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        assert float((own - other).norm()) <= close_gradient * float(other.norm()) + 1e-12


@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_a_linear_map(kind: torch.dtype, close: float, shift: bool, gain: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=kind).requires_grad_()
    weight, bias = torch.randn(9, 12, dtype=kind), torch.randn(9, dtype=kind)
    trained = torch.randn(9, dtype=torch.promote_types(kind, torch.float32)).to(kind).requires_grad_()
    own = change(12, 9, shift=shift, gain=gain, kind=torch.promote_types(kind, torch.float32))
    for b in (None, bias, trained):
        fused, plain = low_rank_linear(x, weight, b, own), plain_low_rank_linear(x, weight, b, own)
        compare(fused, plain, [x, *tensors_of(own), *([b] if b is trained else [])], close, 2 * close)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
def test_a_feed_forward_part(gated: bool, recompute: bool, kind: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=kind).requires_grad_()
    shapes = [(12, 20), (12, 20), (20, 12)] if gated else [(12, 20), (20, 12)]
    for adapted in itertools.product([False, True], repeat=len(shapes)):
        changes = [change(*shape) if a else None for shape, a in zip(shapes, adapted, strict=True)]
        maps = [
            Map(torch.randn(out, into, dtype=kind) / into**0.5, torch.randn(out, dtype=kind) if at else None, own)
            for at, ((into, out), own) in enumerate(zip(shapes, changes, strict=True))
        ]
        for activation in (F.silu, F.gelu, nn.GELU(approximate="tanh").forward, nn.SiLU().forward):
            fused = feed_forward(x, maps[:-1], maps[-1], activation, recompute=recompute)
            plain = plain_feed_forward(x, maps[:-1], maps[-1], activation)
            compare(fused, plain, [x, *tensors_of(*changes)], close, 3 * close)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_a_feed_forward_part_with_gains_biases_and_a_scaling(
    gated: bool, recompute: bool, kind: torch.dtype, close: float
) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(kind, torch.float32)
    x = torch.randn(2, 5, 12, dtype=kind).requires_grad_()
    shapes = [(12, 20), (12, 20), (20, 12)] if gated else [(12, 20), (20, 12)]
    for adapted in itertools.product([None, False, True], repeat=len(shapes)):  # nothing, a change, one with a gain
        for trained, scaled in itertools.product([False, True], repeat=2):
            changes = [
                None if a is None else change(*shape, gain=a, kind=wide)
                for shape, a in zip(shapes, adapted, strict=True)
            ]
            biases = [torch.randn(out, dtype=kind).requires_grad_(trained) for _, out in shapes]
            scaling = (1 + torch.rand(20, dtype=wide)).requires_grad_() if scaled else None
            maps = [
                Map(torch.randn(out, into, dtype=kind) / into**0.5, bias if trained or at != 1 else None, own,
                    scaling if at == len(shapes) - 1 else None)
                for at, ((into, out), own, bias) in enumerate(zip(shapes, changes, biases, strict=True))
            ]  # fmt: skip
            fused = feed_forward(x, maps[:-1], maps[-1], F.silu, recompute=recompute)
            plain = plain_feed_forward(x, maps[:-1], maps[-1], F.silu)
            wanted = [x, *tensors_of(*changes), *(biases if trained else []), *([scaling] if scaled else [])]
            compare(fused, plain, wanted, close, 2 * close)


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    kind = torch.float64
    x = torch.randn(4, 6, dtype=kind, requires_grad=True)
    one, two, three = (change(*shape, rank=2, kind=kind) for shape in ((6, 5), (6, 5), (5, 6)))
    weights = [torch.randn(out, into, dtype=kind) for into, out in ((6, 5), (6, 5), (5, 6))]

    def linear(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return low_rank_linear(x, weights[0], None, LowRank(down, up, 0.5))

    def gated(x: Tensor, *flat: Tensor) -> Tensor:
        maps = [Map(w, None, LowRank(flat[2 * i], flat[2 * i + 1], 0.5)) for i, w in enumerate(weights)]
        return feed_forward(x, maps[:-1], maps[-1], F.silu)

    def gained(x: Tensor, scaling: Tensor, *flat: Tensor) -> Tensor:
        maps = [
            Map(w, flat[4 * i + 3], LowRank(flat[4 * i], flat[4 * i + 1], 0.5, gain=flat[4 * i + 2]))
            for i, w in enumerate(weights)
        ]
        y = feed_forward(x, maps[:-1], dataclasses.replace(maps[-1], scaling=scaling), F.silu)
        own = maps[0].change
        assert own is not None
        return y.sum(1, keepdim=True) * low_rank_linear(x, weights[0], flat[3], own)

    flat = []
    for into, out in ((6, 5), (6, 5), (5, 6)):
        own = change(into, out, rank=2, kind=kind, gain=True)
        flat += [*tensors_of(own), torch.randn(out, dtype=kind, requires_grad=True)]
    assert torch.autograd.gradcheck(gained, (x, torch.rand(5, dtype=kind, requires_grad=True), *flat))

    scale, shift = torch.rand(6, dtype=kind) + 0.5, torch.randn(6, dtype=kind)

    def norm(x: Tensor) -> Tensor:
        return frozen_norm(x, lambda z: F.layer_norm(z, (6,), scale, shift, 1e-5), scale, shift, 1e-5, True)

    assert torch.autograd.gradcheck(linear, (x, one.down, one.up))
    assert torch.autograd.gradcheck(gated, (x, *tensors_of(one, two, three)))
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm(kind: torch.dtype, close: float, centred: bool) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 16, dtype=kind) + 1).requires_grad_()
    weight, bias = torch.rand(16, dtype=kind) + 0.5, torch.randn(16, dtype=kind) if centred else None

    def own(z: Tensor) -> Tensor:
        if centred:
            return F.layer_norm(z, (16,), weight, bias, 1e-5)
        return F.rms_norm(z, (16,), weight, 1e-5)

    for native in (False, True):
        fused = frozen_norm(x, own, weight, bias, 1e-5, centred, native=native)
        assert native or torch.equal(fused, own(x))
        compare(fused, own(x), [x], close, 2 * close)
    assert invertible(weight, bias)
    weight[3] = 0
    assert not invertible(weight, bias)


@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(4, 4, 130), (4, 2, 70), (4, 1, 9)])
def test_attention(
    kind: torch.dtype, close: float, masked: bool, causal: bool, heads: int, kv_heads: int, tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, tokens, 16, dtype=kind).requires_grad_() for n in (heads, kv_heads, kv_heads))
    mask = None
    if masked:
        mask = torch.rand(3, 1, tokens, tokens) > 0.3
        mask = (mask.tril() if causal else mask) | torch.eye(tokens, dtype=torch.bool)
    for least in (attention._BLOCK_BYTES, 1, 64 * tokens * 8 * 8):
        monkeypatch.setattr(attention, "_BLOCK_BYTES", least)
        fused = blocked_attention(q, k, v, 0.3, causal, mask)
        plain = plain_attention(q, k, v, 0.3, causal and mask is None, mask)
        compare(fused, plain, [q, k, v], close, 2 * close)


def test_dropout_drops_its_share_and_is_replayed() -> None:
    x = torch.ones(400, 300)
    found = dropped(x, 0.3, 5)
    assert torch.equal(found, dropped(x, 0.3, 5))
    assert not torch.equal(found, dropped(x, 0.3, 6))
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
    assert found.unique().numel() == 2


def test_the_gradient_with_dropout_is_that_of_the_mask() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    own = change(8, 5, kind=torch.float64)
    own = LowRank(own.down, own.up, own.scale, 0.5, None)
    weight = torch.randn(5, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    fused = low_rank_linear(x, weight, None, own)
    torch.set_rng_state(state)
    mask = dropped(torch.ones_like(x), 0.5, int(torch.randint(2**62, ())))
    plain = x @ weight.T + own.scale * ((x * mask) @ own.down.T) @ own.up.T
    compare(fused, plain, [x, own.down, own.up], 1e-12, 1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_a_feed_forward_part_in_which_each_change_drops_entries_by_itself(
    gated: bool, recompute: bool, kind: torch.dtype, close: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 12, dtype=kind).requires_grad_()
    shapes = [(12, 20), (12, 20), (20, 12)] if gated else [(12, 20), (20, 12)]
    scaling = 1 + torch.rand(20, dtype=kind)
    maps = [
        Map(torch.randn(out, into, dtype=kind) / into**0.5, None,
            dataclasses.replace(change(into, out, kind=torch.promote_types(kind, torch.float32)), dropout=share),
            scaling if at == len(shapes) - 1 else None)
        for at, ((into, out), share) in enumerate(zip(shapes, (0.5, 0.3, 0.4), strict=False))
    ]  # fmt: skip
    state = torch.get_rng_state()
    fused = feed_forward(x, maps[:-1], maps[-1], F.silu, recompute=recompute)
    torch.set_rng_state(state)
    seeds = [int(torch.randint(2**62, ())) for _ in maps]

    def through(z: Tensor, at: int) -> Tensor:
        own, seed = maps[at].change, seeds[at]
        assert own is not None
        mask = dropped(torch.ones_like(z.detach()).flatten(0, 1), own.dropout, seed).view(z.shape)
        return z @ maps[at].weight.T + own.scale * ((z * mask) @ own.down.to(kind).T) @ own.up.to(kind).T

    product = F.silu(through(x, 0))
    if gated:
        product = product * through(x, 1)
    plain = through(product * scaling, len(maps) - 1)
    compare(fused, plain, [x, *tensors_of(*(each.change for each in maps))], close, 2 * close)
    assert not torch.equal(feed_forward(x, maps[:-1], maps[-1], F.silu), fused)


def test_what_is_kept_for_the_backward() -> None:
    tokens, width, inner = 64, 32, 96
    x = torch.randn(tokens, width, requires_grad=True)
    maps = [
        Map(torch.randn(out, into), None, change(into, out))
        for into, out in ((width, inner), (width, inner), (inner, width))
    ]
    weights = {each.weight.data_ptr() for each in maps} | {t.data_ptr() for t in tensors_of(*(m.change for m in maps))}

    def kept(recompute: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            feed_forward(x, maps[:-1], maps[-1], F.silu, recompute=recompute)
        return sum(sizes.values())

    narrow = 3 * 3 * tokens
    assert kept(False) == tokens * (width + 2 * inner) + narrow
    assert kept(True) == tokens * width + narrow


def test_layers_of_torch_are_not_changed_by_the_operations() -> None:
    layer = nn.Linear(6, 4)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 6, requires_grad=True)
    low_rank_linear(x, layer.weight.detach(), layer.bias.detach(), change(6, 4)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
