"""Unpacking four bits: in plain torch, and by bitsandbytes' loops where these give the same bits in less time.

Which of both is used is found out at first use, for each format, type and kind of device, on as many entries as are
unpacked together; what comes out is the same to the bit, or torch's form is kept. On an EPYC with AVX-512 the loops
took a twentieth of the time (bfloat16, half a million entries).
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

from graftlm.quantisation.books import book

__all__ = ["by_torch", "faster", "unpacked_by"]

_ENTRIES = 2**19
_REPEATS = 3
#: Formats that bitsandbytes has.
_THEIRS = ("nf4", "fp4")

#: Codes (two in a byte), the size of each block, how many rows and columns; gives the weight [rows, columns].
Unpack = Callable[[Tensor, Tensor, int, int], Tensor]


def by_torch(
    name: str, block: int, dtype: torch.dtype, codes: Tensor, sizes: Tensor, rows: int, columns: int
) -> Tensor:
    """The weight [rows, columns] of `codes` (uint8, two in a byte) and the sizes of their blocks, which they begin."""
    count = rows * columns
    values = torch.index_select(_pairs(name, codes.device), 0, codes.int()).view(-1)[:count]
    whole = count // block * block
    values[:whole].view(-1, block).mul_(sizes[: whole // block, None])
    if whole < count:
        values[whole:].mul_(sizes[-1])
    return values.view(rows, columns).to(dtype)


def unpacked_by(name: str, block: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> str:
    """Whose loops unpack a format on this machine: `bitsandbytes` or `torch`."""
    return "torch" if faster(name, block, dtype, device) is None else "bitsandbytes"


@functools.cache
def faster(name: str, block: int, dtype: torch.dtype, device: str) -> Unpack | None:
    """What unpacks whole blocks as `by_torch` does, and faster; None where nothing does.

    Without values (the device meta, for plans) it is what a processor takes.
    """
    if name not in _THEIRS or _ENTRIES % block or importlib.util.find_spec("bitsandbytes") is None:
        return None
    if device == "meta":
        return faster(name, block, dtype, "cpu")
    try:
        import bitsandbytes  # noqa: F401  # enters its operation

        unpack = torch.ops.bitsandbytes.dequantize_4bit.default

        def theirs(codes: Tensor, sizes: Tensor, rows: int, columns: int) -> Tensor:
            # By blocks: where rows end within them, its loops would take others' sizes.
            found: Tensor = unpack(codes.view(-1, 1), sizes, block, name, [len(sizes), block], dtype)
            return found.view(rows, columns)

        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(256, (_ENTRIES // 2,), generator=generator, dtype=torch.uint8).to(device)
        sizes = torch.rand(_ENTRIES // block, generator=generator).to(device)
        own = functools.partial(by_torch, name, block, dtype)
        if not torch.equal(theirs(codes, sizes, 512, _ENTRIES // 512), own(codes, sizes, 512, _ENTRIES // 512)):
            return None
        took = [_took_s(each, codes, sizes) for each in (theirs, own)]
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError):  # another version, or no such kernel
        return None
    return theirs if took[0] < took[1] else None


def _took_s(unpack: Unpack, codes: Tensor, sizes: Tensor) -> float:
    """The least of a few times."""
    times = []
    for _ in range(_REPEATS):
        if codes.is_cuda:
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        unpack(codes, sizes, 512, _ENTRIES // 512)
        if codes.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began_s)
    return min(times)


@functools.cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """The two values of every byte, [256, 2]: the entry in its high bits comes first."""
    values = book(name).to(device)
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack([high, low], dim=1)
