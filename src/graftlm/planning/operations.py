"""The operations of a step, each with the shapes, types and layouts of what it is given, so that it can be made again.

A step without values says which operations there will be; `Operation` is one of them as a plain value, `again` makes
it with values on a device, and `work` is how much there is of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from graftlm.kernels import attention as blocks

__all__ = [
    "BLOCKED", "BLOCKED_BACKWARD", "FUSED_BACKWARD", "Operation", "again", "forward_of", "given_tensors",
    "is_attention", "is_product", "is_view", "output_bytes", "smaller", "tensors", "work",
]  # fmt: skip

_aten = torch.ops.aten

#: Names of attention in blocks (`graftlm.kernels.attention`), which is many operations and is counted as one.
BLOCKED, BLOCKED_BACKWARD = "blocked_attention", "blocked_attention_backward"
#: Attention as one operation of torch's own; the backward pass is timed together with the forward.
_FUSED = "aten._scaled_dot_product_flash_attention_for_cpu.default"
FUSED_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"

_ATTENTION = {BLOCKED, BLOCKED_BACKWARD, _FUSED, FUSED_BACKWARD}

_LEAST_SIZE = 64  # smaller sizes are heads, groups or dimensions, not lengths that may be cut
_ENUMS = {torch.strided: "strided", torch.preserve_format: "preserve", torch.contiguous_format: "contiguous"}
_BY_NAME: dict[str, Any] = {name: value for value, name in _ENUMS.items()}


@dataclass(frozen=True)
class Operation:
    """One operation: `name` as torch has it, `given` its arguments as JSON, with sizes and strides for tensors.

    Example:
        >>> x = torch.ones(3, 4)
        >>> one = Operation.of(torch.ops.aten.mm.default, (x, x.t()), {})
        >>> one.name, again(one, "cpu")().shape
        ('aten.mm.default', torch.Size([3, 3]))
    """

    name: str
    given: str

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, *, name: str = "") -> Operation:
        """The operation that is this call of `func`."""
        return cls(name or str(func), json.dumps([_plain(args), _plain(kwargs)], separators=(",", ":")))


def work(func: Any, args: Any, kwargs: Any, leaves: list[Tensor], results: list[Tensor], out: Any) -> tuple[int, int]:
    """The floating-point operations of a product or of attention, and the bytes that any other operation moves.

    A multiplication and an addition are two operations; what only looks at its input in another way moves nothing.
    """
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)), 0
    if packet in _OTHER_FLOPS:
        return _OTHER_FLOPS[packet](*args), 0
    return 0, 0 if is_view(func) else sum(map(_bytes, (*leaves, *results)))


def is_attention(name: str) -> bool:
    """Whether the operation of that name is attention, forward or backward."""
    return name in _ATTENTION


def is_product(name: str) -> bool:
    """Whether the operation of that name is a product of matrices, plain or in a batch."""
    return name in _PRODUCTS


_PRODUCTS = {f"aten.{each}" for each in ("mm.default", "addmm.default", "bmm.default", "baddbmm.default",
                                         "addmm_.default", "mm.out", "addmm.out", "bmm.out")}  # fmt: skip


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an operation, those in lists too; `tree_flatten` takes longer."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            found += tensors(each)
    return found


@functools.cache
def is_view(func: Any) -> bool:
    """Whether the operation's result is another look at its input, so that nothing is moved."""
    return any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)


def again(operation: Operation, device: str) -> Callable[[], Any]:
    """What makes the operation once more, on tensors of the same shapes on `device`, each time on the same.

    Values are ones that no operation is slow or fails on: one, false, and the first entry for indices. Raises
    ValueError for an operation that is unknown here.
    """
    args, kwargs = (_built(each, device) for each in json.loads(operation.given))
    if operation.name in (BLOCKED, _FUSED):
        return _attention(operation.name, args, kwargs)
    if operation.name in (BLOCKED_BACKWARD, FUSED_BACKWARD):
        return _attention(operation.name, args[1:], kwargs, above=args[0])
    func = _function(operation.name)
    if operation.name == "aten.native_layer_norm_backward.default":  # without values its sums are told as float32
        args[3:5] = [each.to(args[1].dtype) for each in args[3:5]] if device == "cpu" else args[3:5]

    def call() -> Any:
        with torch.no_grad():
            return func(*args, **kwargs)

    return call


