"""Lanes: the way through a linear map that has a junction, in place of the map's own forward.

Where no gradient is wanted (decoding above all) a lane takes the short way: what acts at the map is sorted out when the
routing changes, once for all calls, and additions are made in place in the map's fresh output. Low-rank changes of
several rows are one batched product, whatever adapters they belong to. Everything else goes the junction's own way, as
at any module: before the call, the call, after it. Both ways compute the same; the tests hold them against each other.

A lane lies in the module's `__dict__` as `forward` and names its module, so that a copy of the model has lanes of its
own. What it keeps of a delta (tensors in the input's type, tensors of several deltas in one) is made anew when the
routing changes, when a forward begins that does not go on from a cache, and when a tensor was written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.delta import LinearDelta, LowRank, ParameterDelta, acts
from graftlm.core.groups import Entries, Group, total_rows

if TYPE_CHECKING:
    from graftlm.core.junction import Junction

__all__ = ["Lane", "lane_of", "plain_forward"]

_FORWARD = "forward"
#: So many rows with one low-rank change are multiplied by themselves, not with their change once a row.
_ROWS_TOGETHER = 5
#: Up to so many tokens a product with small matrices takes longer in bf16 than in float32 on a processor.
_FEW = 4
#: How many routings a lane has sorted at the same time.
_WAYS = 32

#: The columns that a part of a fused map has, if they are in one piece.
_Columns = tuple[int, int] | None


class Lane:
    """Stands for the forward of a linear map `module` with `junction`."""

    def __init__(self, module: nn.Module, junction: Junction) -> None:
        self.module, self.junction = module, junction
        self.before = module.__dict__.get(_FORWARD)  # another's, such as a device map's
        #: Whether the map's output is a tensor of its own, which may be written to.
        own = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or hasattr(module, "dense_weight")
        self.fresh = self.before is None and own
        #: Whether the map is `nn.Linear`'s own, whose product can be called for without detours.
        self.bare = self.before is None and type(module).forward is nn.Linear.forward
        #: A forward that makes the map's product together with what acts there, for training.
        self.fused: Callable[..., Any] | None = None
        self._ways: dict[int, _Way] = {}
        self._way: _Way | None = None
        module.__dict__[_FORWARD] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ways": {}, "_way": None}

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get(_FORWARD) is self:
            if self.before is None:
                del self.module.__dict__[_FORWARD]
            else:
                self.module.__dict__[_FORWARD] = self.before

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The map itself, without anything of the junction."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def product(self, x: Tensor) -> Tensor:
        """The map itself for one input [..., in]."""
        if self.bare:
            own = self.module._parameters
            return F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        found: Tensor = self.inner(x)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The map with what acts at it."""
        junction = self.junction
        if torch.is_grad_enabled() or kwargs or len(args) != 1 or junction.watchers:
            return self._long(args, kwargs)
        groups = junction.plan()
        way = self._way
        if not groups:
            if way is not None:
                way.left()
                self._way = None
            return self.product(args[0])
        x = args[0]
        if way is None or not way.holds(groups, self.module, x):
            way = self._other_way(groups, x)
        found = way(x) if way.short else None
        return self._long(args, kwargs) if found is None else found

    def _other_way(self, groups: tuple[Group, ...], x: Tensor) -> _Way:
        """The way of `groups`, as it was sorted before or is now."""
        if self._way is not None:
            self._way.left()
        way = self._ways.get(id(groups))
        if way is None or not way.holds(groups, self.module, x):
            self.junction.follow(self.module, groups, x.device)
            if len(self._ways) >= _WAYS:
                self._ways.clear()
            way = self._ways[id(groups)] = _Way(self, groups, x)
        self._way = way
        return way

    def _long(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        junction, module = self.junction, self.module
        output: Any = None
        try:
            changed = junction.enter(module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
            output = (self.fused or self.inner)(*args, **kwargs)
        finally:
            # Also after a call that failed: parameters are put back.
            replaced = junction.leave(module, args, kwargs, output)
        return output if replaced is None else replaced


def lane_of(module: nn.Module) -> Lane | None:
    """The lane of `module`, if it has one."""
    found = module.__dict__.get(_FORWARD)
    return found if isinstance(found, Lane) else None


def plain_forward(module: nn.Module) -> Any:
    """The module's forward without its lane, if it has one."""
    found = lane_of(module)
    return module.forward if found is None else found.inner


class _Way:
    """What acts at a map under one routing, sorted; `short` is False where only the long way does it."""

    def __init__(self, lane: Lane, groups: tuple[Group, ...], x: Tensor) -> None:
        self.lane, self.groups = lane, groups
        self.training, self.device = lane.module.training, x.device
        self.rows = None if groups[0].rows is None else total_rows(groups)
        self.short = lane.fresh and lane.junction.rows != "unknown" and all(map(_is_simple, groups))
        # By the number of entries; one for all of them where the rows are alike.
        self._steps: dict[int, _Steps] = {}

    def holds(self, groups: tuple[Group, ...], module: nn.Module, x: Tensor) -> bool:
        """Whether it is this way that a call goes."""
        return self.groups is groups and self.training is module.training and self.device == x.device

    def left(self) -> None:
        """Another routing came: what is kept in memory for this one goes."""
        for steps in self._steps.values():
            steps.forget()

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output for x [entries, ..., in]; None where it takes the long way."""
        count = 0 if self.rows is None else int(x.shape[0])
        steps = self._steps.get(count)
        if steps is None:
            if self.rows is not None and (count % self.rows or not count):
                return None
            steps = self._steps[count] = _Steps(self.lane, self.groups, count, self.rows or 0, x.device)
        return steps(x)


def _is_simple(group: Group) -> bool:
    """Whether the short way can do all of a group."""
    parameters = [(name, delta) for name, deltas in group.parameters for delta in deltas]
    beside = all(delta in group.products or (name == "bias" and group.rows is not None) for name, delta in parameters)
    pieces = all(len(part.columns) == 1 for part in group.slices)
    return beside and pieces and not (group.asks_base or group.branches or group.streams)


def _part(y: Tensor, columns: _Columns) -> Tensor:
    return y if columns is None else y.narrow(-1, columns[0], columns[1] - columns[0])


class _Steps:
    """The steps of a call with a certain number of entries, in order: inputs, additions, scalings, then of parts."""

    def __init__(self, lane: Lane, groups: tuple[Group, ...], count: int, total: int, device: torch.device) -> None:
        self.lane = lane
        self.whole = not total

        def at(rows: Sequence[int]) -> Entries | None:
            return None if self.whole else Entries(rows, count, total, device)

        self.befores = [(delta, at(rows)) for delta, rows in _by_delta([(g.rows, g.befores) for g in groups])]
        self.products = [(d, at(rows)) for d, rows in _united([(g.rows, g.products) for g in groups])]
        self.biases = [
            (delta, at(rows))
            for delta, rows in _united(
                [(g.rows, [d for name, own in g.parameters if name == "bias" for d in own]) for g in groups]
            )
        ]
        stages: list[tuple[_Columns, list[tuple[Any, Any]], list[tuple[Any, Any]]]] = [
            (None, [(g.rows, [d for d, _ in g.adds]) for g in groups], [(g.rows, g.afters) for g in groups])
        ]
        for columns in sorted({part.columns[0] for group in groups for part in group.slices}):
            own = [
                (g.rows, [d for part in g.slices if part.columns[0] == columns for d in part.deltas]) for g in groups
            ]
            stages.append(
                (
                    columns,
                    [(rows, [d for d in deltas if acts(d, "add")]) for rows, deltas in own],
                    [(rows, [d for d in deltas if acts(d, "after")]) for rows, deltas in own],
                )
            )
        self.stages = [
            (
                columns,
                _low_ranks(adds, at),
                [
                    (d, at(rows))
                    for d, rows in _united([(rows, [d for d in own if not _is_low(d)]) for rows, own in adds])
                ],
                [(d, at(rows)) for d, rows in _by_delta(afters)],
            )
            for columns, adds, afters in stages
        ]
        #: The one step of a map where nothing acts but one low-rank product, as is most common.
        self.only: _LowRankStep | None = None
        if len(self.stages) == 1 and not (self.befores or self.products or self.biases):
            _, low, others, scalings = self.stages[0]
            self.only = low[0] if len(low) == 1 and not (others or scalings) else None

    def forget(self) -> None:
        """Drop what is kept of the deltas."""
        if self.only is not None:
            self.only.forget()
        for _, low, _, _ in self.stages:
            for product in low:
                product.forget()

    def __call__(self, x: Tensor) -> Tensor | None:
        if self.only is not None:
            y = self.lane.product(x)
            self.only(x, y, self.lane.junction.switch.epoch)
            return y
        for product, _ in self.products:
            if not product.adds(x, not self.whole):
                return None
        if self.befores:
            x = self._entered(x)
        y = self.lane.product(x)
        for product, at in self.products:
            own = partial(self.lane.junction.own_weight, self.lane.module)
            _add(y, at, product.add(x if at is None else at.take(x), own))
        for bias, at in self.biases:
            assert at is not None
            at.add(y, self._bias_change(bias))
        epoch = self.lane.junction.switch.epoch
        for columns, low, adds, afters in self.stages:
            part = _part(y, columns)
            for each in low:
                each(x, part, epoch)
            for delta, at in adds:
                change = delta.add(x if at is None else at.take(x))
                if change is not None:
                    _add(part, at, change)
            for delta, at in afters:
                if at is not None:
                    at.put(part, delta.after(at.take(part)))
                elif columns is None:
                    y = part = delta.after(part)
                else:
                    part.copy_(delta.after(part))
        return y

    def _entered(self, x: Tensor) -> Tensor:
        if self.whole:
            for delta, _ in self.befores:
                x = delta.before(x)
            return x
        x = x.clone()
        for delta, at in self.befores:
            assert at is not None
            at.put(x, delta.before(at.take(x)))
        return x

    def _bias_change(self, delta: ParameterDelta) -> Tensor:
        junction = self.lane.junction
        now = self.lane.module._parameters["bias"]
        original = junction.switch.originals.get((junction.path, "bias"))
        base = now if original is None else original
        assert base is not None
        return delta.parameter(base) - base


def _add(y: Tensor, at: Entries | None, change: Tensor) -> None:
    if at is None:
        y.add_(change.to(y.dtype))
    else:
        at.add(y, change)


def _united(by_group: Sequence[tuple[tuple[int, ...] | None, Sequence[Any]]]) -> list[tuple[Any, list[int]]]:
    """Each delta once, with all rows in which it acts; for what is added, whose order does not matter."""
    found: dict[int, tuple[Any, list[int]]] = {}
    for rows, deltas in by_group:
        for delta in deltas:
            found.setdefault(id(delta), (delta, []))[1].extend(rows or ())
    return list(found.values())


def _by_delta(by_group: Sequence[tuple[tuple[int, ...] | None, Sequence[Any]]]) -> list[tuple[Any, list[int]]]:
    """Deltas with the rows in which they act, so that each row meets its own in their order."""
    found: list[tuple[Any, list[int]]] = []
    for level in range(max((len(deltas) for _, deltas in by_group), default=0)):
        found += _united([(rows, deltas[level : level + 1]) for rows, deltas in by_group])
    return found


def _is_low(delta: LinearDelta) -> bool:
    """Whether what a delta adds is a low-rank product and nothing else."""
    found = delta.low_rank()
    return found is not None and not found.dropout and found.bias is None


def _low_ranks(by_group: Sequence[tuple[tuple[int, ...] | None, Sequence[LinearDelta]]], at: Any) -> list[_LowRankStep]:
    """The low-rank products: for all rows, for the rows of one delta, or one for rows with different deltas."""
    low = [(rows, [delta for delta in deltas if _is_low(delta)]) for rows, deltas in by_group]
    if low and low[0][0] is None:
        return [_LowRankStep([delta], [], None) for delta in low[0][1]]
    found: list[_LowRankStep] = []
    mixed: list[tuple[tuple[int, ...], list[LinearDelta]]] = []
    for delta, rows in _united(low):
        if len(rows) >= _ROWS_TOGETHER:
            found.append(_LowRankStep([delta], rows, at(rows)))
        else:
            mixed += [((row,), [delta]) for row in rows]
    by_row: dict[int, list[LinearDelta]] = {}
    for rows_, deltas in mixed:
        by_row.setdefault(rows_[0], []).extend(deltas)
    for level in range(max(map(len, by_row.values()), default=0)):
        rows = sorted(row for row, deltas in by_row.items() if len(deltas) > level)
        own = [by_row[row][level] for row in rows]
        if all(delta is own[0] for delta in own):
            found.append(_LowRankStep(own[:1], rows, at(rows)))
        else:
            found.append(_LowRankStep(own, rows, at(rows)))
    return found


class _LowRankStep:
    """s (x A^T) B^T for some entries: with one delta, or with a delta of its own for each row, as a batched product."""

    def __init__(self, deltas: list[LinearDelta], rows: Sequence[int], at: Entries | None) -> None:
        self.deltas, self.rows, self.at, self.single = deltas, rows, at, len(deltas) == 1
        self._kept: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """Drop what is kept of the deltas, where it takes memory of its own."""
        if self._kept is not None and not self._kept[5]:
            self._kept = None

    def __call__(self, x: Tensor, y: Tensor, epoch: int) -> None:
        """Add it in place to y [entries, ..., out] for the input x [entries, ..., in]."""
        at = self.at
        if at is not None:
            x = at.take(x)
        if x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.numel() <= _FEW * x.shape[-1] * len(self.deltas):
            x = x.float()
        down, up, scale = self._tensors(x.dtype, epoch)
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
            _add(y, at, narrow @ up * scale)
            return
        assert at is not None
        count = len(self.deltas)
        narrow = torch.bmm(x.reshape(count, -1, x.shape[-1]), down)
        if y.dtype is x.dtype and at.index is None and (target := at.take(y)).is_contiguous():
            target.view(count, -1, target.shape[-1]).baddbmm_(narrow, up)
        else:
            at.add(y, torch.bmm(narrow, up).view(*x.shape[:-1], -1))

    def _tensors(self, dtype: torch.dtype, epoch: int) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B^T [r, out] and s; of several deltas A^T [rows, in, r] and s B^T [rows, r, out], filled up."""
        kept = self._kept
        if kept is not None and kept[0] == epoch and kept[1] is dtype and kept[2] == _versions(kept[3]):
            found: tuple[Tensor, Tensor, float] = kept[4]
            return found
        sources = [
            tensor
            for delta in self.deltas
            for tensor in (*delta._parameters.values(), *delta._buffers.values())
            if tensor is not None
        ]
        versions = _versions(sources)
        factors = [_factors(delta) for delta in self.deltas]
        made = factors[0].down.to(dtype), factors[0].up.to(dtype).T, factors[0].scale
        if len(factors) > 1:
            widest = max(len(each.down) for each in factors)
            downs = [_widened(each.down.to(dtype), widest) for each in factors]
            ups = [_widened((each.scale * each.up).to(dtype).T, widest) for each in factors]
            made = torch.stack(downs).mT, torch.stack(ups), 1.0
        own = len(factors) == 1 and made[0] is factors[0].down and factors[0].up.dtype is dtype
        self._kept = None if versions is None else (epoch, dtype, versions, sources, made, own)
        return made


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
