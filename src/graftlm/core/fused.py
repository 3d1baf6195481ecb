"""Fused maps taken apart: which output columns of one map are query, key and value, or gate and up.

The module around the map is run once on a few random numbers, with every map in it replaced: the fused one gives a
free tensor, the others zeros. The columns that the attention call's query depends on are the query's, whatever order
the model keeps them in (thirds, groups, interleaved by head). No weight is needed, so it works on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.sites import linear_kind

__all__ = ["gate_up_columns", "qkv_columns"]

Columns = tuple[tuple[int, int], ...]


def qkv_columns(
    attention: nn.Module, fused: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Columns]:
    """The output columns of `fused` by part, for an attention module on the meta device that notes its calls.

    `args` and `kwargs` are those of a call of it. Empty where the parts overlap or leave columns out.
    """
    free = _free_output(attention, fused)
    _run(attention, args, kwargs)
    query, key, value, _ = attention.__dict__["_graftlm_calls"][-1]
    found: dict[str, Tensor] = {}
    for part, tensor in (("query", query), ("key", key), ("value", value)):
        weights = torch.randn(tensor.shape, generator=_generator())
        (gradient,) = torch.autograd.grad((tensor * weights).sum(), free, retain_graph=True)
        found[part] = gradient.flatten(0, -2).abs().sum(0) > 0
    if not bool((torch.stack(list(found.values())).sum(0) == 1).all()):
        return {}
    return {part: _ranges(mask) for part, mask in found.items()}


def gate_up_columns(
    feed_forward: nn.Module, fused: nn.Module, down: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Columns]:
    """The halves of a fused gate and up map: the down map's input is linear in the up half; empty where in none."""
    seen: list[Tensor] = []
    free = _free_output(feed_forward, fused)
    down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    half = int(free.shape[-1]) // 2
    with torch.no_grad():
        _run(feed_forward, args, kwargs)
        for name, columns in (("first", slice(0, half)), ("second", slice(half, None))):
            free[..., columns] *= 2
            _run(feed_forward, args, kwargs)
            free[..., columns] /= 2
            if torch.allclose(seen[-1], 2 * seen[0], rtol=1e-4, atol=1e-6):
                first, second = ("up", "gate") if name == "first" else ("gate", "up")
                return {first: ((0, half),), second: ((half, 2 * half),)}
    return {}


def _free_output(owner: nn.Module, fused: nn.Module) -> Tensor:
    """Make `owner` runnable on the CPU without weights; returns the tensor that stands for the output of `fused`."""
    width = _width(fused)
    free = torch.randn(3, 5, width, generator=_generator()).requires_grad_(True)
    for module in owner.modules():
        if module is fused:
            module.forward = lambda x, *_: free.reshape(*x.shape[:-1], width)
        elif linear_kind(module) in ("linear", "conv1d"):
            module.forward = _zeros(_width(module))
        else:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_meta:
                    real = torch.ones(tensor.shape, dtype=tensor.dtype)
                    if name in module._parameters:
                        module._parameters[name] = nn.Parameter(real, requires_grad=False)
                    else:
                        module._buffers[name] = real
    return free


def _zeros(width: int) -> Any:
    return lambda x, *_: torch.zeros(*x.shape[:-1], width)


def _width(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 0) or getattr(module, "nf", 0))


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    module(*(_real(value) for value in args), **{name: _real(value) for name, value in kwargs.items()})


def _real(value: Any) -> Any:
    """A tensor of numbers in place of one without."""
    if isinstance(value, Tensor) and value.is_meta:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=_generator())
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_real(each) for each in value)
    return value


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _ranges(mask: Tensor) -> Columns:
    columns = mask.nonzero().flatten().tolist()
    ranges: list[tuple[int, int]] = []
    for column in columns:
        if ranges and ranges[-1][1] == column:
            ranges[-1] = (ranges[-1][0], column + 1)
        else:
            ranges.append((column, column + 1))
    return tuple(ranges)