def _function(name: str) -> Any:
    """The operation of torch of that name. Raises ValueError where there is none."""
    func: Any = torch.ops
    for part in name.split("."):
        func = getattr(func, part, None)
    if func is None:
        raise ValueError(f"no operation {name}")
    return func


def _attention(name: str, args: Any, kwargs: Any, above: Tensor | None = None) -> Callable[[], Any]:
    """Attention forward; where there is a gradient from `above`, both ways."""
    query, key, value = args[:3]
    at = 4 if above is None else 6
    causal = bool(args[at]) if len(args) > at else False  # what is as by default is not told
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name in (BLOCKED, BLOCKED_BACKWARD):
            return blocks.blocked_attention(query, key, value, scale, causal)
        mask, shared = kwargs.get("attn_mask"), query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
        )

    def call() -> Any:
        if above is None:
            with torch.no_grad():
                return forward(query, key, value)
        with torch.enable_grad():
            inputs = [each.detach().requires_grad_() for each in (query, key, value)]
            return torch.autograd.grad(forward(*inputs), inputs, above)

    return call


def forward_of(operation: Operation) -> Operation | None:
    """Of attention's backward pass, what `again` makes besides it: the forward pass, to be taken away."""
    if operation.name not in (BLOCKED_BACKWARD, FUSED_BACKWARD):
        return None
    args, kwargs = json.loads(operation.given)
    name = BLOCKED if operation.name == BLOCKED_BACKWARD else _FUSED
    return Operation(name, json.dumps([[*args[1:4], args[6], args[7]], kwargs], separators=(",", ":")))


def given_tensors(operation: Operation) -> list[dict[str, Any]]:
    """The tensors that the operation is given: sizes as `t`, strides as `s`, the type as `d`."""
    found: list[dict[str, Any]] = []
    _visit(json.loads(operation.given), found.append)
    return found


def smaller(operation: Operation, most_flops: float, most_bytes: float) -> tuple[Operation, float]:
    """The operation with its longest dimensions halved until it has no more work than that; how much less it has.

    Example:
        >>> x = torch.empty(4096, 4096, device="meta")
        >>> less, share = smaller(Operation.of(torch.ops.aten.mm.default, (x, x), {}), 2 * 1024**3, 0)
        >>> again(less, "meta")().shape, share
        (torch.Size([1024, 1024]), 64.0)
    """
    whole = flops, moved = _work_of(operation)
    while flops > most_flops or moved > most_bytes:
        cut = _halved(operation)
        if cut is None:
            break
        try:
            flops, moved = _work_of(cut)
        except (RuntimeError, ValueError, IndexError):  # the halves do not fit together
            break
        operation = cut
    now = _work_of(operation)
    return operation, whole[0] / now[0] if now[0] else whole[1] / max(now[1], 1)


def output_bytes(operation: Operation) -> int:
    """The bytes of the largest tensor that the operation makes.

    Example:
        >>> output_bytes(Operation.of(torch.ops.aten.mm.default, (torch.ones(8, 4), torch.ones(4, 16)), {}))
        512
    """
    made = tensors((again(operation, "meta")(),))
    return max((tensor.numel() * tensor.itemsize for tensor in made), default=0)


def _work_of(operation: Operation) -> tuple[int, int]:
    args, kwargs = (_built(each, "meta") for each in json.loads(operation.given))
    if operation.name in (BLOCKED, _FUSED):
        return _attention_flops(*args[:3]), 0
    if operation.name in (BLOCKED_BACKWARD, FUSED_BACKWARD):
        return _attention_backward_flops(*args[:4]), 0
    func = _function(operation.name)
    out = func(*args, **kwargs)
    return work(func, args, kwargs, tensors((*args, *kwargs.values())), tensors((out,)), out)


