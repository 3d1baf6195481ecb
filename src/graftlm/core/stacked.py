"""Stacked: what several rows' deltas do at a linear map, made of their tensors put together, in few operations.

Low-rank products of rows with different deltas are one batched product. Where each row has one token (decoding), the
operations cost more than what they compute: there scalings and additions that do not depend on the input are one
operation for all rows, with ones and zeros for the others; so are narrow products and bottlenecks, beside one another,
and the chosen entries of sparse changes are one sum.
What is put together is kept while a generation goes on and nothing was written to the deltas' own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.core.delta import BranchDelta, Delta, LinearDelta, LowRank
from graftlm.core.groups import Entries

__all__ = ["LowRankStep", "OneToken", "by_delta", "is_low", "low_ranks", "united"]

#: So many rows with one low-rank change are multiplied by themselves, not with their change once a row.
_ROWS_TOGETHER = 5
#: Low-rank products of fewer ranks together are made for all rows, and what is not a row's is multiplied by zero.
_RANKS_TOGETHER = 48
#: Up to so many tokens a product with small matrices takes longer in bf16 than in float32 on a processor.
_FEW = 4

#: Deltas, each with the rows in which it acts; at sublayers also the path of the module whose input it reads, if any.
_Placed = Sequence[tuple[Any, Sequence[int]]]
_Branches = Sequence[tuple[str, BranchDelta, Sequence[int]]]


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

    @property
    def placed(self) -> list[tuple[LinearDelta, Sequence[int]]]:
        """Each delta with its rows."""
        if self.single:
            return [(self.deltas[0], self.rows)]
        return [(delta, (row,)) for delta, row in zip(self.deltas, self.rows, strict=True)]

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


class OneToken:
    """All that acts at a map for rows with deltas of their own, where each entry is one token.

    What rows do alike is made for all of them at once, with ones and zeros for those that it does not concern: scalings
    before the map, chosen entries of the weight, low-rank products, added vectors and scalings, bottlenecks. `placed`
    are the deltas by what they do, each with the rows in which it acts. Whatever cannot be put together is left in
    `others`, by the same names, and is for the caller to do.
    """

    def __init__(
        self, placed: Mapping[str, _Placed], branches: _Branches, width_out: int, count: int, total: int
    ) -> None:  # fmt: skip
        self.count, self.each = count, count // total
        taken = {
            "befores": all(delta.as_scaling() is not None for delta, _ in placed["befores"]),
            "products": all(delta.as_entries() is not None for delta, _ in placed["products"]),
            "lows": sum(len(_factors(delta).down) for delta, _ in placed["lows"]) <= _RANKS_TOGETHER,
            "adds": all(delta.as_shift() is not None for delta, _ in placed["adds"]),
            "afters": all(delta.as_scaling() is not None for delta, _ in placed["afters"]),
        }
        # What is added comes before what scales, so it is put together with it or both are not.
        taken["adds"] = taken["afters"] = taken["adds"] and taken["afters"]
        self.placed = {name: list(own) if taken[name] else [] for name, own in placed.items()}
        self.others = frozenset(name for name, own in placed.items() if own and not taken[name])
        self.bottlenecks = _alike(branches)
        if self.bottlenecks is None:
            self.others |= {"branches"}
        grouped = [delta for _, own in self.bottlenecks or () for delta, _ in own]
        self._kept = _Kept([*(delta for own in self.placed.values() for delta, _ in own), *grouped])
        self._width_out, self._width_in = width_out, 0

    @property
    def idle(self) -> bool:
        """Whether nothing is put together here."""
        return not (self.bottlenecks or any(self.placed.values()))

    def forget(self) -> None:
        """Drop what is kept of the deltas."""
        self._kept.forget()

    def made(self, x: Tensor, epoch: int) -> _Made:
        """The tensors for an input x [entries, in]."""
        self._width_in = int(x.shape[1])
        found: _Made = self._kept.of(x.dtype, epoch, self._made)
        return found

    def _made(self, dtype: torch.dtype) -> _Made:
        wide = torch.promote_types(dtype, torch.float32)  # small products, and sums of many terms
        own = self.placed
        before = self._filled([(delta.as_scaling(), rows) for delta, rows in own["befores"]], 1.0)
        shift = self._filled([(delta.as_shift(), rows) for delta, rows in own["adds"]], 0.0)
        scale = self._filled([(delta.as_scaling(), rows) for delta, rows in own["afters"]], 1.0)
        if shift is not None and scale is not None:
            shift *= scale
        entries = [
            (outputs + entry * self._width_out, inputs + entry * self._width_in, values.to(wide))
            for delta, rows in own["products"]
            for outputs, inputs, values in (delta.as_entries(),)
            for entry in self._entries(rows)
        ]
        low = None
        if own["lows"]:
            factors = [_factors(delta) for delta, _ in own["lows"]]
            masks = [self._mask(rows, len(f.down), f.down) for f, (_, rows) in zip(factors, own["lows"], strict=True)]
            low = (
                torch.cat([each.down.detach() for each in factors]).to(wide),
                torch.cat([each.scale * each.up.detach() for each in factors], 1).T.to(wide, copy=True),
                torch.cat(masks, 1).to(wide),
            )
        return _Made(
            None if before is None else before.to(dtype),
            tuple(torch.cat(each) for each in zip(*entries, strict=True)) if entries else None,  # type: ignore[arg-type]
            low,
            None if shift is None else shift.to(dtype),
            None if scale is None else scale.to(dtype),
            [self._stack(reads, group, wide) for (reads, _), group in self.bottlenecks or ()],
        )

    def _stack(self, reads: str, group: _Placed, dtype: torch.dtype) -> _Stack:
        """Bottlenecks with one non-linearity beside one another; a last column, always one, is for their b_2."""
        downs, biases, ups, masks, last_up, last = [], [], [], [], [], []
        activation = None
        for delta, rows in group:
            maps = delta.as_bottleneck()
            activation = maps.activation
            width = len(maps.down)
            downs.append(maps.down.detach())
            biases.append(maps.down_bias.detach())
            ups.append(maps.scale * maps.up.detach())
            masks.append(self._mask(rows, width, maps.down))
            last_up.append((maps.scale * maps.up_bias.detach())[:, None])
            last.append(self._mask(rows, 1, maps.down))
        zero = downs[0].new_zeros(len(group), downs[0].shape[1])
        mask = torch.cat([*masks, *(torch.zeros_like(each) for each in last)], 1).to(dtype)
        ones = torch.cat([*(torch.zeros_like(each) for each in masks), *last], 1).to(dtype)
        assert activation is not None
        return _Stack(
            reads,
            activation,
            torch.cat([*downs, zero]).to(dtype),
            torch.cat([*biases, zero[:, 0]]).to(dtype),
            torch.cat([*ups, *last_up], 1).T.to(dtype, copy=True),
            mask,
            ones,
        )

    def _entries(self, rows: Sequence[int]) -> list[int]:
        return [row * self.each + place for row in rows for place in range(self.each)]

    def _mask(self, rows: Sequence[int], width: int, like: Tensor) -> Tensor:
        """1 in the entries of `rows`, 0 in the others, [entries, width]."""
        mask = torch.zeros(self.count, width, device=like.device)
        mask[self._entries(rows)] = 1
        return mask

    def _filled(self, placed: Sequence[tuple[Tensor, Sequence[int]]], idle: float) -> Tensor | None:
        if not placed:
            return None
        first = placed[0][0]
        whole = first.new_full((self.count, len(first)), idle)
        for vector, rows in placed:
            at = self._entries(rows)
            whole[at] = whole[at] * vector if idle else whole[at] + vector
        return whole


@dataclass(frozen=True)
class _Made:
    """What `OneToken` multiplies by and adds: rows are entries; the other dimension is that of inputs or outputs."""

    before: Tensor | None
    entries: tuple[Tensor, Tensor, Tensor] | None  # outputs, inputs and values, over all entries
    low: tuple[Tensor, Tensor, Tensor] | None  # A [ranks, in], s B^T [ranks, out], and which rank is whose
    shift: Tensor | None
    scale: Tensor | None
    stacks: list[_Stack]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add chosen entries and low-rank products for x [entries, in] in place to y [entries, out], contiguous."""
        if self.entries is not None:
            outputs, inputs, values = self.entries
            terms = x.view(-1).index_select(0, inputs) * values
            if y.dtype is terms.dtype:
                y.view(-1).index_add_(0, outputs, terms)
            else:  # bf16 would round each term of a sum
                y += values.new_zeros(y.numel()).index_add_(0, outputs, terms).view(y.shape).to(y.dtype)
        if self.low is not None:
            down, up, mask = self.low
            _add_product(y, F.linear(x.to(down.dtype), down).mul_(mask), up)

    def finish(self, y: Tensor) -> Tensor:
        """Add and scale what does not depend on the input; the same tensor where that may be."""
        if self.scale is None:
            return y if self.shift is None else y.add_(self.shift)
        return y.mul_(self.scale) if self.shift is None else torch.addcmul(self.shift, y, self.scale)

    def branch(self, y: Tensor, given: Callable[[str], Tensor]) -> None:
        """Add the bottlenecks in place, in their order; `given` says what a module was given, [entries, in]."""
        for each in self.stacks:
            read = given(each.reads) if each.reads else y
            inner = each.activation(F.linear(read.to(each.down.dtype), each.down, each.bias))
            _add_product(y, torch.addcmul(each.ones, inner, each.mask), each.up)


