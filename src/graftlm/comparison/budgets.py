"""Budgets: the size of a method (rank, width, length, fraction) chosen so that its trained parameters meet a number.

What is counted is what the method adds beside the head, which every contestant has. A method without a size, such as
(IA)^3, stays as it is; its count is told.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from graftlm.core import Method
from graftlm.core.adapter import parts_of
from graftlm.errors import Finding, GraftError, RunError
from graftlm.methods import Head

__all__ = ["SIZES", "count", "sized", "trained_beside_head"]

#: The fields that set how large a method is; the first one that it has is the one that is chosen.
SIZES = ("rank", "width", "length", "fraction")
_MOST = 4096
_FRACTIONS = 10_000  # a fraction is chosen in steps of one in so many


def trained_beside_head(method: Method) -> Method:
    """The method without its trained head; itself where there is nothing else."""
    others = [part for part in method.parts if not isinstance(part, Head)]
    return functools.reduce(operator.add, others) if others else method


def count(model: nn.Module, method: Method) -> int:
    """How many numbers `method` would train on `model`; nothing is attached.

    Raises GraftError where the method does not fit the model.
    """
    parts = parts_of(model, method)
    return sum(parameter.numel() for part in parts for parameter in part.delta.parameters())


def sized(model: nn.Module, method: Method, budget: int, *, longest: int = _MOST) -> Method:
    """`method` with the largest size whose count is within `budget`; the method itself where it has no size.

    `longest` bounds the number of virtual tokens. Raises RunError (U151) where even the smallest size is above.

    Example:
        >>> sized(model, LoRA(), budget=14_213)                                                 # doctest: +SKIP
        LoRA(rank=1, alpha=2.0, ...)
    """
    part, key = _size_of(method)
    if part is None:
        found = count(model, method)
        if found > budget:
            fix = f"--budget {found}"
            raise RunError(Finding("U151", f"{method} trains {found:,} parameters, the budget is {budget:,}", fix=fix))
        return method
    most = _FRACTIONS if key == "fraction" else longest if key == "length" else _MOST
    value = _largest(lambda size: _fits(model, _with_size(method, part, key, size), budget), most)
    if value < 1:
        least = _with_size(method, part, key, 1)
        found = count(model, least)
        message = f"{least} trains {found:,} parameters at its smallest, the budget is {budget:,}"
        raise RunError(Finding("U151", message, fix=f"--budget {found}"))
    return _with_size(method, part, key, value)


def _size_of(method: Method) -> tuple[Method | None, str]:
    for part in method.parts:
        names = [field.name for field in dataclasses.fields(part)]
        for key in SIZES:
            if key in names:
                return part, key
    return None, ""


def _with_size(method: Method, part: Method, key: str, size: int) -> Method:
    """`method` with the size of its part set; what is proportional to it (alpha, target rank) goes along."""
    changes: dict[str, Any] = {key: size / _FRACTIONS if key == "fraction" else size}
    if key == "rank":
        before = part.rank  # type: ignore[attr-defined]
        for name, kind in (("alpha", float), ("target_rank", int)):
            if hasattr(part, name):
                changes[name] = max(kind(1) if kind is int else 0.0, kind(getattr(part, name) * size / before))
    if key == "width" and getattr(part, "reduction", None) is not None:
        changes["reduction"] = None
    new = dataclasses.replace(part, **changes)
    return functools.reduce(operator.add, [new if other is part else other for other in method.parts])


def _fits(model: nn.Module, method: Method, budget: int) -> bool:
    try:
        return count(model, method) <= budget
    except GraftError:
        return False  # no such size on this model: a rank above the matrix's, a prompt beyond the context


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest whole number from 1 to `most` that fits, 0 for none; what is above one that does not fit does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