def _halved(operation: Operation) -> Operation | None:
    """All sizes that are as long as the longest, halved; of attention rows, then tokens: its heads and width decide."""
    given = json.loads(operation.given)
    if operation.name in _ATTENTION and (rows := given[0][0]["t"][0]) > 1:
        for spec in [each for each in (*given[0], given[1]["kwargs"].get("attn_mask")) if isinstance(each, dict)]:
            if spec["t"][0] == rows:
                spec["t"][0] = rows // 2
        return Operation(operation.name, json.dumps(given, separators=(",", ":")))
    sizes: list[int] = []
    _visit(given, lambda spec: sizes.extend(spec["t"]))
    longest = max(sizes, default=0)
    if longest < 2 * _LEAST_SIZE:
        return None

    def cut(value: Any) -> Any:
        if isinstance(value, dict) and "t" in value:
            shape = [cut(size) for size in value["t"]]
            return {**value, "t": shape, "s": _strides(shape, value["s"])}
        if isinstance(value, dict):
            return {name: cut(each) for name, each in value.items()}
        if isinstance(value, list):
            return [cut(each) for each in value]
        return longest // 2 if type(value) is int and value == longest else value

    return Operation(operation.name, json.dumps(cut(given), separators=(",", ":")))


def _strides(shape: list[int], strides: list[int]) -> list[int]:
    """Dense strides in the order of the old ones; what was repeated stays so."""
    found, size = [0] * len(shape), 1
    for at in sorted(range(len(shape)), key=lambda at: (strides[at], -at)):
        if strides[at]:
            found[at] = size
            size *= shape[at]
    return found


def _visit(value: Any, see: Callable[[Any], None]) -> None:
    if isinstance(value, dict):
        if "t" in value:
            see(value)
            return
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _visit(each, see)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"t": list(value.shape), "s": list(value.stride()), "d": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": 0}
    if isinstance(value, (torch.layout, torch.memory_format)):
        return {"enum": _ENUMS.get(value, "preserve")}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {"kwargs": {name: _plain(each) for name, each in value.items()}}
    return value if isinstance(value, (bool, int, float, str)) or value is None else {"unknown": str(type(value))}


def _built(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_built(each, device) for each in value]
    if not isinstance(value, dict):
        return value
    if "t" in value:
        found = torch.empty_strided(value["t"], value["s"], dtype=getattr(torch, value["d"]), device=device)
        whole = found.as_strided((found.untyped_storage().nbytes() // found.element_size(),), (1,))
        whole.fill_(1 if found.dtype.is_floating_point else 0)
        return found
    if "kwargs" in value:
        return {name: _built(each, device) for name, each in value["kwargs"].items()}
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "device" in value:
        return torch.device(device)
    if "enum" in value:
        return _BY_NAME[value["enum"]]
    raise ValueError(f"an argument of {value['unknown']}")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- operations that torch does not count ---


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Scores and weighted sum: two products of all pairs; causal attention is counted in full, as torch counts it."""
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return int(2 * pairs * (query.shape[-1] + value.shape[-1]))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """The scores again, and the gradients of both products: five products of all pairs."""
    del grad
    return _attention_flops(query, key, value, *rest) * 5 // 2


def _grouped_flops(a: Tensor, b: Tensor, *_: Any) -> int:
    """Every row meets one expert."""
    experts = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return int(2 * experts * a.shape[-2] * a.shape[-1] * b.shape[-1])


def _whole_flops(a: Tensor, b: Tensor, *_: Any) -> int:
    """A product of whole numbers."""
    return int(2 * a.shape[0] * a.shape[1] * b.shape[1])


def _product_flops(_: Tensor, a: Tensor, b: Tensor) -> int:
    """A product added in place, which torch does not count."""
    return int(2 * a.shape[0] * a.shape[1] * b.shape[1])


_OTHER_FLOPS: dict[Any, Callable[..., int]] = {
    _aten.addmm_: _product_flops,
    _aten._int_mm: _whole_flops,
    _aten._grouped_mm: _grouped_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