@dataclass(frozen=True)
class _Stack:
    """Bottlenecks beside one another, for all rows."""

    reads: str
    activation: Callable[[Tensor], Tensor]
    down: Tensor
    bias: Tensor
    up: Tensor
    mask: Tensor
    ones: Tensor


def _add_product(y: Tensor, narrow: Tensor, wide: Tensor) -> None:
    if y.dtype is narrow.dtype:
        y.addmm_(narrow, wide)
    else:
        y += (narrow @ wide).to(y.dtype)


def _alike(branches: _Branches) -> list[tuple[tuple[str, Any], list[tuple[BranchDelta, Sequence[int]]]]] | None:
    """Bottlenecks by what they read and their non-linearity, in an order that each row's own are in.

    None where something else is among them, or they are too wide for all rows.
    """
    found: list[tuple[tuple[str, Any], list[tuple[BranchDelta, Sequence[int]]]]] = []
    widths: list[int] = []
    for reads, delta, rows in branches:
        maps = delta.as_bottleneck()
        if maps is None:
            return None
        kind, width = (reads, maps.activation), len(maps.down)
        if found and found[-1][0] == kind and not {r for _, own in found[-1][1] for r in own}.intersection(rows):
            found[-1][1].append((delta, rows))
            widths[-1] += width
        else:
            found.append((kind, [(delta, rows)]))
            widths.append(width)
    return found if all(each <= _RANKS_TOGETHER for each in widths) else None


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
