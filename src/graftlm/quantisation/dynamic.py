r"""Inputs in 8 bits, each row by its own range: what a map of `int8-dynamic` multiplies its codes with.

    s = (max(x, 0) - min(x, 0)) / 255,   z = round(-min(x, 0) / s),   q = round(x / s) + z in 0..255
    y_ij = s_i (size_j / 127) (sum_k q_ik c_jk - z_i sum_k c_jk)

Sizes are found anew for every row (a token) of every call, so nothing is calibrated, and no row depends on another
(Dettmers et al. 2022, "LLM.int8()", section 2.2 on rows and columns with sizes of their own; here every entry of the
input is rounded, outliers too, and zero is one of the steps). The sum over k is one of whole numbers, exact in 32 bits.
Processors with VNNI or AMX add four such products in one step; elsewhere the rounded inputs are multiplied as numbers,
which is the same up to the rounding of the type. The gradient passes the rounding as if it were not there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["LONGEST", "multiplied_in_integers", "multiply", "rounded", "rounded_as_numbers"]

#: Entries of a row whose products surely fit 32 bits: 255 * 127 * 66,000 < 2^31.
LONGEST = 66_000

_ROWS_AT_ONCE = 256  # of the input: the sums of these rows stay near, and each product reads the codes once


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x [rows, in] in uint8, the size of a step of each row in float32 [rows, 1], and its zero, alike.

    A row with an entry that is no number has such a size, and so has what comes of it.
    """
    x = x.float()
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    size = (high - low).div_(255)
    size = torch.where(size == 0, 1.0, size)
    zero = (low / size).neg_().round_()
    codes = (x / size).round_().add_(zero).clamp_(0, 255)
    return codes.to(torch.uint8), size, zero


def rounded_as_numbers(x: Tensor) -> Tensor:
    """x [rows, in] rounded, in its own type."""
    codes, size, zero = rounded(x)
    return ((codes.float() - zero) * size).to(x.dtype)


@functools.cache
def multiplied_in_integers(device: str) -> bool:
    """Whether this kind of device multiplies bytes with bytes faster than numbers.

    Without values (the device meta, for plans) it is what a processor does.
    """
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return device in ("cpu", "meta") and known is not None and bool(known())


def multiply(x: Tensor, codes: Tensor, sizes: Tensor, sums: Tensor) -> Tensor:
    """y [rows, out] in the type of x [rows, in], for codes [out, in] (int8), their sizes [out] and sums (int32) [out].

    For devices of which `multiplied_in_integers` is true.
    """
    y = x.new_empty(x.shape[0], codes.shape[0])
    steps = sizes / 127
    for first in range(0, x.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        row_codes, size, zero = rounded(x[rows])
        found = torch._int_mm(row_codes, codes.T)
        found.addcmul_(zero.int(), sums, value=-1)
        y[rows] = (found * size).mul_(steps)
    return y
