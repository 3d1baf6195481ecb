"""Code books: the values that few bits can stand for, generated from their definitions.

`nf4`: quantiles of the normal distribution, so that each value stands for as many normal weights (Dettmers et al. 2023,
"QLoRA: Efficient Finetuning of Quantized LLMs", section 3 and appendix E). `fp4`: a sign, two bits of exponent and one
of mantissa. `int4`: equal steps. `dynamic`: 256 values whose exponent grows towards zero (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization", section 1.3), in which the scales of the blocks are held.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["BOOKS", "book", "dynamic_book"]


def _nf4() -> Tensor:
    # Eight values above zero, seven below, zero itself; the outermost probability is the mean of 1 - 1/30 and 1 - 1/32,
    # to the seven digits, and in float32, that the authors' code has: the values then agree with theirs in every bit.
    offset = 0.9677083
    above, below = (torch.special.ndtri(torch.linspace(offset, 0.5, count)[:-1].double()) for count in (9, 8))
    values = torch.cat([above, above.new_zeros(1), -below]).sort().values.float()
    return values / values.max()


def _fp4() -> Tensor:
    # By bits: the exponents of 0b001 to 0b111 in bitsandbytes' order, out of 12; then the same below zero.
    above = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float64) / 12
    return torch.cat([above, -above]).float()


def _int4() -> Tensor:
    # Fifteen steps, so that zero is one of them; the sixteenth code is not used.
    return torch.cat([torch.arange(-7, 8, dtype=torch.float64) / 7, torch.ones(1, dtype=torch.float64)]).float()


_MADE = {"nf4": _nf4, "fp4": _fp4, "int4": _int4}

#: The formats of four bits, by name.
BOOKS = tuple(_MADE)


@functools.cache
def book(name: str) -> Tensor:
    """The 16 values of format `name`, float32, by code.

    Example:
        >>> book("nf4")[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
    """
    return _MADE[name]()


@functools.cache
def dynamic_book() -> Tensor:
    """The 256 values of the dynamic data type with a sign, float32, rising.

    Example:
        >>> dynamic_book().shape, dynamic_book().max().item()
        (torch.Size([256]), 1.0)
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        # 2^exponent means of equal parts of [0.1, 1], times a power of ten; in float32, as bitsandbytes computes them.
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
