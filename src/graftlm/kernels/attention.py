r"""Attention on a processor by blocks of queries, for training: the scores of a block at a time, made again backward.

    P = softmax(s Q K^T + mask),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - sum(dP P)),  dQ = s dS K,  dK = s dS^T Q

Keys behind a block's last query are left out where the mask is causal. Kept are Q, K and V; the scores are of the type
of Q, as in transformers' eager attention, with sums in float32. PyTorch's own kernel for processors takes longer, up to
twice as long in bfloat16 (its backward above all); on other devices it is the better one, and is called.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attention_forward", "block_bytes", "block_shapes", "blocked_attention", "plain_attention"]

_QUERIES = 64
#: The scores of a block take no more memory than this, so that they stay where they are used.
_BLOCK_BYTES = 1600 * 2**10


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Tensor:
    """The same as `blocked_attention` by PyTorch's own operation."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """O [rows, heads, tokens, width], laid out in memory as [rows, tokens, heads, width].

    `key` and `value` [rows, key-value heads, tokens, width] may have fewer heads. `causal` leaves out keys behind a
    query. `mask` [rows or 1, 1, tokens, tokens] is true where a query sees a key; each query must see one.
    """
    output: Tensor = _Blocked.apply(query, key, value, scale, causal, mask)  # type: ignore[no-untyped-call]
    return output


def block_bytes(query: Tensor, key: Tensor, *, backward: bool = False) -> int:
    """What a block holds at its highest moment in a call with such queries and keys; a plan counts with it."""
    blocks = _Blocks(query, key, 1.0, False, None)
    queries, pairs = min(_QUERIES, blocks.tokens), blocks.some * blocks.heads
    scores = pairs * blocks.shared * queries * blocks.tokens
    q, k = pairs * blocks.shared * queries * query.shape[3], pairs * blocks.tokens * key.shape[3]
    one = pairs == blocks.rows * blocks.kv_heads and queries == blocks.tokens
    if backward:  # with the last block's chances and gradient until they are replaced
        return (2 * q + 2 * k + max((3 if one else 4) * scores, 2 * scores + max(k, q))) * query.element_size()
    return (q + 2 * k + max(2 * scores, q + scores)) * query.element_size()


def block_shapes(query: Tensor, key: Tensor, causal: bool) -> int:
    """How many blocks of different shapes a call with such queries and keys has; a plan counts with it."""
    blocks = _Blocks(query, key, 1.0, causal, None)
    by_rows = 2 if blocks.rows % blocks.some else 1
    by_heads = 2 if blocks.kv_heads % blocks.heads else 1
    many = -(-blocks.tokens // _QUERIES)
    return by_rows * by_heads * (many if causal else min(many, 2 if blocks.tokens % _QUERIES else 1))


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
    ) -> Tensor:
        blocks = _Blocks(query, key, scale, causal, mask)
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        for block in blocks:
            q, k, v = block.queries(query), block.keys(key), block.keys(value)
            block.write(output, torch.bmm(block.chances(q, k), v))
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.causal = scale, causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        query, key, value, mask = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(each.shape, dtype=each.dtype) for each in (key, value))
        for block in _Blocks(query, key, ctx.scale, ctx.causal, mask):
            q, k, v, do = block.queries(query), block.keys(key), block.keys(value), block.queries(above)
            chances = block.chances(q, k)
            block.add(grad_value, torch.bmm(chances.mT, do))
            scores = torch._softmax_backward_data(torch.bmm(do, v.mT), chances, -1, chances.dtype)
            scores *= ctx.scale
            block.write(grad_query, torch.bmm(scores, k))
            block.add(grad_key, torch.bmm(scores.mT, q))
        return grad_query, grad_key, grad_value, None, None, None


class _Blocks:
    """The blocks that a call falls into: some rows, some of their key-value heads with their queries, some queries."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None) -> None:
        self.scale, self.causal, self.mask = scale, causal, mask
        self.rows, heads, self.tokens, _ = query.shape
        self.kv_heads = int(key.shape[1])
        self.shared = heads // self.kv_heads  # query heads a key-value head
        each = self.shared * min(_QUERIES, self.tokens) * self.tokens * query.element_size()
        self.heads = max(1, min(self.kv_heads, _BLOCK_BYTES // each))
        whole = self.heads == self.kv_heads
        self.some = max(1, min(self.rows, _BLOCK_BYTES // (each * self.heads))) if whole else 1

    def __iter__(self) -> Any:
        for row in range(0, self.rows, self.some):
            for head in range(0, self.kv_heads, self.heads):
                for start in range(0, self.tokens, _QUERIES):
                    yield _Block(self, slice(row, row + self.some), slice(head, head + self.heads), start)


class _Block:
    def __init__(self, all_of: _Blocks, rows: slice, heads: slice, start: int) -> None:
        self.all, self.rows, self.heads = all_of, rows, heads
        self.start, self.stop = start, min(start + _QUERIES, all_of.tokens)
        self.seen = self.stop if all_of.causal else all_of.tokens
        shared = all_of.shared
        self.query_heads = slice(heads.start * shared, heads.stop * shared)

    def queries(self, whole: Tensor) -> Tensor:
        """The block's part of [rows, heads, tokens, width], as [rows x key-value heads, shared x tokens, width]."""
        part = whole[self.rows, self.query_heads, self.start : self.stop]
        return part.reshape(-1, self.all.shared * part.shape[2], part.shape[3])

    def keys(self, whole: Tensor) -> Tensor:
        """What the block sees of keys or values, as [rows x key-value heads, tokens, width]."""
        return whole[self.rows, self.heads, : self.seen].flatten(0, 1)

    def write(self, whole: Tensor, part: Tensor) -> None:
        """The reverse of `queries`."""
        own = whole[self.rows, self.query_heads, self.start : self.stop]
        own.copy_(part.view(own.shape))

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add `part` where `keys` took from."""
        own = whole[self.rows, self.heads, : self.seen]
        own += part.view(own.shape)

    def chances(self, q: Tensor, k: Tensor) -> Tensor:
        """P [rows x key-value heads, shared x queries, keys]."""
        scores = torch.bmm(q * self.all.scale, k.mT)
        queries = self.stop - self.start
        by_query = scores.view(-1, self.all.shared, queries, self.seen)
        mask = self.all.mask
        if mask is not None:
            seen = mask[self.rows if mask.shape[0] > 1 else slice(None), 0, self.start : self.stop, : self.seen]
            rows = len(range(*self.rows.indices(self.all.rows)))
            by_query = by_query.view(rows, -1, queries, self.seen)
            by_query.masked_fill_(~seen[:, None], -torch.inf)
        elif self.all.causal:
            later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
            by_query[..., self.start :].masked_fill_(later, -torch.inf)
        return torch.softmax(scores, -1)


class _KnownMask:
    """What is known of the mask seen last: all layers of a stack share one."""

    def __init__(self) -> None:
        self.mask: weakref.ref[Tensor] | None = None
        self.found = (False, False)

    def of(self, mask: Tensor) -> tuple[bool, bool]:
        """Whether no query sees a later key, and whether every query sees some."""
        if self.mask is None or self.mask() is not mask:
            causal = not bool(mask.triu(1).any())
            self.mask, self.found = weakref.ref(mask), (causal, bool(mask.any(-1).all()))
        return self.found


_known = _KnownMask()


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> Any:
    """An attention function as transformers calls it: by blocks where that gives what `sdpa` gives, else `sdpa`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = attention_mask
    square = query.shape[2] == key.shape[2] and query.shape[2] > 1 and query.shape[1] % key.shape[1] == 0
    plain = not (args or kwargs.get("dropout") or kwargs.get("position_bias") is not None)
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    here = query.device.type in ("cpu", "meta")  # a plan counts the same in blocks without values
    if square and plain and trains and here and query.dtype == key.dtype == value.dtype:
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        fits = mask is None
        if mask is not None and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1:
            square = mask.shape[2:] == (query.shape[2], query.shape[2])
            causal, sees = _known.of(mask) if square else (False, False)
            fits = square and sees
        if fits:
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return blocked_attention(query, key, value, scale, causal, mask).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
