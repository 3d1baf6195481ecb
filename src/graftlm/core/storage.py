"""Stored weights: the weight behind a linear-like module as a tensor, whatever it is stored as, and its count.

A base's weight may be packed (4 bits), a tensor of another library, or lie elsewhere (offloaded to disk). A delta asks
for it here and never looks at the storage. What holds a packed weight says what it is by a method `dense_weight`; for
modules of other libraries a reader is entered with `read_storage`; of what nobody knows, the module is asked itself,
by running it on the rows of the identity. A packed map that can be multiplied by without autograd, forward and back,
says so by the methods of `Packed`: operations that make its product together with a change need no more of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from graftlm.core.lane import plain_forward
from graftlm.core.sites import linear_kind

__all__ = [
    "Packed",
    "dense",
    "fetched",
    "is_across",
    "is_offloaded",
    "is_packed",
    "parameter_count",
    "plain_weight",
    "read_storage",
    "source_weight",
    "turned",
]

_ROWS_AT_ONCE = 1024


@runtime_checkable
class Packed(Protocol):
    """A packed weight W [out, in] as something to multiply by; neither method keeps anything or has a gradient."""

    def multiply(self, x: Tensor) -> Tensor:
        """W x for x [..., in], in the type of `x`."""

    def multiply_back(self, above: Tensor) -> Tensor:
        """W^T g for g = `above` [..., out]."""


_readers: dict[str, Callable[[nn.Module], Tensor]] = {}


def read_storage(class_name: str, reader: Callable[[nn.Module], Tensor]) -> None:
    """Have `reader` give the dense weight [out, in] of modules of the class of that name, of another library."""
    _readers[class_name] = reader


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a linear-like module is stored otherwise than as its numbers."""
    if linear_kind(module) != "linear":
        return False
    if hasattr(module, "dense_weight"):
        return True  # also while a merged weight stands in place of the codes
    weight = module._parameters.get("weight")
    return weight is None or not weight.is_floating_point() or not _is_plain(weight)


def fetched(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The parameter `name` of a module; from the disk or other memory where it lies there (accelerate's hooks)."""
    found = module._parameters.get(name)
    if found is None or not found.is_meta:
        return found
    hook = getattr(module, "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        if (elsewhere := getattr(each, "weights_map", None)) is not None:
            stored: Tensor = elsewhere[name]
            return stored
    return found


def dense(module: nn.Module, stored: Tensor | None = None) -> Tensor:
    """The weight of a linear-like module as numbers, in the layout that it computes in; [out, in] where it was packed.

    `stored` is taken in place of the module's own `weight` (the one before a merge).
    """
    weight = fetched(module) if stored is None else stored
    of_module = getattr(module, "dense_weight", None)
    if of_module is not None:
        found: Tensor = of_module(weight)
        return found
    lies_elsewhere = weight is None or (weight.is_meta and is_offloaded(module))
    if not lies_elsewhere and weight is not None and weight.is_floating_point() and _is_plain(weight):
        return weight
    with torch.no_grad():
        reader = _readers.get(type(module).__name__)
        if reader is not None and not lies_elsewhere:
            return reader(module)
        if not lies_elsewhere and weight is not None and not _is_plain(weight):
            return weight.dequantize()
        return _asked(module)


def is_across(module: nn.Module) -> bool:
    """Whether the weight of a linear map is [in, out] where it is held as numbers (`Conv1D`), packed or not."""
    # What bitsandbytes' maps were made of, as transformers notes it.
    packed_from = getattr(getattr(module, "source_cls", None), "__name__", "")
    return linear_kind(module) == "conv1d" or bool(getattr(module, "across", False)) or packed_from == "Conv1D"


def turned(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of the map from the layout in which it is packed to that in which numbers are held, or back.

    The same where nothing is packed, and where both layouts are [out, in].
    """
    return weight.T if is_packed(module) and is_across(module) else weight


def plain_weight(module: nn.Module, stored: Tensor | None = None) -> Tensor:
    """The weight of a linear map as numbers, in the layout in which these are held where nothing is packed.

    So an entry has one place in it whatever the storage; `stored` is as for `dense`.
    """
    return turned(module, dense(module, stored))


def source_weight(module: nn.Module) -> Tensor | None:
    """The weight [out, in] that a packed module's own stands for, before it was packed; None where it is not known.

    What can read it again says so by a method `source_weight`.
    """
    of_module = getattr(module, "source_weight", None)
    found: Tensor | None = of_module(fetched(module)) if of_module is not None else None
    return found


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's weight lies on disk or in other memory until it is called (accelerate's hooks)."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_meta and hasattr(module, "_hf_hook")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _asked(module: nn.Module) -> Tensor:
    """The weight as the module's own outputs for unit vectors, less its bias, some at a time."""
    forward: Callable[[Tensor], Tensor] = plain_forward(module)
    bias = getattr(module, "bias", None)
    device, dtype = _computes_at(module)
    rows = []
    kind = linear_kind(module)
    width: Any = module.in_features if kind == "linear" else module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    zero = None if bias is None else forward(torch.zeros(1, int(width), device=device, dtype=dtype))
    for start in range(0, int(width), _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, int(width) - start)
        unit = torch.zeros(count, int(width), device=device, dtype=dtype)
        unit[torch.arange(count), torch.arange(start, start + count)] = 1
        y = forward(unit)
        rows.append(y if zero is None else y - zero)
    whole = torch.cat(rows)  # [in, out]
    return whole if kind == "conv1d" else whole.T.contiguous()


def _computes_at(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    tensors = [*module._parameters.values(), *module._buffers.values()]
    if device is None:
        device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    dtype = next((t.dtype for t in tensors if t is not None and t.is_floating_point()), torch.float32)
    return torch.device(device), dtype


def parameter_count(model: nn.Module) -> int:
    """How many numbers `model` has, a packed weight counted by the numbers that it stands for.

    Example:
        >>> parameter_count(nn.Linear(3, 4))
        16
    """
    total, seen = 0, set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name == "weight" and is_packed(module):
                total += int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
            else:
                total += parameter.numel()
    return total
