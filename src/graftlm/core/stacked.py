"""Stacked: what several rows' deltas do at a linear map, made of their tensors put together, in few operations.

Low-rank products of rows with different deltas are one batched product. Where each row has one token (decoding), the
operations cost more than what they compute: there scalings and additions that do not depend on the input are one
operation for all rows, with ones and zeros for the others, and the chosen entries of sparse changes are one sum.
What is put together is kept while a generation goes on and nothing was written to the deltas' own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.core.delta import Delta, LinearDelta, LowRank, ParameterDelta
from graftlm.core.groups import Entries

__all__ = ["EntriesStep", "LowRankStep", "ScaleStep", "by_delta", "is_low", "low_ranks", "united"]

#: So many rows with one low-rank change are multiplied by themselves, not with their change once a row.
_ROWS_TOGETHER = 5
#: Up to so many tokens a product with small matrices takes longer in bf16 than in float32 on a processor.
_FEW = 4

#: Deltas, each with the rows in which it acts.
_Placed = Sequence[tuple[Any, Sequence[int]]]


def united(by_group: Sequence[tuple[tuple[int, ...] | None, Sequence[Any]]]) -> list[tuple[Any, list[int]]]:
    """Each delta once, with all rows in which it acts; for what is added, whose order does not matter."""
    found: dict[int, tuple[Any, list[int]]] = {}
    for rows, deltas in by_group:
        for delta in deltas:
            found.setdefault(id(delta), (delta, []))[1].extend(rows or ())
    return list(found.values())


def by_delta(by_group: Sequence[tuple[tuple[int, ...] | None, Sequence[Any]]]) -> list[tuple[Any, list[int]]]:
    """Deltas with the rows in which they act, so that each row meets its own in their order."""
    found: list[tuple[Any, list[int]]] = []
    for level in range(max((len(deltas) for _, deltas in by_group), default=0)):
        found += united([(rows, deltas[level : level + 1]) for rows, deltas in by_group])
    return found


def is_low(delta: LinearDelta) -> bool:
    """Whether what a delta adds is a low-rank product and nothing else."""
    found = delta.low_rank()
    return found is not None and not found.dropout and found.bias is None


def low_ranks(by_group: Sequence[tuple[tuple[int, ...] | None, Sequence[LinearDelta]]], at: Any) -> list[LowRankStep]:
    """The low-rank products: for all rows, for the rows of one delta, or one for rows with different deltas."""
    low = [(rows, [delta for delta in deltas if is_low(delta)]) for rows, deltas in by_group]
    if low and low[0][0] is None:
        return [LowRankStep([delta], [], None) for delta in low[0][1]]
    found: list[LowRankStep] = []
    mixed: list[tuple[tuple[int, ...], list[LinearDelta]]] = []
    for delta, rows in united(low):
        if len(rows) >= _ROWS_TOGETHER:
            found.append(LowRankStep([delta], rows, at(rows)))
        else:
            mixed += [((row,), [delta]) for row in rows]
    by_row: dict[int, list[LinearDelta]] = {}
    for rows_, deltas in mixed:
        by_row.setdefault(rows_[0], []).extend(deltas)
    for level in range(max(map(len, by_row.values()), default=0)):
        rows = sorted(row for row, deltas in by_row.items() if len(deltas) > level)
        own = [by_row[row][level] for row in rows]
        if all(delta is own[0] for delta in own):
            found.append(LowRankStep(own[:1], rows, at(rows)))
        else:
            found.append(LowRankStep(own, rows, at(rows)))
    return found


class _Kept:
    """What is made of some deltas' tensors, made again for another type or epoch, or when one was written to."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = deltas
        self._kept: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """Drop it."""
        self._kept = None

    def of(self, dtype: torch.dtype, epoch: int, make: Callable[[torch.dtype], Any]) -> Any:
        """What `make` makes in the type `dtype`, now or before."""
        kept = self._kept
        if kept is not None and kept[0] == epoch and kept[1] is dtype and kept[2] == _versions(kept[3]):
            return kept[4]
        sources = [
            tensor
            for delta in self.deltas
            for tensor in (*delta._parameters.values(), *delta._buffers.values())
            if tensor is not None
        ]
        versions = _versions(sources)
        made = make(dtype)
        self._kept = None if versions is None else (epoch, dtype, versions, sources, made)
        return made


