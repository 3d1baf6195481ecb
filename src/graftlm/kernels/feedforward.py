r"""A frozen feed-forward part with low-rank changes as one operation, and its plain form.

    y = D(act(G x) * U x), or D(act(U x)) where there is no gate; G, U, D linear maps, each with its low-rank change

Kept for the backward are x and the outputs of G and U; the activation, the product and what D reads are made again.
With `recompute`, only x is kept, and G and U are made again too: a third of the forward more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graftlm.core import LowRank
from graftlm.kernels.linear import add_low_rank, back_low_rank, plain_low_rank_linear

__all__ = ["Map", "feed_forward", "plain_feed_forward"]

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Map:
    """A frozen linear map, weight [out, in] and bias [out], and the change that acts on it."""

    weight: Tensor
    bias: Tensor | None
    change: LowRank | None = None


def plain_feed_forward(x: Tensor, inner: Sequence[Map], down: Map, activation: Activation) -> Tensor:
    """The same as `feed_forward` by PyTorch's own operations, one after the other."""

    def through(x: Tensor, part: Map) -> Tensor:
        if part.change is None:
            return F.linear(x, part.weight, part.bias)
        return plain_low_rank_linear(x, part.weight, part.bias, part.change)

    product = activation(through(x, inner[0]))
    for other in inner[1:]:
        product = product * through(x, other)
    return through(product, down)


def feed_forward(
    x: Tensor, inner: Sequence[Map], down: Map, activation: Activation, *, recompute: bool = False
) -> Tensor:
    """y [..., out] for x [..., in]; `inner` is (gate, up), or (up,). Changes have neither dropout nor a bias."""
    maps = (*inner, down)
    scales = tuple(each.change.scale if each.change else 0.0 for each in maps)
    tensors: list[Tensor | None] = []
    for each in maps:
        change = each.change
        tensors += [each.weight, each.bias, change.down if change else None, change.up if change else None]
    y: Tensor = _FeedForward.apply(x, activation, recompute, scales, *tensors)  # type: ignore[no-untyped-call]
    return y


class _FeedForward(torch.autograd.Function):
    # Tensors come in fours, one a map: weight, bias, A, B.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, recompute: bool, scales: tuple[float, ...],
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        maps = _fours(tensors)
        wide, narrows = _inner(flat, maps[:-1], scales)
        product = activation(wide[0])
        for other in wide[1:]:
            product = product.mul_(other) if product is not wide[0] else product * other
        y, narrow = _mapped(product, maps[-1], scales[-1])
        # Of x only the gradients of the A inside, and what is made again, have need.
        reads_x = recompute or any(ctx.needs_input_grad[6 + 4 * at] for at in range(len(maps) - 1))
        ctx.save_for_backward(
            flat if reads_x else None, *([None] * len(wide) if recompute else wide), *narrows, narrow, *tensors
        )
        ctx.activation, ctx.scales, ctx.shape = activation, scales, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        count = len(ctx.scales)  # of maps
        saved = ctx.saved_tensors
        x, wide, narrows = saved[0], list(saved[1:count]), list(saved[count : 2 * count])
        maps, scales, needs = _fours(saved[2 * count :]), ctx.scales, ctx.needs_input_grad
        del saved
        above = above.reshape(-1, above.shape[-1])
        if wide[0] is None:
            wide = _inner(x, maps[:-1], scales, changed=narrows)[0]
        grads: list[Tensor | None] = [None] * (4 * count)

        with torch.enable_grad():
            first = wide[0].detach().requires_grad_()
            acted = ctx.activation(first)
        other = wide[1] if count == 3 else None
        weight, _, down, up = maps[-1]
        grad_product = above @ weight
        if down is not None:
            product = acted.detach() if other is None else acted.detach() * other
            needed = (needs[4 + 4 * count - 2], needs[4 + 4 * count - 1])
            back, grads[-2], grads[-1] = back_low_rank(above, narrows[-1], product, down, up, scales[-1], needed)
            del product
            grad_product.addmm_(back, down.to(back.dtype))
        grad_wide: list[Tensor] = []
        if other is None:
            grad_wide += torch.autograd.grad(acted, first, grad_product)
        else:
            grad_other = grad_product * acted.detach()
            grad_wide += torch.autograd.grad(acted, first, grad_product.mul_(other))
            grad_wide.append(grad_other)
        del acted, first, other, wide, grad_product

        grad_x: Tensor | None = None
        for at, each in enumerate(grad_wide):
            weight, _, down, up = maps[at]
            if needs[0]:
                grad_x = each @ weight if grad_x is None else grad_x.addmm_(each, weight)
            if down is not None:
                needed = (needs[4 + 4 * at + 2], needs[4 + 4 * at + 3])
                back, grads[4 * at + 2], grads[4 * at + 3] = back_low_rank(
                    each, narrows[at], x, down, up, scales[at], needed
                )
                if grad_x is not None:
                    grad_x.addmm_(back, down.to(back.dtype))
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *grads


def _fours(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any, Any]]:
    return [(tensors[at], tensors[at + 1], tensors[at + 2], tensors[at + 3]) for at in range(0, len(tensors), 4)]


def _mapped(x: Tensor, four: tuple[Any, Any, Any, Any], scale: float) -> tuple[Tensor, Tensor | None]:
    weight, bias, down, up = four
    y = F.linear(x, weight, bias)
    return y, None if down is None else add_low_rank(y, x, down, up, scale)


def _inner(
    x: Tensor, maps: Sequence[Any], scales: Sequence[float], changed: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs of the maps that read x, and their narrow products, which `changed` has already."""
    wide: list[Tensor] = []
    narrows: list[Tensor | None] = []
    for at, (each, scale) in enumerate(zip(maps, scales, strict=False)):
        narrow = None if changed is None else changed[at]
        if narrow is None:
            y, narrow = _mapped(x, each, scale)
        else:
            weight, bias, _, up = each
            y = F.linear(x, weight, bias).addmm_(narrow, up.to(x.dtype).T, alpha=scale)
        wide.append(y)
        narrows.append(narrow)
    return wide, narrows
