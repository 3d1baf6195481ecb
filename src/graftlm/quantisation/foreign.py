"""Weights that other libraries hold in few bits: how bitsandbytes' are read as numbers.

Deltas act beside any of them without this; it is for what needs the numbers (DoRA, PiSSA, merging). torchao's tensors
read themselves; of what is unknown (GPTQ, AWQ), `core.storage` asks the module.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.storage import read_storage

__all__ = ["as_loaded", "read_all"]


def as_loaded(weight: Tensor) -> Tensor:
    """A packed weight in the order in which it was loaded, which its fingerprint is of.

    bitsandbytes turns one around on processors that multiply bfloat16, at its first call without gradients.
    """
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight
    from bitsandbytes import functional

    codes: Tensor = functional._convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(state))[0]
    return codes


def _four_bits(module: nn.Module) -> Tensor:
    """The weight of a `Linear4bit`, float32 [out, in]."""
    from bitsandbytes import functional

    weight: Any = module.weight
    if weight.quant_state is None:
        return torch.empty(int(module.out_features), int(module.in_features), device=weight.device)  # type: ignore[arg-type]
    codes, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        # After a call without gradients on a CPU it lies in another order, its sizes in 16 bits and by columns, which
        # the way back leaves as they are, or packs in 8 bits again.
        sizes = state.absmax.T.reshape(-1).float()
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax, state.nested = sizes, False
    state.dtype = torch.float32
    dense: Tensor = functional.dequantize_4bit(codes, state)
    return dense


def _eight_bits(module: nn.Module) -> Tensor:
    """The weight of a `Linear8bitLt`, float32 [out, in]; before its first call it holds its sizes elsewhere."""
    weight: Any = module.weight
    state: Any = module.state
    codes = state.CB if state.CB is not None else weight.CB if weight.CB is not None else weight.data
    sizes = state.SCB if state.SCB is not None else weight.SCB
    dense: Tensor = codes.float() * (sizes.float()[:, None] / 127)
    return dense


def read_all() -> None:
    """Enter the readers; called once, when the room is imported."""
    read_storage("Linear4bit", _four_bits)
    read_storage("Linear8bitLt", _eight_bits)