class LowRankStep:
    """s (x A^T) B^T for some entries: with one delta, or with a delta of its own for each row, as a batched product."""

    def __init__(self, deltas: list[LinearDelta], rows: Sequence[int], at: Entries | None) -> None:
        self.deltas, self.rows, self.at, self.single = deltas, rows, at, len(deltas) == 1
        self._kept = _Kept(deltas)
        self._own = False  # whether what is kept are the delta's own tensors

    def forget(self) -> None:
        """Drop what is kept of the deltas, where it takes memory of its own."""
        if not self._own:
            self._kept.forget()

    def __call__(self, x: Tensor, y: Tensor, epoch: int) -> None:
        """Add it in place to y [entries, ..., out] for the input x [entries, ..., in]."""
        at = self.at
        if at is not None:
            x = at.take(x)
        if x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.numel() <= _FEW * x.shape[-1] * len(self.deltas):
            x = x.float()
        down, up, scale = self._kept.of(x.dtype, epoch, self._made)
        if self.single:
            narrow = F.linear(x, down)
            if y.dtype is x.dtype and (at is None or at.index is None):
                target = y if at is None else at.take(y)
                if target.dim() == 2:
                    target.addmm_(narrow, up, alpha=scale)
                    return
                if target.is_contiguous():
                    target.view(-1, up.shape[1]).addmm_(narrow.view(-1, up.shape[0]), up, alpha=scale)
                    return
            change = (narrow if scale == 1 else narrow * scale) @ up
            if at is None:
                y.add_(change.to(y.dtype))
            else:
                at.add(y, change)
            return
        assert at is not None
        count = len(self.deltas)
        narrow = torch.bmm(x.reshape(count, -1, x.shape[-1]), down)
        if y.dtype is x.dtype and at.index is None and (target := at.take(y)).is_contiguous():
            target.view(count, -1, target.shape[-1]).baddbmm_(narrow, up)
        else:
            at.add(y, torch.bmm(narrow, up).view(*x.shape[:-1], -1))

    def _made(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B^T [r, out] and s; of several deltas A^T [rows, in, r] and s B^T [rows, r, out], filled up."""
        factors = [_factors(delta) for delta in self.deltas]
        if len(factors) == 1:
            down, up = factors[0].down, factors[0].up
            self._own = down.dtype is dtype and up.dtype is dtype
            return down.to(dtype), up.to(dtype).T, factors[0].scale
        widest = max(len(each.down) for each in factors)
        downs = [_widened(each.down.to(dtype), widest) for each in factors]
        ups = [_widened((each.scale * each.up).to(dtype).T, widest) for each in factors]
        return torch.stack(downs).mT, torch.stack(ups), 1.0


class ScaleStep:
    """y * scale + shift for rows with deltas of their own, all rows at once; `rows` have one entry each or several."""

    def __init__(self, shifts: _Placed, scalings: _Placed, count: int, total: int) -> None:
        self.shifts, self.scalings, self.each, self.count = shifts, scalings, count // total, count
        self._kept = _Kept([delta for delta, _ in (*shifts, *scalings)])

    @staticmethod
    def takes(shifts: _Placed, scalings: _Placed) -> bool:
        """Whether these deltas do no more than that."""
        return all(delta.as_shift() is not None for delta, _ in shifts) and all(
            delta.as_scaling() is not None for delta, _ in scalings
        )

    def forget(self) -> None:
        """Drop what is kept of the deltas."""
        self._kept.forget()

    def __call__(self, y: Tensor, epoch: int) -> Tensor:
        """The changed y [entries, ..., width]; the same tensor where that may be."""
        shift, scale = self._kept.of(y.dtype, epoch, self._made)
        shape = (self.count, *(1,) * (y.dim() - 2), y.shape[-1])
        if scale is None:
            y += shift.view(shape)
        elif shift is None:
            y = y * scale.view(shape)
        else:
            y = torch.addcmul(shift.view(shape), y, scale.view(shape))
        return y

    def _made(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Shifts and scales of each entry, [entries, width]; a shift is scaled too."""
        shift = self._filled([(delta.as_shift(), rows) for delta, rows in self.shifts], 0.0)
        scale = self._filled([(delta.as_scaling(), rows) for delta, rows in self.scalings], 1.0)
        if shift is not None and scale is not None:
            shift *= scale
        return tuple(None if each is None else each.to(dtype) for each in (shift, scale))  # type: ignore[return-value]

    def _filled(self, placed: Sequence[tuple[Tensor, Sequence[int]]], idle: float) -> Tensor | None:
        if not placed:
            return None
        first = placed[0][0]
        whole = first.new_full((self.count, len(first)), idle)
        for vector, rows in placed:
            for row in rows:
                own = whole[row * self.each : (row + 1) * self.each]
                own.copy_(own * vector if idle else own + vector)
        return whole


class EntriesStep:
    """What chosen entries of a weight add for some rows, a sum over the entries of all of them."""

    def __init__(self, placed: Sequence[tuple[ParameterDelta, Sequence[int]]], count: int, total: int) -> None:
        self.placed, self.each = placed, count // total
        self._kept = _Kept([delta for delta, _ in placed])
        self._widths = (0, 0)

    @staticmethod
    def takes(placed: Sequence[tuple[ParameterDelta, Sequence[int]]]) -> bool:
        """Whether these deltas change entries that are few enough."""
        return all(delta.as_entries() is not None for delta, _ in placed)

    def forget(self) -> None:
        """Drop what is kept of the deltas."""
        self._kept.forget()

    def __call__(self, x: Tensor, y: Tensor, epoch: int) -> None:
        """Add it in place to y [entries, ..., out], contiguous, for the input x [entries, ..., in], a token each."""
        self._widths = (int(x.shape[-1]), int(y.shape[-1]))
        # bf16 would round each term of a sum.
        outputs, inputs, values = self._kept.of(torch.promote_types(y.dtype, torch.float32), epoch, self._made)
        terms = x.reshape(-1).index_select(0, inputs) * values
        if y.dtype is terms.dtype:
            y.view(-1).index_add_(0, outputs, terms)
        else:
            y += terms.new_zeros(y.numel()).index_add_(0, outputs, terms).view(y.shape).to(y.dtype)

    def _made(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        wide_in, wide_out = self._widths
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for delta, rows in self.placed:
            entries = delta.as_entries()
            assert entries is not None  # see `takes`
            outputs, inputs, values = entries
            for row in rows:
                for entry in range(row * self.each, (row + 1) * self.each):
                    found.append((outputs + entry * wide_out, inputs + entry * wide_in, values.to(dtype)))
        return tuple(torch.cat(each) for each in zip(*found, strict=True))  # type: ignore[return-value]


def _factors(delta: LinearDelta) -> LowRank:
    found = delta.low_rank()
    assert found is not None
    return found


def _widened(factor: Tensor, rank: int) -> Tensor:
    return factor if len(factor) == rank else F.pad(factor, (0, 0, 0, rank - len(factor)))


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """How often each tensor was written to; None where that is not counted."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # made in inference mode
        return None
