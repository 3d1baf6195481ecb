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

from graftlm.core.delta import ParameterDelta, acts
from graftlm.core.groups import Entries, Group, total_rows
from graftlm.core.stacked import LowRankStep, OneToken, by_delta, is_low, low_ranks, united

if TYPE_CHECKING:
    from graftlm.core.junction import Junction

__all__ = ["Lane", "lane_of", "plain_forward"]

_FORWARD = "forward"
#: How many routings a lane has sorted at the same time.
_WAYS = 32

#: What a map's deltas do, by the names that `OneToken` has for it.
_ALL = frozenset({"befores", "products", "lows", "adds", "afters", "branches"})

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
        if torch.compiler.is_compiling() and (found := self._traced(args, kwargs)) is not None:
            return found
        if torch.is_grad_enabled() or kwargs or len(args) != 1:
            return self._long(args, kwargs)
        groups = junction.plan()
        way = self._way
        if junction.watchers:
            junction.show(args, kwargs)
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

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The map with what acts at it on all rows, as torch.compile can follow it; None where that is not all.

        What is read here of routing and deltas becomes a guard, so that another routing compiles anew.
        """
        junction, switch = self.junction, self.junction.switch
        routing = switch.routing if switch.recomputing is None else switch.recomputing
        if kwargs or len(args) != 1 or self.before is not None or junction.watchers or routing.rows is not None:
            return None
        deltas: list[tuple[Any, tuple[str, ...]]] = []
        for name in routing.whole:
            if name in junction.deltas:
                traced = junction.traced[name]
                if traced is None:
                    return None
                deltas += traced
        x: Tensor = args[0]
        for delta, steps in deltas:
            if delta.training is not self.module.training:
                return None
            if "before" in steps:
                x = delta.before(x)
        y: Tensor = self.inner(x)
        for delta, steps in deltas:
            change = delta.add(x) if "add" in steps else None
            if change is not None:
                y = y + change.to(y.dtype)
        for delta, steps in deltas:
            if "after" in steps:
                y = delta.after(y)
        for delta, steps in deltas:
            if "branch" in steps:
                y = delta.branch(y, y, None)
        return y

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
    return beside and pieces and not (group.asks_base or group.streams)


def _part(y: Tensor, columns: _Columns) -> Tensor:
    return y if columns is None else y.narrow(-1, columns[0], columns[1] - columns[0])


class _Steps:
    """The steps of a call with some number of entries, in order: inputs, additions, scalings; of parts; branches."""

    def __init__(self, lane: Lane, groups: tuple[Group, ...], count: int, total: int, device: torch.device) -> None:
        self.lane, self.count = lane, count
        self.whole, self.packed = not total, lane.junction.packed

        def at(rows: Sequence[int]) -> Entries | None:
            return None if self.whole else Entries(rows, count, total, device)

        self.befores = [(delta, at(rows)) for delta, rows in by_delta([(g.rows, g.befores) for g in groups])]
        self.products = [(d, at(rows)) for d, rows in united([(g.rows, g.products) for g in groups])]
        self.biases = [
            (delta, at(rows))
            for delta, rows in united(
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
                low_ranks(adds, at),
                [
                    (d, at(rows))
                    for d, rows in united([(rows, [d for d in own if not is_low(d)]) for rows, own in adds])
                ],
                [(d, at(rows)) for d, rows in by_delta(afters)],
            )
            for columns, adds, afters in stages
        ]
        sites = {id(delta): site for group in groups for site, delta in group.branches}
        branches = [(g.rows, [delta for _, delta in g.branches]) for g in groups]
        self.branches = [(sites[id(delta)], delta, at(rows)) for delta, rows in by_delta(branches)]
        self.entries = {site.entry for site in sites.values()}
        #: The one step of a map where nothing acts but one low-rank product, as is most common.
        self.only: LowRankStep | None = None
        if len(self.stages) == 1 and not (self.befores or self.products or self.biases or self.branches):
            _, low, others, scalings = self.stages[0]
            self.only = low[0] if len(low) == 1 and not (others or scalings) else None

        #: For one token an entry: what is done for all rows at once.
        self.token: OneToken | None = None
        if not self.whole:
            low_placed = [(delta, rows) for step in self.stages[0][1] for delta, rows in step.placed]
            placed = {
                "befores": _by_rows(self.befores),
                "products": _by_rows(self.products),
                "lows": low_placed,
                "adds": _by_rows(self.stages[0][2]),
                "afters": _by_rows(self.stages[0][3]),
            }
            reading = [
                (site.entry if site.kind == "sublayer" and delta.reads_input else "", delta, at.rows)
                for site, delta, at in self.branches
                if at is not None
            ]
            width = int(getattr(lane.module, "out_features", 0) or getattr(lane.module, "nf", 0))
            token = OneToken(placed, reading, width, count, total)
            self.token = None if token.idle else token

    def forget(self) -> None:
        """Drop what is kept of the deltas."""
        for step in (self.only, self.token):
            if step is not None:
                step.forget()
        for _, low, _, _ in self.stages:
            for product in low:
                product.forget()

    def __call__(self, x: Tensor) -> Tensor | None:
        epoch = self.lane.junction.switch.epoch
        if self.only is not None:
            y = self.lane.product(x)
            self.only(x, y, epoch)
            return y
        token = self.token
        once = token is not None and x.numel() == self.count * x.shape[-1]
        left = token.others if once and token is not None else _ALL
        if "products" in left and not (self.packed or all(p.adds(x, not self.whole) for p, _ in self.products)):
            return None
        if not once or token is None:
            x = self._entered(x)
            y = self._added(x, self.lane.product(x), left, epoch)
            y = self._scaled(x, y, left, epoch)
            return self._branched(x, y) if self.branches else y
        flat = x.reshape(self.count, -1)
        made = token.made(flat, epoch)
        if made.before is not None:
            flat = flat * made.before
        elif "befores" in left:
            flat = self._entered(x).view(flat.shape)
        y = self.lane.product(flat).contiguous()
        made.add(flat, y)
        shape = x.shape
        x = flat.view(shape)
        if left or self.biases:
            self._added(x, y.view(*shape[:-1], -1), left, epoch)
        y = made.finish(y).view(*shape[:-1], -1)
        if "afters" in left or len(self.stages) > 1:
            y = self._scaled(x, y, left, epoch)
        if not self.branches:
            return y
        if "branches" in left:
            return self._branched(x, y)
        made.branch(y.view(self.count, -1), partial(self._given, x))
        for entry in self.entries:
            self.lane.junction.switch.seen.pop(entry, None)
        return y

    def _given(self, x: Tensor, entry: str) -> Tensor:
        """What the module at `entry` was given, [entries, in], for the map's own input x."""
        junction = self.lane.junction
        return (x if entry == junction.path else junction.switch.seen_at(entry)).reshape(self.count, -1)

    def _added(self, x: Tensor, y: Tensor, kinds: frozenset[str], epoch: int) -> Tensor:
        """y with additions of these kinds, made in place."""
        if "products" in kinds:
            for product, at in self.products:
                own = x if at is None else at.take(x)
                _add(y, at, self.lane.junction.product(self.lane.module, product, own))
        for bias, at in self.biases:
            assert at is not None
            at.add(y, self._bias_change(bias))
        _, low, adds, _ = self.stages[0]
        for each in low if "lows" in kinds else ():
            each(x, y, epoch)
        for delta, at in adds if "adds" in kinds else ():
            change = delta.add(x if at is None else at.take(x))
            if change is not None:
                _add(y, at, change)
        return y

    def _scaled(self, x: Tensor, y: Tensor, kinds: frozenset[str], epoch: int) -> Tensor:
        """y with what comes behind the additions: scalings of these kinds, and what acts at parts of the map."""
        if "afters" in kinds:
            y = _after(y, self.stages[0][3])
        for columns, low, adds, afters in self.stages[1:]:
            part = _part(y, columns)
            for each in low:
                each(x, part, epoch)
            for delta, at in adds:
                change = delta.add(x if at is None else at.take(x))
                if change is not None:
                    _add(part, at, change)
            changed = _after(part, afters)
            if changed is not part:
                part.copy_(changed)
        return y

    def _branched(self, x: Tensor, y: Tensor) -> Tensor:
        switch = self.lane.junction.switch
        for site, delta, at in self.branches:
            part = y if at is None else at.take(y)
            given = part
            if site.kind == "sublayer" and delta.reads_input:
                given = x if site.entry == site.path else switch.seen_at(site.entry)
                given = given if at is None else at.take(given)
            mask = switch.batch.mask_like(x) if delta.reads_mask else None
            changed = delta.branch(
                given.reshape(part.shape), part, mask if mask is None or at is None else at.take(mask)
            )
            if at is None:
                y = changed
            else:
                at.put(y, changed)
        for entry in self.entries:
            switch.seen.pop(entry, None)
        return y

    def _entered(self, x: Tensor) -> Tensor:
        if not self.befores:
            return x
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


def _after(y: Tensor, afters: Sequence[tuple[Any, Entries | None]]) -> Tensor:
    """y as `afters` leave it: for some entries in place, for all a new tensor."""
    for delta, at in afters:
        if at is None:
            y = delta.after(y)
        else:
            at.put(y, delta.after(at.take(y)))
    return y


def _by_rows(placed: Sequence[tuple[Any, Entries | None]]) -> list[tuple[Any, Sequence[int]]]:
    return [(delta, at.rows) for delta, at in placed if at is not None]


def _add(y: Tensor, at: Entries | None, change: Tensor) -> None:
    if at is None:
        y.add_(change.to(y.dtype))
    else:
        at.add(y, change)
