"""Stand-ins for weights in few bits: the storage and the work of quantised maps, without values.

A map keeps its weight packed with one constant a block, and computes with it unpacked: forward and backward each make
the whole weight for a moment, as QLoRA does (Dettmers et al. 2023, "QLoRA", equation 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import Finding, PlanError, nearest

__all__ = ["STORAGES", "Storage", "pack"]


@dataclass(frozen=True)
class Storage:
    """How weights are held: bits a number, numbers a constant, bytes a constant."""

    bits: int
    block: int
    constant_bytes: float


#: By name. nf4 has an 8-bit constant for 64 numbers and a float for 256 of these; int8 one float a row.
STORAGES: dict[str, Storage] = {
    "int8": Storage(8, 0, 4),
    "nf4": Storage(4, 64, 1 + 4 / 256),
}


def pack(model: nn.Module, name: str) -> list[Tensor]:
    """Put a stand-in in place of every map of the blocks of `model`, and give the constants of all.

    Heads and embeddings stay as they are. Raises PlanError for a storage that there is not.
    """
    if name not in STORAGES:
        close = nearest(name, STORAGES, most=1)
        fix = f"quantize={close[0]}" if close else f"quantize={', '.join(STORAGES)}"
        raise PlanError(Finding("P101", f"no storage {name!r}: there are {', '.join(STORAGES)}", fix=fix))
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    constants = []
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head and _in_block(model, child):
                packed = _Packed(child, STORAGES[name])
                setattr(module, child_name, packed)
                constants.append(packed.constants)
    return constants


def _in_block(model: nn.Module, wanted: nn.Module) -> bool:
    path = next(path for path, module in model.named_modules() if module is wanted)
    return any(word.isdigit() for word in path.split("."))


class _Packed(nn.Module):
    """A linear map whose weight is packed."""

    weight: Tensor
    constants: Tensor

    def __init__(self, plain: nn.Linear, storage: Storage) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = plain.in_features, plain.out_features, plain.weight.dtype
        numel = plain.weight.numel()
        blocks = numel / storage.block if storage.block else plain.out_features
        kinds: Any = {"dtype": torch.uint8, "device": plain.weight.device}
        self.register_buffer("weight", torch.empty(numel * storage.bits // 8, **kinds))
        self.register_buffer("constants", torch.empty(int(blocks * storage.constant_bytes), **kinds))
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, with W unpacked for the moment."""
        shape = (self.out_features, self.in_features)
        y: Tensor = _Unpacked.apply(x, self.weight, shape)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype, device=packed.device).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return grads[0] @ torch.empty(ctx.shape, dtype=grads[0].dtype, device=packed.device), None, None
