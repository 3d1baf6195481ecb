"""Storage: what a weight becomes in fewer bits, and back; plain torch on every device, or what is faster (`unpacking`).

Formats of four bits (`nf4`, `fp4`, `int4`) keep for each block of 64 entries the largest size and for each entry the
nearest of 16 values of a code book times that size (Dettmers et al. 2023, "QLoRA", section 2 and 3). With double
quantisation the sizes, less their mean, are held in 8 bits by blocks of 256: 4 + 8/64 + 32/(64 * 256) = 4.127 bits an
entry. `int8` keeps one size for each row and whole numbers up to 127 (Dettmers et al. 2022, "LLM.int8()", section 2);
`int8-dynamic` keeps the same codes and the sum of each row of them, which products with inputs in 8 bits need
(`dynamic`).

Codes and sizes are those of bitsandbytes, to the bit; see `tests/quantisation/test_storage.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.errors import Finding, ModelError, nearest
from graftlm.quantisation.books import BOOKS, book, dynamic_book
from graftlm.quantisation.unpacking import by_torch, faster

__all__ = ["FORMATS", "Format", "as_format"]

#: The formats by name.
FORMATS = (*BOOKS, "int8", "int8-dynamic")

_SIZES_BLOCK = 256  # sizes that share a size of their own
_AT_ONCE = 4096  # blocks quantised together: what they need stays in a processor's cache
_SMALLEST = 1e-38  # in place of a size of zero, which nothing can be divided by


@dataclass(frozen=True)
class Format:
    """How the weights of a base are held: the name of a format, the entries of a block, whether twice quantised.

    `block` and `double` mean nothing for `int8` and `int8-dynamic`, which go by rows.

    Example:
        >>> packed = Format("nf4").pack(torch.randn(128, 64))
        >>> {name: tuple(tensor.shape) for name, tensor in packed.items()}
        {'weight': (4096,), 'sizes': (128,), 'outer': (1,), 'offset': ()}
        >>> round(Format("nf4").bits(4096, 4096), 3)
        4.127
    """

    name: str = "nf4"
    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            close = nearest(str(self.name), FORMATS)
            wanted = ", ".join(FORMATS)
            raise ModelError(
                Finding(
                    "Q101",
                    f"there is no quantisation {self.name!r}: want {wanted}",
                    fix=f"quantize={close[0] if close else 'nf4'}",
                )
            )
        if self.block < 1 or self.block % 2:
            raise ModelError(Finding("Q102", f"blocks of {self.block} entries: want an even number", fix="block=64"))

    def __str__(self) -> str:
        other = "" if self.by_rows or self.block == 64 else f", block {self.block}"
        return f"{self.name}{'' if self.by_rows or self.double else ', sizes in float32'}{other}"

    @property
    def by_rows(self) -> bool:
        """Whether entries are whole numbers of 8 bits, and sizes are those of rows."""
        return self.name not in BOOKS

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded to 8 bits, too, at each call."""
        return self.name == "int8-dynamic"

    # --- what is stored ---

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor that stands for a weight of [rows, columns]."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if self.by_rows:
            found = {"weight": ((rows, columns), torch.int8), "sizes": ((rows,), torch.float32)}
            return found | {"sums": ((rows,), torch.int32)} if self.rounds_inputs else found
        blocks = -(-rows * columns // self.block)
        # Codes are int8, two an entry: models that cast inputs to their weight's type know it as a type of codes (T5).
        found = {
            "weight": ((-(-rows * columns // 2),), torch.int8),
            "sizes": ((blocks,), torch.uint8 if self.double else torch.float32),
        }
        if self.double:
            found |= {"outer": ((-(-blocks // _SIZES_BLOCK),), torch.float32), "offset": ((), torch.float32)}
        return found

    def bits(self, rows: int, columns: int) -> float:
        """Bits that an entry of a weight of [rows, columns] takes, sizes included."""
        total = sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes(rows, columns).values())
        return total / (rows * columns)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for `weight` [rows, columns], on its device; by the names of `shapes`."""
        if self.by_rows:
            packed = _by_rows(weight.detach())
            return packed | {"sums": packed["weight"].sum(1, dtype=torch.int32)} if self.rounds_inputs else packed
        codes, sizes = _in_blocks(weight.detach().reshape(-1), _sorted(self.name, weight.device), self.block)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_full((1,), _code_of_zero(self.name))])
        packed = {"weight": ((codes[::2] << 4) | codes[1::2]).view(torch.int8), "sizes": sizes}
        if self.double:
            offset = sizes.mean()
            packed["sizes"], packed["outer"] = _sizes_in_blocks(sizes - offset)
            packed["offset"] = offset
        return packed

    # --- and back ---

    def sizes(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The size of each block, or row, float32."""
        sizes = packed["sizes"]
        if "outer" not in packed:
            return sizes
        values = dynamic_book().to(sizes.device)[sizes.int()]
        outer = packed["outer"].repeat_interleave(_SIZES_BLOCK)[: len(values)]
        return values * outer + packed["offset"]

    def unpack(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, sizes: Tensor | None = None
    ) -> Tensor:
        """The weight [rows, columns] that `packed` stands for, in `dtype`; computed in float32 and rounded once.

        `sizes` are those of `self.sizes(packed)`, where they are known already.
        """
        return self.unpack_rows(packed, shape, dtype, 0, shape[0], sizes)

    def unpack_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        first: int,
        last: int,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """As `unpack`, rows `first` to `last` (exclusive) alone; `first` must be a multiple of `rows_together`."""
        sizes = self.sizes(packed) if sizes is None else sizes
        if self.by_rows:
            return (packed["weight"][first:last].float() * (sizes[first:last, None] / 127)).to(dtype)
        columns = shape[1]
        start, stop = first * columns, last * columns
        codes = packed["weight"].view(torch.uint8)[start // 2 : -(-stop // 2)]
        blocks = sizes[start // self.block : -(-stop // self.block)]
        unpack = None
        if (stop - start) % self.block == 0:
            unpack = faster(self.name, self.block, dtype, codes.device.type)
        if unpack is None:
            return by_torch(self.name, self.block, dtype, codes, blocks, last - first, columns)
        return unpack(codes, blocks, last - first, columns)

    def rows_together(self, columns: int) -> int:
        """How many rows end where a block does."""
        if self.by_rows:
            return 1
        return self.block // math.gcd(self.block, columns)


def as_format(wanted: str | Format) -> Format:
    """`wanted` as a format. Raises ModelError with the nearest names for one that does not exist."""
    return wanted if isinstance(wanted, Format) else Format(wanted)


@functools.cache
def _sorted(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of a code book rising, and the code of each."""
    values, order = book(name).sort(stable=True)
    return values.to(device), order.to(device, torch.uint8)


def _code_of_zero(name: str) -> int:
    return int((book(name) == 0).nonzero()[0])


def _by_rows(weight: Tensor) -> dict[str, Tensor]:
    """Whole numbers up to 127 and the size of each row, some rows at a time."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    sizes = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(_AT_ONCE * 64 // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        largest = rows.abs().amax(dim=1).float()
        factor = 127 / torch.where(largest > 0, largest, torch.ones_like(largest))
        codes[start : start + step] = torch.round(rows * factor[:, None])
        sizes[start : start + step] = largest
    return {"weight": codes, "sizes": sizes}


def _in_blocks(flat: Tensor, values: tuple[Tensor, Tensor], block: int) -> tuple[Tensor, Tensor]:
    """The code of the nearest value for each entry of `flat`, uint8, and the size of each block, float32."""
    rising, codes = values
    bounds = ((rising[:-1] + rising[1:]) / 2).tolist()
    found = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    sizes = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), _AT_ONCE * block):
        piece = flat[start : start + _AT_ONCE * block].float()
        whole = piece.numel() // block * block
        blocks = piece[:whole].view(-1, block)
        own = sizes[start // block : -(-(start + piece.numel()) // block)]
        torch.amax(blocks.abs(), dim=1, out=own[: len(blocks)])
        scaled = blocks * (1 / own[: len(blocks)].clamp_min(_SMALLEST))[:, None]
        scaled = scaled.view(-1)
        if whole < piece.numel():  # the last block is short
            own[-1] = piece[whole:].abs().max().clamp_min(_SMALLEST)
            scaled = torch.cat([scaled, piece[whole:] / own[-1]])
        rank = torch.zeros(scaled.shape, dtype=torch.uint8, device=flat.device)
        for bound in bounds:  # a few comparisons are faster than a search
            rank += (scaled > bound).view(torch.uint8)
        found[start : start + piece.numel()] = codes[rank.int()]
    return found, sizes


def _sizes_in_blocks(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The code of each size in the dynamic type, uint8, and the size of each block of sizes, float32.

    bitsandbytes rounds to the nearest of 65,536 even steps before it looks for the nearest value on a CPU, and not
    elsewhere; so does this, and codes agree everywhere.
    """
    short = -sizes.numel() % _SIZES_BLOCK
    blocks = torch.cat([sizes, sizes.new_zeros(short)]).view(-1, _SIZES_BLOCK)
    outer = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / outer.clamp_min(_SMALLEST))[:, None]).view(-1)[: sizes.numel()].clamp_(-1, 1)
    if sizes.device.type == "cpu":
        codes = _steps()[((scaled + 1) * (65535 / 2) + 0.5).int()]
    else:
        codes = _nearest_dynamic(scaled)
    empty = (outer == 0).repeat_interleave(_SIZES_BLOCK)[: sizes.numel()]
    return codes.masked_fill(empty, 0), outer


@functools.cache
def _steps() -> Tensor:
    """The code of each of 65,536 even steps from -1 to 1."""
    return _nearest_dynamic(torch.arange(65536, dtype=torch.float32) * (2 / 65535) - 1)


def _nearest_dynamic(scaled: Tensor) -> Tensor:
    rising = dynamic_book().to(scaled.device)
    return torch.bucketize(scaled, (rising[:-1] + rising[1:]) / 2, out_int32=True).to(torch.uint8)
