r"""A frozen linear map with a low-rank change as one operation, and its plain form.

    y = n (W x + s B A drop(x)) + b (+ s c),   n a gain for each output, one where there is none

The change is added in place into the base's product; A and B are cast down to the type of x, x is never cast up. Kept
for the backward are x, the narrow A x and nothing else: W gets no gradient, and a dropped-out x is made again from its
seed. With a gain the product z = W x + s B A x is kept too. Backward, with a = A x and g = dL/dy: dn = sum of g z over
tokens, then g <- n g, dB = s g^T a, dA = s (g B)^T x, dx = g W + s (g B) A, each product in the order that meets the
narrow side first (Cherniuk et al. 2023, "RunLoRA"; Hu et al. 2021, section 4.1). W may be packed: it is multiplied by
without being held as a whole (`core.storage.Packed`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graftlm.core import LowRank
from graftlm.core.storage import Packed
from graftlm.kernels.native import Unsigned, loops_for

__all__ = [
    "add_dropped", "add_low_rank", "back_low_rank", "dropped", "low_rank_linear", "new_seed", "plain_low_rank_linear",
    "summed", "times", "times_back",
]  # fmt: skip


def plain_low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, change: LowRank) -> Tensor:
    """The same as `low_rank_linear` by PyTorch's own operations, one after the other."""
    dropped = F.dropout(x, change.dropout) if change.dropout else x
    narrow = F.linear(dropped, change.down.to(x.dtype))
    y = F.linear(x, weight) + F.linear(narrow, change.up.to(x.dtype)) * change.scale
    if change.gain is not None:
        y = y * change.gain.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if change.bias is None else y + (change.scale * change.bias).to(x.dtype)


def low_rank_linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None, change: LowRank) -> Tensor:
    """y [..., out] for x [..., in], a frozen weight [out, in], a bias [out], and the change, in the type of x."""
    seed = new_seed() if change.dropout else 0
    plain, packed = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    y: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
        x, plain, bias, change.down, change.up, change.bias, change.gain, change.scale, change.dropout, seed, packed
    )
    return y


def times(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """W x + b for x [tokens, in], as a tensor of its own."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    y = weight.multiply(x)
    return y if bias is None else y.add_(bias)


def times_back(above: Tensor, weight: Tensor | Packed, into: Tensor | None = None) -> Tensor:
    """g W for g = `above` [tokens, out]; added to `into` in place, where that is given."""
    if isinstance(weight, Tensor):
        return above @ weight if into is None else into.addmm_(above, weight)
    found = weight.multiply_back(above)
    return found if into is None else into.add_(found)


def new_seed() -> int:
    """A seed out of PyTorch's own random numbers, so that a run, or a recomputed block, gives the same again."""
    return int(torch.randint(2**62, ()))


def dropped(x: Tensor, share: float, seed: int) -> Tensor:
    """x with `share` of its entries zero and the others scaled up, by `seed`; a new tensor.

    Sixteen bits are drawn for an entry, so the share is met to 1/65536, and what is kept is scaled by the share that is
    really kept. In the loops of `native` the bits follow from seed and place.
    """
    loops = loops_for(x)
    if loops is None:
        return x * _kept(x, share, seed)
    x = x.contiguous()
    found = torch.empty_like(x)
    loops.drop(x, found, x.numel(), seed, *_limit(share))
    return found


def add_dropped(y: Tensor, x: Tensor, share: float, seed: int) -> None:
    """Add x to y in place where `dropped` keeps an entry, scaled alike."""
    loops = loops_for(y, x)
    if loops is None:
        y.addcmul_(x, _kept(x, share, seed))
    else:
        loops.add_dropped(y, x, x.numel(), seed, *_limit(share))


def _limit(share: float) -> tuple[Unsigned, float]:
    """Below which of 2^16 numbers an entry is dropped, and what the others are multiplied by."""
    limit = round(share * 2**16)
    return Unsigned(limit), 1 / (1 - limit / 2**16)


def _kept(x: Tensor, share: float, seed: int) -> Tensor:
    """0 where an entry is dropped, 1 / (1 - share) elsewhere, in the type of x."""
    # A plan has no values, and no numbers to draw.
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    limit = round(share * 2**16)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= limit - 2**15
    return kept.to(x.dtype).mul_(1 / (1 - limit / 2**16))


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add s B A x to y [tokens, out] in place; returns the narrow A x [tokens, rank]."""
    narrow = x @ down.to(x.dtype).T
    y.addmm_(narrow, up.to(x.dtype).T, alpha=scale)
    return narrow


def back_low_rank(
    above: Tensor, narrow: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(s g B [tokens, rank], dA, dB) for g = `above` [tokens, out]; dA and dB in the types of A and B where needed."""
    back = (above @ up.to(above.dtype)).mul_(scale)
    grad_down = (back.T @ x).to(down.dtype) if needed[0] else None
    grad_up = (narrow.T @ above).mul_(scale).T.to(up.dtype) if needed[1] else None
    return back, grad_down, grad_up


def summed(above: Tensor, like: torch.dtype, scale: float = 1.0) -> Tensor:
    """The sum of `above` [tokens, out] over its tokens, made in the wider of the two types, in the type `like`."""
    return scale * above.sum(0, dtype=torch.promote_types(above.dtype, like)).to(like)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, down: Tensor, up: Tensor, shift: Tensor | None,
        gain: Tensor | None, scale: float, dropout: float, seed: int, packed: Packed | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        y = times(flat, weight if packed is None else packed, bias if gain is None else None)  # type: ignore[arg-type]
        read = dropped(flat, dropout, seed) if dropout else flat
        narrow = add_low_rank(y, read, down, up, scale)
        product = y if gain is not None and ctx.needs_input_grad[6] else None
        if gain is not None:
            y = y * gain.to(y.dtype) if product is not None else y.mul_(gain.to(y.dtype))
            if bias is not None:
                y += bias
        if shift is not None:
            y += (scale * shift).to(y.dtype)
        # x is read for the gradient of A alone.
        ctx.save_for_backward(flat if ctx.needs_input_grad[3] else None, narrow, weight, down, up, shift, gain, product)
        ctx.bias = None if bias is None else bias.dtype
        ctx.scale, ctx.dropout, ctx.seed, ctx.shape, ctx.packed = scale, dropout, seed, x.shape, packed
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        x, narrow, weight, down, up, shift, gain, product = ctx.saved_tensors
        above = above.reshape(-1, above.shape[-1])
        needs = ctx.needs_input_grad
        grad_bias = summed(above, ctx.bias) if needs[2] else None
        grad_shift = summed(above, shift.dtype, ctx.scale) if needs[5] else None
        grad_gain = summed(above * product, gain.dtype) if needs[6] else None
        del product
        if gain is not None:
            above = above * gain.to(above.dtype)
        read = dropped(x, ctx.dropout, ctx.seed) if ctx.dropout and x is not None else x
        back, grad_down, grad_up = back_low_rank(above, narrow, read, down, up, ctx.scale, (needs[3], needs[4]))
        grad_x = None
        if needs[0]:
            grad_x = times_back(above, weight if ctx.packed is None else ctx.packed)
            if ctx.dropout:
                add_dropped(grad_x, back @ down.to(back.dtype), ctx.dropout, ctx.seed)
            else:
                grad_x.addmm_(back, down.to(back.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_bias, grad_down, grad_up, grad_shift, grad_gain, None, None, None, None
