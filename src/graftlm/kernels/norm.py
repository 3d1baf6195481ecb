r"""A frozen normalisation that keeps its output, which the next map keeps anyway, instead of its input in float32.

    h = r (x - m) w + b,   r = 1 / sqrt(var + eps);   m and b only in layer norms

From h the normalised x is z = (h - b) / w, so that, with g = dL/dh and t = g w (both sums over the width d):

    dx = r (t - [mean(t)] - z mean(t z)),   t z = g (h - b)

Kept are h and r, one number a token. The output is the module's own, bit for bit; where it is a plain RMS norm that may
be made by `native`, it is so within a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels.native import loops_for

__all__ = ["frozen_norm", "invertible"]


def invertible(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether z can be had from h without losing digits: no entry of w next to zero, no shift far above it."""
    size = weight.detach().float().abs()
    least = float(size.min())
    if least <= 1e-3 * float(size.max()):
        return False
    return bias is None or float(bias.detach().float().abs().max()) <= 8 * least


def frozen_norm(
    x: Tensor, forward: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    *, native: bool = False,
) -> Tensor:  # fmt: skip
    """h [..., d] = `forward`(x), for x [..., d]; `weight` [d] is all that the normalised x is multiplied by.

    With `native` a norm without mean and bias may be made in one loop instead of by `forward`.
    """
    h: Tensor = _FrozenNorm.apply(x, forward, weight, bias, eps, centred, native)  # type: ignore[no-untyped-call]
    return h


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, eps: float,
        centred: bool, native: bool,
    ) -> Tensor:  # fmt: skip
        width = x.shape[-1]
        loops = loops_for(x, weight) if native and not centred and bias is None else None
        if loops is not None:
            x = x.contiguous()
            h, rate = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
            loops.rms_norm(x, weight, h, rate, x.numel() // width, width, float(eps))
            ctx.save_for_backward(h, rate, weight, None)
            ctx.centred = False
            return h
        h = forward(x).contiguous()
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
        loops = loops_for(above, h, weight, bias)
        if loops is not None:
            width, above = h.shape[-1], above.contiguous()
            found = torch.empty_like(above)
            loops.norm_back(above, h, rate, weight, bias, found, h.numel() // width, width, int(ctx.centred))
            return found, None, None, None, None, None, None
        h, wide = h.to(rate.dtype), weight.to(rate.dtype)
        if bias is not None:
            h = h - bias
        t = above.to(rate.dtype)
        share = (t * h).mean(-1, keepdim=True)
        t = t * wide
        if ctx.centred:
            t -= t.mean(-1, keepdim=True)
        t -= h.div_(wide).mul_(share) if bias is not None or above.dtype != rate.dtype else h / wide * share
        return t.mul_(rate).to(above.dtype), None, None, None, None, None, None
