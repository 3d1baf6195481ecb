r"""Attention on a processor by blocks of queries, for training: the scores of a block at a time, made again backward.

    P = softmax(s Q K^T + mask),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - sum(dP P)),  dQ = s dS K,  dK = s dS^T Q

Keys behind a block's last query are left out where the mask is causal. Kept are Q, K and V; the scores are of the type
of Q, as in transformers' eager attention, with sums in float32. PyTorch's own kernel for processors takes longer, up to
twice as long in bfloat16 (its backward above all); on other devices it is the better one, and is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels.native import MOST_KEYS, loops_for

__all__ = ["attention_forward", "block_bytes", "block_shapes", "blocked_attention", "plain_attention"]

_QUERIES = 128
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
    """What a block holds at most in a call with such queries and keys, without the loops; a plan counts with it."""
    blocks = _Blocks(query, key, 1.0, False, None)
    queries, pairs = min(_QUERIES, blocks.tokens), blocks.some * blocks.heads
    scores = pairs * blocks.shared * queries * blocks.tokens
    q, k = pairs * blocks.shared * queries * query.shape[3], pairs * blocks.tokens * key.shape[3]
    if backward:  # queries and what comes from above; keys, values and their gradients; chances and their gradients
        return (2 * q + 4 * k + 3 * scores) * query.element_size()
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
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        for group in _Blocks(query, key, scale, causal, mask):
            keys, values = group.whole(key), group.whole(value)
            for block in group:
                chances = block.chances(block.queries(query), block.seen_of(keys))
                block.write(output, torch.bmm(chances, values[:, : block.seen]))
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.causal = scale, causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        query, key, value, mask = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(each) for each in (query, key, value))
        for group in _Blocks(query, key, ctx.scale, ctx.causal, mask):
            keys, values = group.whole(key), group.whole(value)
            to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in group:
                seen = block.seen_of(keys)
                q, do = block.queries(query), block.queries(above)
                chances = block.chances(q, seen)
                to_values[:, : block.seen].baddbmm_(chances.mT, do)
                scores = block.scores_back(torch.bmm(do, block.seen_of(values).mT), chances)
                block.write(grad_query, torch.bmm(scores, seen))
                to_keys[:, : block.seen].baddbmm_(scores.mT, q)
                del chances, scores, seen
            group.write(grad_key, to_keys)
            group.write(grad_value, to_values)
        return grad_query, grad_key, grad_value, None, None, None


class _Blocks:
    """The groups that a call falls into, each some rows and some of their key-value heads with their queries."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None) -> None:
        self.scale, self.causal = scale, causal
        # Loops take a row of the mask as it lies in memory.
        self.mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
        self.rows, heads, self.tokens, _ = query.shape
        self.kv_heads = int(key.shape[1])
        self.shared = heads // self.kv_heads  # query heads a key-value head
        self.loops = loops_for(query) if query.device.type == "cpu" and self.tokens <= MOST_KEYS else None
        each = self.shared * min(_QUERIES, self.tokens) * self.tokens * query.element_size()
        self.heads = max(1, min(self.kv_heads, _BLOCK_BYTES // each))
        whole = self.heads == self.kv_heads
        self.some = max(1, min(self.rows, _BLOCK_BYTES // (each * self.heads))) if whole else 1

    def __iter__(self) -> Iterator[_Group]:
        for row in range(0, self.rows, self.some):
            for head in range(0, self.kv_heads, self.heads):
                yield _Group(self, slice(row, row + self.some), slice(head, head + self.heads))


class _Group:
    """Some rows and key-value heads; iterated, the blocks of its queries."""

    def __init__(self, all_of: _Blocks, rows: slice, heads: slice) -> None:
        self.all, self.rows, self.heads = all_of, rows, heads

    def __iter__(self) -> Iterator[_Block]:
        for start in range(0, self.all.tokens, _QUERIES):
            yield _Block(self.all, self.rows, self.heads, start)

    def whole(self, tensor: Tensor) -> Tensor:
        """The group's keys or values as [rows x key-value heads, tokens, width], in one piece."""
        return tensor[self.rows, self.heads].flatten(0, 1).contiguous()

    def write(self, tensor: Tensor, part: Tensor) -> None:
        """The reverse of `whole`."""
        own = tensor[self.rows, self.heads]
        own.copy_(part.view(own.shape))


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

    def seen_of(self, keys: Tensor) -> Tensor:
        """What the block sees of its group's keys or values; in one piece, which products of bfloat16 want."""
        return keys[:, : self.seen].contiguous()

    def write(self, whole: Tensor, part: Tensor) -> None:
        """The reverse of `queries`."""
        own = whole[self.rows, self.query_heads, self.start : self.stop]
        own.copy_(part.view(own.shape))

    def chances(self, q: Tensor, k: Tensor) -> Tensor:
        """P [rows x key-value heads, shared x queries, keys]."""
        mask, loops = self.all.mask, self.all.loops
        queries, causal = self.stop - self.start, self.all.causal and self.all.mask is None
        if loops is not None:
            scores = torch.bmm(q, k.mT)
            rows = scores.shape[0] * scores.shape[1]
            beyond: tuple[Any, ...] = (None, 1, 0, 0)
            if mask is not None:
                own = mask[self.rows if mask.shape[0] > 1 else slice(None), 0, self.start :]
                by_row = own.stride(0) if mask.shape[0] > 1 else 0
                beyond = (own.data_ptr(), rows // len(range(*self.rows.indices(self.all.rows))), by_row, own.stride(1))
            start = self.start if causal else -1
            loops.softmax(scores, rows, self.seen, queries, start, float(self.all.scale), *beyond)
            return scores
        scores = torch.bmm(q * self.all.scale, k.mT)
        by_query = scores.view(-1, self.all.shared, queries, self.seen)
        if mask is not None:
            seen = mask[self.rows if mask.shape[0] > 1 else slice(None), 0, self.start : self.stop, : self.seen]
            rows = len(range(*self.rows.indices(self.all.rows)))
            by_query = by_query.view(rows, -1, queries, self.seen)
            by_query.masked_fill_(~seen[:, None], -torch.inf)
        elif causal:
            later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
            by_query[..., self.start :].masked_fill_(later, -torch.inf)
        return torch.softmax(scores, -1)

    def scores_back(self, above: Tensor, chances: Tensor) -> Tensor:
        """The gradient of the products of queries and keys for that of P; may take the place of `above`."""
        if self.all.loops is None:
            scores = torch._softmax_backward_data(above, chances, -1, chances.dtype)
            return scores.mul_(self.all.scale)
        rows, start = above.shape[0] * above.shape[1], self.start if self.all.causal and self.all.mask is None else -1
        queries = self.stop - self.start
        self.all.loops.softmax_back(above, chances, rows, self.seen, queries, start, float(self.all.scale))
        return above


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
