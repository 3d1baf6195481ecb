"""Follows every tensor of a computation without values: bytes alive by kind, peaks by phase, operations.

A model on the meta device has shapes and no storage, so a step of any size runs on it in seconds. `Trace` sees each
operation below autograd, forward and backward, and counts the storages that are alive: those that autograd keeps for
the backward pass, and those that live for a moment only. Nothing is estimated by formula but the inside of attention,
which is counted as one operation: in blocks, as graftlm trains on a processor, or as torch's fused kernel.

Small tensors that decide shapes (labels, masks) may have values: they stay real, and meet the meta tensors here.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from graftlm.kernels import attention as blocks
from graftlm.planning.operations import BLOCKED, BLOCKED_BACKWARD, Operation, is_view, tensors, work

__all__ = ["Trace"]

_aten = torch.ops.aten
#: Operations that ask for a value, which a meta tensor does not have: a mask is told to hide nothing.
_READS = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is alive while it is entered; `vocabulary` tells logits from other activations by their width.

    `alive` are bytes by kind; `peaks` the largest sum seen in each phase, with its bytes by kind; `flops` the
    floating-point operations of matrix products and attention by phase (a multiplication and an addition are two);
    `operations` has by phase every operation that computes or moves something, and how often there was each.

    Example:
        >>> trace = Trace()
        >>> with trace, trace.phase("forward"):
        ...     x, w = torch.empty(4, 4, device="meta"), torch.empty(4, 8, device="meta")
        ...     y = x @ w
        >>> trace.peaks["forward"].total(), trace.flops["forward"]
        (320, 256)
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.flops: Counter[str] = Counter()
        self.operations: dict[str, Counter[Operation]] = defaultdict(Counter)
        self._phase = "rest"
        self._now = 0
        self._most: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int]] = {}
        self._attention = contextlib.ExitStack()

    def __enter__(self) -> Trace:
        self._attention.enter_context(_fused_attention())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._attention.close()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block counts for the phase `name`."""
        before, self._phase = self._phase, name
        self._see()
        try:
            yield
        finally:
            self._phase = before

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count `tensors` as alive, as of `kind`; those that are counted already change their kind."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                before, size = self._known[key]
                self.alive[before] -= size
                self.alive[kind] += size
                self._known[key] = (kind, size)
            else:
                self._enter(tensor, kind)
        self._see()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on shapes and count it."""
        del types
        kwargs = kwargs or {}
        leaves = tensors((*args, *kwargs.values()))
        meta = [leaf.is_meta for leaf in leaves]
        if func in _READS and any(meta):
            return func is not _aten.equal.default
        if func is _aten._to_copy.default and meta[0] and "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}  # to where the ids are: there are no values to move
        if any(meta) and not all(meta):
            args, kwargs = _joined(func, args, kwargs)
        out = _grouped(*args, **kwargs) if func in _GROUPED and any(meta) else func(*args, **kwargs)
        results = tensors((out,))
        self._work(func, args, kwargs, leaves, results, out)
        grown = [self._enter(result, self._kind_of(result)) for result in results]
        if any(grown):
            self._see()
        return out

    def _work(self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor], results: list[Tensor], out: Any) -> None:
        if is_view(func):
            return
        self.flops[self._phase] += work(func, args, kwargs, leaves, results, out)[0]
        self.operations[self._phase][Operation.of(func, args, kwargs, name=_name)] += 1

    def _kind_of(self, tensor: Tensor) -> str:
        is_logits = self.vocabulary is not None and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        return "logits" if is_logits else "activations"

    def _enter(self, tensor: Tensor, kind: str) -> bool:
        """Count the tensor's storage; False where it is counted already, as for a view."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return False
        self._known[key] = (kind, size)
        self.alive[kind] += size
        self._now += size
        weakref.finalize(storage, self._leave, key)
        return True

    def _leave(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.alive[kind] -= size
        self._now -= size

    def _see(self) -> None:
        """Keep the present state where it is the largest of its phase."""
        peak = self.peaks.get(self._phase)
        if peak is None or self._now > peak.total():
            self.peaks[self._phase] = +self.alive


def _joined(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with every real tensor as a meta tensor; a real mask that picks entries tells how many first."""
    if func in _INDEXED:
        picked: list[Tensor | None] = []
        for index in args[1]:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8) and not index.is_meta
            picked += index.nonzero(as_tuple=True) if masks else [index]
        args = (args[0], picked, *args[2:])
    moved = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf, args)
    return moved, tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, kwargs)


# --- attention ---


_torch_attention, _blocked_attention = F.scaled_dot_product_attention, blocks.blocked_attention


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Give attention of meta tensors the kernel that a processor takes; torch gives the plainest, which keeps more.

    Put in place of torch's own function, because a mode would be left out of what is recomputed in a backward pass.
    Tensors with values go to torch's own, so nothing else notices.
    """
    before, blocked = F.scaled_dot_product_attention, blocks.blocked_attention
    F.scaled_dot_product_attention, blocks.blocked_attention = _attention, _in_blocks
    try:
        yield
    finally:
        F.scaled_dot_product_attention, blocks.blocked_attention = before, blocked


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not query.is_meta:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does before it chooses
        hidden = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, hidden.new_zeros(()), hidden)
    fused = dropout_p == 0 and query.dim() == 4 and not (attn_mask is not None and attn_mask.requires_grad)
    if fused:
        out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    plain: Tensor = _aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return plain


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    if not query.is_meta:
        return _blocked_attention(query, key, value, scale, causal, mask)
    output: Tensor = _Blocked.apply(query, key, value, scale, causal)  # type: ignore[no-untyped-call]
    return output


class _Blocked(torch.autograd.Function):
    """What attention in blocks takes: queries, keys and values are kept, scores are there a block at a time."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.causal = scale, causal
        inside = _inside(query, key)
        with _named(BLOCKED):
            output: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, attn_mask=None, scale=scale
            )[0]
        del inside
        return output

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        inside = _inside(query, key, backward=True)
        output, sums = (query.new_empty(1).expand(shape) for shape in (query.shape, query.shape[:3]))
        with _named(BLOCKED_BACKWARD):
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                above, query, key, value, output, sums, 0.0, ctx.causal, attn_mask=None, scale=ctx.scale
            )
        del inside
        return (*(grad.view(like.shape) for grad, like in zip(grads, (query, key, value), strict=True)), None, None)


_name = ""


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What happens in the block is counted under that name: torch's operation stands for one of graftlm's own."""
    global _name
    before, _name = _name, name
    try:
        yield
    finally:
        _name = before


def _inside(query: Tensor, key: Tensor, *, backward: bool = False) -> Tensor:
    size = blocks.block_bytes(query, key, backward=backward)
    return torch.empty(size, dtype=torch.uint8, device=query.device)


# --- experts ---


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The product of grouped rows by their experts' weights: torch's own form without values takes bfloat16 only."""
    if a.dim() == 2 and b.dim() == 2 and offsets is not None:
        return a.new_empty(offsets.numel(), a.shape[0], b.shape[1])
    if a.dim() == 3 and b.dim() == 3:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(a.shape[-2], b.shape[-1])


_GROUPED = {_aten._grouped_mm.default}
