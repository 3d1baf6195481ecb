"""A linear map whose weight is held in fewer bits: the one module of every format, and its arithmetic.

    y = W' x + b,   W' = dequantised W;   dL/dx = W'^T dL/dy;   W itself gets no gradient

The weight is dequantised some rows at a time in the type of `x`, and again in the backward pass: neither pass ever
holds a whole dense weight, and nothing but the packed one is kept between them. A format that rounds its inputs is
multiplied in whole numbers where the processor has the means (`dynamic`), and forward then dequantises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.quantisation import dynamic
from graftlm.quantisation.sources import Source
from graftlm.quantisation.storage import Format

__all__ = ["PACKED", "QuantizedLinear"]

#: Entries dequantised together: on a processor 2 MiB in float32, which its cache holds, elsewhere 16.
_ENTRIES_AT_ONCE, _ENTRIES_ELSEWHERE = 2**19, 2**22
#: Rows of bfloat16 that torch multiplies with bytes as they are, many times faster than with numbers made of them.
_FEW_ROWS = 4

#: The buffers that stand beside the codes, where a format has them.
PACKED = ("sizes", "outer", "offset", "sums")


class QuantizedLinear(nn.Module):
    """y = W x + b with W [out, in] packed as `format` says; made by `quantize`, or empty for loading.

    `weight` holds the codes; `sizes` (and `outer`, `offset`, `sums`) are buffers. Where a merge puts a weight of
    numbers in place of the codes, the module computes with that. `model.to(dtype)` changes the bias alone: sizes stay
    as they are.

    Example:
        >>> dense = nn.Linear(64, 32)
        >>> module = QuantizedLinear.of(dense, Format("nf4"))
        >>> module(torch.randn(2, 64)).shape, module.weight.dtype
        (torch.Size([2, 32]), torch.int8)
    """

    outer: Tensor | None
    offset: Tensor | None
    sums: Tensor | None
    sizes: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        across: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        #: The type that the weight had before, which merged weights are put in place with.
        self.dtype = dtype
        #: Whether the weight was stored [in, out] before (`Conv1D`).
        self.across = across
        #: Where the weight that was packed lies; None where it was packed in memory, or came packed.
        self.source: Source | None = None
        shapes = format.shapes(out_features, in_features)
        shape, kind = shapes["weight"]
        self.weight = nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False)
        for name in PACKED:
            empty = torch.empty(shapes[name][0], dtype=shapes[name][1]) if name in shapes else None
            self.register_buffer(name, empty)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)

    @classmethod
    def of(cls, module: nn.Module, format: Format) -> QuantizedLinear:
        """The quantised form of a `nn.Linear` or a `Conv1D` of transformers; the bias is shared with it."""
        across = not isinstance(module, nn.Linear)
        weight = _weight_of(module)
        weight = weight.T.contiguous() if across else weight
        bias: Any = module.bias
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], format, dtype=weight.dtype, across=across)
        made.put(format.pack(weight))
        made.bias = bias
        made.training = module.training
        return made

    def put(self, packed: dict[str, Tensor]) -> None:
        """Hold `packed`, as `Format.pack` gives it."""
        self.weight = nn.Parameter(packed["weight"], requires_grad=False)
        for name in PACKED:
            setattr(self, name, packed.get(name))

    def packed(self, weight: Tensor | None = None) -> dict[str, Tensor]:
        """What is held, by the names of `Format.pack`; `weight` in place of the module's own codes."""
        found = {"weight": self.weight if weight is None else weight}
        return found | {name: buffer for name in PACKED if (buffer := self._buffers[name]) is not None}

    @property
    def is_merged(self) -> bool:
        """Whether a weight of numbers stands in place of the codes."""
        return self.weight.is_floating_point()

    def dense_weight(self, weight: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a tensor [out, in] in `dtype`; of the codes `weight` in place of the module's own."""
        weight = self.weight if weight is None else weight
        if weight.is_floating_point():
            return weight
        shape = (self.out_features, self.in_features)
        if weight.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self.format.unpack(self.packed(weight), shape, dtype)

    def source_weight(self, held: Tensor | None = None) -> Tensor | None:
        """The weight that was packed, read again: float32 [out, in]; None where it is not to be had.

        `held` are the module's codes, where they lie elsewhere. Raises ModelError where its file has gone or holds
        another weight now.
        """
        held = self.weight if held is None else held
        if self.source is None or held.is_floating_point():
            return None
        weight = self.source.read()
        weight = weight.T.contiguous() if self.across else weight
        self.source.check(self.format.pack(weight.to(self.dtype))["weight"], held)
        return weight.float().to(held.device)

    def multiply(self, x: Tensor) -> Tensor:
        """W x for x [..., in], in the type of `x`, without autograd."""
        return _multiplied(x, self.format, (self.out_features, self.in_features), _in_order(self.packed()))

    def multiply_back(self, above: Tensor) -> Tensor:
        """W^T g for g = `above` [..., out], alike."""
        return _multiplied_back(above, self.format, (self.out_features, self.in_features), _in_order(self.packed()))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b for x of shape [..., in], in the type of `x`."""
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight.is_floating_point():
            return F.linear(x, self.weight.to(x.dtype), bias)
        packed = self.packed()
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.format, (self.out_features, self.in_features), *_in_order(packed)
        )
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        """What is printed of it."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Sizes follow the device, never the type: in 16 bits they would be others.
        kept = {name: self._buffers[name] for name in PACKED}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self


def _weight_of(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()


def _in_order(packed: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    return (packed["weight"], *(packed.get(name) for name in PACKED))


class _Product(torch.autograd.Function):
    """x W^T, for which nothing dense is kept; its gradient is that of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Format, shape: tuple[int, int], *stored: Tensor | None) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.format, ctx.shape = format, shape
        return _multiplied(x, format, shape, stored)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        stored = ctx.saved_tensors  # once: checkpointing computes them again for each look
        if not ctx.needs_input_grad[0]:
            return (None,) * (3 + len(stored))
        return (_multiplied_back(gradients[0], ctx.format, ctx.shape, stored), *((None,) * (2 + len(stored))))


def _multiplied(x: Tensor, format: Format, shape: tuple[int, int], stored: tuple[Tensor | None, ...]) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    codes, sizes, *_, sums = stored
    assert codes is not None
    assert sizes is not None
    if format.name == "int8" and len(flat) <= _FEW_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Reads the codes once and keeps no weight; sizes come after, as its own would be rounded to 16 bits.
        found = torch._weight_int8pack_mm(flat.contiguous(), codes, x.new_ones(shape[0])) * (sizes / 127)
        return found.to(x.dtype).view(*x.shape[:-1], shape[0])
    if format.rounds_inputs:
        assert sums is not None
        if dynamic.multiplied_in_integers(x.device.type) and shape[1] <= dynamic.LONGEST:
            return dynamic.multiply(flat, codes, sizes, sums).view(*x.shape[:-1], shape[0])
        x = dynamic.rounded_as_numbers(flat).view(x.shape)
    y: Tensor | None = None
    for rows, weight in _slabs(format, shape, stored, x.dtype):
        part = F.linear(x, weight)
        if len(weight) == shape[0]:
            y = part
        else:
            y = x.new_empty(*x.shape[:-1], shape[0]) if y is None else y
            y[..., rows] = part
    assert y is not None
    return y.mul_(sizes / 127) if _sizes_apart(format, x.dtype) else y


def _multiplied_back(
    above: Tensor, format: Format, shape: tuple[int, int], stored: tuple[Tensor | None, ...]
) -> Tensor:
    total: Tensor | None = None
    if _sizes_apart(format, above.dtype):
        assert stored[1] is not None
        above = (above * (stored[1] / 127)).to(above.dtype)
    for rows, weight in _slabs(format, shape, stored, above.dtype):
        part = above[..., rows] @ weight
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _sizes_apart(format: Format, dtype: torch.dtype) -> bool:
    """Whether slabs are the whole numbers as they are, exact in `dtype`, and what is narrower takes their sizes.

    In float16 what is not yet multiplied by them might be too large.
    """
    return format.by_rows and dtype in (torch.bfloat16, torch.float32)


def _slabs(
    format: Format, shape: tuple[int, int], stored: tuple[Tensor | None, ...], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The weight some rows at a time, each with the rows that it is; without sizes where these are taken apart."""
    names = ("weight", *PACKED)
    packed = {name: tensor for name, tensor in zip(names, stored, strict=True) if tensor is not None}
    rows, columns = shape
    together = format.rows_together(columns)
    most = _ENTRIES_AT_ONCE if packed["weight"].device.type in ("cpu", "meta") else _ENTRIES_ELSEWHERE
    pieces = max(round(rows * columns / most), 1)  # of one size: a short one costs as much as a long one
    step = -(-rows // (pieces * together)) * together
    apart, sizes = _sizes_apart(format, dtype), format.sizes(packed)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        if apart:
            yield slice(first, last), packed["weight"][first:last].to(dtype)
        else:
            yield slice(first, last), format.unpack_rows(packed, shape, dtype, first, last, sizes)
