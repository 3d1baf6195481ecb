r"""A frozen normalisation that keeps its output, which the next map keeps anyway, instead of its input in float32.

    h = r (x - m) w + b,   r = 1 / sqrt(var + eps);   m and b only in layer norms

From h the normalised x is z = (h - b) / w, so that, with g = dL/dh and t = g w (both sums over the width d):

    dx = r (t - [mean(t)] - z mean(t z)),   t z = g (h - b)

The output is the module's own, bit for bit; kept are h and r, one number a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["frozen_norm", "invertible"]


def invertible(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether z can be had from h without losing digits: no entry of w next to zero, no shift far above it."""
    size = weight.detach().float().abs()
    least = float(size.min())
    if least <= 1e-3 * float(size.max()):
        return False
    return bias is None or float(bias.detach().float().abs().max()) <= 8 * least


def frozen_norm(
    x: Tensor, forward: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    """h [..., d] = `forward`(x), for x [..., d]; `weight` [d] is all that the normalised x is multiplied by."""
    h: Tensor = _FrozenNorm.apply(x, forward, weight, bias, eps, centred)  # type: ignore[no-untyped-call]
    return h


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, eps: float,
        centred: bool,
    ) -> Tensor:  # fmt: skip
        h = forward(x)
        width = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        if centred:
            rate = torch.rsqrt(x.to(wide).var(-1, keepdim=True, correction=0) + eps)
        else:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
            rate = torch.rsqrt(length.square_().div_(width) + eps)
        ctx.save_for_backward(h, rate, weight, bias)
        ctx.centred = centred
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        h, rate, weight, bias = ctx.saved_tensors
        h, wide = h.to(rate.dtype), weight.to(rate.dtype)
        if bias is not None:
            h = h - bias
        t = above.to(rate.dtype)
        share = (t * h).mean(-1, keepdim=True)
        t = t * wide
        if ctx.centred:
            t -= t.mean(-1, keepdim=True)
        t -= h.div_(wide).mul_(share) if bias is not None or above.dtype != rate.dtype else h / wide * share
        return t.mul_(rate).to(above.dtype), None, None, None, None, None
