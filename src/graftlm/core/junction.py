"""Junctions: where deltas meet a module of the base, through two hooks that stay the same whatever is attached.

A junction lives in the module's `__dict__` (not among its children), so the base keeps its class, repr, parameter
names and checkpoint keys, and a copy of the model carries its own deltas. The hooks are plain functions of this file
that look the junction up in the module they are given. Before the call, parameters are replaced and inputs changed;
after it, the parameters are put back and the additions made. With one choice a row, each group gets its own deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from graftlm.core.attention import Splice
from graftlm.core.delta import (
    Base,
    BranchDelta,
    Delta,
    EmbedDelta,
    KeyValueDelta,
    LinearDelta,
    LowRank,
    ParameterDelta,
    acts,
)
from graftlm.core.groups import Entries, Group, Rows, Slice, total_rows
from graftlm.core.lane import Lane, plain_forward
from graftlm.core.routing import Batch, Choice, Routing
from graftlm.core.sequence import Layout, check_cache, positions_by_mask
from graftlm.core.sites import Site, linear_kind
from graftlm.core.storage import dense, is_across, is_packed, plain_weight, turned
from graftlm.errors import Finding, RoutingError

__all__ = ["Junction", "MapChange", "Replay", "Switch", "columns_of", "junction_of"]

_KEY = "_graftlm_junction"
#: How many routings a junction has a plan of at the same time.
_PLANS = 32


@dataclass(frozen=True)
class _Kinds:
    """What there is among groups."""

    prefixed: bool = False
    placed: bool = False  # prompts, or positions that are moved
    prefixes: bool = False
    inputs: bool = False  # changes of a module's input
    outputs: bool = False  # changes of its output
    branches_alone: bool = False  # and no other changes of its output
    entries: tuple[str, ...] = ()  # the sites whose input branches read

    @classmethod
    def of(cls, groups: Sequence[Group]) -> _Kinds:
        """The kinds among `groups`."""
        others = any(group.acts or group.parameters for group in groups)
        branches = any(group.branches for group in groups)
        return cls(
            prefixed=any(group.prefixed for group in groups),
            placed=any(group.prompts or group.shift for group in groups),
            prefixes=any(group.prefixes for group in groups),
            inputs=any(group.befores or group.streams for group in groups),
            outputs=others or branches,
            branches_alone=branches and not others,
            entries=tuple({site.entry for group in groups for site, _ in group.branches}),
        )


@dataclass
class Switch:
    """What every junction of one model reads at each call: the routing in force and the current batch.

    `asked` is the routing that was asked for; `routing` is what is left to do of it once merged adapters, which act
    through the weights, are left out.
    """

    asked: Routing = field(default_factory=Routing)
    routing: Routing = field(default_factory=Routing)
    merged: tuple[str, ...] = ()
    #: The base's own parameters where a merge put others in place, by (module path, name).
    originals: dict[tuple[str, str], nn.Parameter | None] = field(default_factory=dict)
    batch: Batch = field(default_factory=Batch)
    #: Counts the model's calls, but for those that go on from a cache: what lanes keep of the deltas holds for one.
    epoch: int = 0
    #: Whether the call in progress goes on from a cache.
    going_on: bool = False
    #: What sublayers were given, by the path of their first module, from there until their end.
    seen: dict[str, Tensor] = field(default_factory=dict)
    #: The mask of an attention call for one token, what it was widened for, and the wide one.
    widened: tuple[Any, ...] = (None, None, None)
    #: The routing of the forward that is being recomputed, while it is.
    recomputing: Routing | None = None
    #: Routings of training forwards that checkpointing not by transformers may still recompute.
    awaiting: list[Routing] = field(default_factory=list)
    recomputed: bool = False

    def route(self, asked: Routing) -> None:
        """Put `asked` in force."""
        self.asked = asked
        self.routing = asked.without(self.merged)
        self.batch.forget()

    def current(self) -> Routing:
        """The routing for this call: in a backward pass (recomputation) that of the forward it repeats."""
        if self.recomputing is not None:
            return self.recomputing
        if not self.awaiting or torch._C._current_graph_task_id() == -1:
            return self.routing
        self.recomputed = True
        if len(self.awaiting) > 1:
            raise RoutingError(
                Finding(
                    "R105",
                    f"forwards with different adapters ({'; '.join(str(r) for r in self.awaiting)}) wait for one "
                    "backward under a checkpointing that does not say which is recomputed",
                    fix="run backward after each forward, or use the model's own gradient checkpointing",
                )
            )
        return self.awaiting[0]

    def seen_at(self, path: str) -> Tensor:
        """What the module at `path` was given last."""
        return self.seen[path]

    def remember(self) -> None:
        """Note the routing of a training forward that starts now, for its recomputation."""
        if not torch.is_grad_enabled():
            return
        if self.recomputed:
            self.awaiting, self.recomputed = [], False
        if self.routing not in self.awaiting:
            # Without checkpointing nothing ever asks for these: keep the list short.
            self.awaiting = [*self.awaiting[-31:], self.routing]


@dataclass(frozen=True)
class MapChange:
    """All that acts at a linear map on all rows, where it is this: y = W (scalings x) + b + products + shifts."""

    low: tuple[LowRank, ...] = ()
    shifts: tuple[Tensor, ...] = ()  # each [out]
    scalings: tuple[Tensor, ...] = ()  # of the input, each [in]

    @property
    def idle(self) -> bool:
        """Whether nothing acts."""
        return not (self.low or self.shifts or self.scalings)


class Replay:
    """Stands for a block's checkpointing function: what it recomputes meets the routing of its own forward."""

    def __init__(self, checkpoint: Callable[..., Any], switch: Switch) -> None:
        self.checkpoint, self.switch = checkpoint, switch

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `block` as before; its recomputation is routed like this call."""
        routing, switch, mask = self.switch.current(), self.switch, self.switch.batch.mask

        def replayed(*inputs: Any, **options: Any) -> Any:
            before, switch.recomputing = switch.recomputing, routing
            later, switch.batch.mask = switch.batch.mask, mask
            try:
                return block(*inputs, **options)
            finally:
                switch.recomputing, switch.batch.mask = before, later

        return self.checkpoint(replayed, *args, **kwargs)


class Junction:
    """The deltas attached at one module, by adapter, and the plan of the routing in force."""

    def __init__(self, module: nn.Module, path: str, rows: str, switch: Switch) -> None:
        self.path, self.rows, self.switch = path, rows, switch
        #: Whether the module is a linear map or an embedding.
        self.maps = linear_kind(module) is not None
        #: Whether the weight is packed, so that no other can stand in its place.
        self.packed = is_packed(module)
        self.deltas: dict[str, list[tuple[Site, str, Delta]]] = {}  # adapter -> (site, parameter name, delta)
        #: Adapter -> its deltas and what each does, where that is all on linear maps; else None. For torch.compile.
        self.traced: dict[str, tuple[tuple[Delta, tuple[str, ...]], ...] | None] = {}
        #: Adapters with a delta elsewhere that reads what this module is given.
        self.watchers: set[str] = set()
        #: By how many positions an adapter with prefixes moves the tokens of this sequence.
        self.shifts: dict[str, int] = {}
        #: Whether any adapter has virtual tokens here.
        self.prompted = False
        self._planned: tuple[Routing, tuple[Group, ...]] | None = None
        #: What there is among the planned groups; asked at every call, worked out with the plan.
        self._kinds = _Kinds()
        #: The prefixes of a generation in progress, put together.
        self.kept_prefix: tuple[Any, ...] | None = None
        self._plans: dict[Routing, tuple[tuple[Group, ...], _Kinds]] = {}
        self._followed: tuple[Any, ...] = ()
        self._kept_rows: tuple[tuple[Group, ...], int, torch.device, Rows] | None = None
        self._kept_places: tuple[tuple[Group, ...], int, torch.device, tuple[Entries, ...]] | None = None
        self._taken: dict[str, Tensor | None] = {}
        self._added = False
        #: Of a stack's entry: whether its tokens see only earlier ones, whether its output keeps virtual tokens, and
        #: the entry of the encoder whose output it reads, of a decoder.
        self.causal = False
        self.keeps_virtual = False
        self.encoder: Junction | None = None
        #: A module's configuration, its attention implementation, and the copy that it is given instead.
        self.substitute: tuple[Any, Any, Any] | None = None
        self._splice: Splice | None = None
        self._layout: Layout | None = None
        module.__dict__[_KEY] = self
        self._lane = Lane(module, self) if linear_kind(module) in ("linear", "conv1d") else None
        self._handles: list[RemovableHandle] = []
        if self._lane is None:
            self._handles = [
                module.register_forward_pre_hook(_enter, with_kwargs=True),
                module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
            ]

    def put(self, adapter: str, delta: Delta, site: Site, parameter: str = "") -> None:
        """Attach `delta` for `adapter`; `parameter` names what a parameter delta stands for."""
        self.deltas.setdefault(adapter, []).append((site, parameter, delta))
        self.traced[adapter] = _traced(self.deltas[adapter])
        # Not by a look through all of them: the hundredth adapter comes as quickly as the first.
        self.prompted = self.prompted or isinstance(delta, EmbedDelta)
        self._planned = None
        self._plans.clear()

    def take(self, adapter: str, module: nn.Module) -> None:
        """Remove what `adapter` put here; the last one out removes the junction itself."""
        self.settle(module)
        self.deltas.pop(adapter, None)
        self.traced.pop(adapter, None)
        self.watchers.discard(adapter)
        self.shifts.pop(adapter, None)
        self._lost_deltas()
        if self.encoder is not None and not self.encoder.deltas:
            self.encoder = None
        if not (self.deltas or self.watchers or self.shifts or self.encoder):
            for handle in self._handles:
                handle.remove()
            if self._lane is not None:
                self._lane.remove()
            module.__dict__.pop(_KEY, None)

    def _lost_deltas(self) -> None:
        # Asked at every call, also of the many where nothing acts: worked out when something goes.
        self.prompted = any(isinstance(delta, EmbedDelta) for placed in self.deltas.values() for _, _, delta in placed)
        self._planned = None
        self._plans.clear()

    # --- the plan ---

    def _products(self, parameters: Iterable[ParameterDelta]) -> tuple[ParameterDelta, ...]:
        """Those of the weight's `parameters` that may act beside the map; all of them where it is packed."""
        return tuple(delta for delta in parameters if self.packed or delta.has_add) if self.maps else ()

    def plan(self) -> tuple[Group, ...]:
        """The groups of the routing in force, without idle ones where one choice holds for all rows."""
        routing = self.switch.current()
        if self._planned is None or self._planned[0] is not routing:
            known = self._plans.get(routing)
            if known is None:
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                groups = self._groups(routing)
                known = self._plans[routing] = groups, _Kinds.of(groups)
            groups, self._kinds = known
            self._planned = (routing, groups)
            self.kept_prefix = None
        return self._planned[1]

    def _groups(self, routing: Routing) -> tuple[Group, ...]:
        if routing.rows is None:
            return tuple(g for g in (self._group(routing.whole, None),) if not g.idle)
        groups = tuple(self._group(choice, rows) for choice, rows in routing.groups)
        return () if all(group.idle for group in groups) else groups

    def _group(self, choice: Choice, rows: tuple[int, ...] | None) -> Group:
        linear: list[LinearDelta] = []
        slices: dict[tuple[tuple[int, int], ...], list[LinearDelta]] = {}
        parameters: dict[str, list[ParameterDelta]] = {}
        others: dict[str, list[Any]] = {"branches": [], "streams": [], "prefixes": [], "prompts": []}
        for name in choice:
            for site, parameter, delta in self.deltas.get(name, ()):
                if isinstance(delta, LinearDelta):
                    (slices.setdefault(site.columns, []) if site.columns else linear).append(delta)
                elif isinstance(delta, ParameterDelta):
                    parameters.setdefault(parameter, []).append(delta)
                elif isinstance(delta, KeyValueDelta):
                    others["prefixes"].append(delta)
                elif isinstance(delta, EmbedDelta):
                    others["prompts"].append(delta)
                elif isinstance(delta, BranchDelta) and site.kind == "stream" and site.entry == "norm":
                    others["streams"].append(delta)
                else:
                    others["branches"].append((site, delta))
        asking = any(acts(delta, "add_over") for delta in (*linear, *(d for part in slices.values() for d in part)))
        return Group(
            rows,
            products=() if asking and not self.packed else self._products(parameters.get("weight", ())),
            packed=self.packed,
            befores=tuple(delta for delta in linear if acts(delta, "before")),
            adds=tuple(
                (delta, acts(delta, "add_over")) for delta in linear if acts(delta, "add") or acts(delta, "add_over")
            ),
            afters=tuple(delta for delta in linear if acts(delta, "after")),
            slices=tuple(Slice(columns, tuple(deltas)) for columns, deltas in slices.items()),
            parameters=tuple((name, tuple(deltas)) for name, deltas in parameters.items()),
            shift=sum(self.shifts.get(name, 0) for name in choice),
            prefixed=any(name in self.shifts for name in choice),
            **{name: tuple(found) for name, found in others.items()},
        )

    def change(self, module: nn.Module, device: torch.device, weight: Tensor | None) -> MapChange | None:
        """What acts at a linear map now, for all rows; None where that is not all that there is to do.

        `weight` [out, in] is what the map multiplies by, None where nobody may ask. Who asks makes the changes itself:
        with the module's call left out all of them, else those behind the input, and says so by `added`.
        """
        if self.watchers:
            return None
        groups = self.plan()
        if not groups:
            return MapChange()
        group, stored = groups[0], module._parameters.get("weight")
        if group.rows is not None or not (group.map_only or (group.asks_base and len(group.everything) == 1)):
            return None
        self.follow(module, groups, device)
        scalings = [delta.as_scaling() for delta in group.befores]
        low: list[LowRank] = []
        shifts: list[Tensor] = []
        for delta, over in group.adds:
            found = delta.low_rank()
            if over:
                found = None if weight is None or stored is None else delta.low_rank_over(weight, stored)
            shift = delta.as_shift() if found is None else None
            if found is not None:
                low.append(found)
            elif shift is not None:
                shifts.append(shift)
            else:
                return None
        if None in scalings:
            return None
        return MapChange(tuple(low), tuple(shifts), tuple(scalings))  # type: ignore[arg-type]

    @property
    def hooks(self) -> int:
        """How many hooks of each kind it has at its module: none at a linear map, which has a lane."""
        return len(self._handles) // 2

    def added(self) -> None:
        """The output of the call in progress has what `change` gave already."""
        self._added = True

    # --- one call ---

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module runs: put parameters in place, change inputs."""
        self.settle(module)
        groups = self.plan()
        if self.watchers:
            self.show(args, kwargs)
        if self.encoder is not None:
            kwargs = self.encoder.for_decoder(kwargs)
        if not groups:
            if self.prompted:
                check_cache(kwargs)
            return (args, kwargs) if self.encoder is not None else None
        counted, kinds = None, self._kinds
        if kinds.prefixed:
            counted = positions_by_mask(module, groups, args, kwargs)
            args, kwargs = counted or (args, kwargs)
        if kinds.placed:
            self.follow(module, groups, _input(args, kwargs)[1].device)
            self._layout = Layout.of(module, self, groups, args, kwargs)
            return (), self._layout.inputs
        if counted:
            return counted
        at, x = _input(args, kwargs)
        self.follow(module, groups, x.device)
        if kinds.prefixes:
            self._splice = Splice(module, self, groups, x)
        if groups[0].rows is None:
            group = groups[0]
            self._replace(module, group, group.beside(x))
            if not (group.befores or group.streams):
                return (args, kwargs) if self.encoder is not None else None
            for delta in group.befores:
                x = delta.before(x)
            for branch in group.streams:
                x = branch.branch(plain_forward(module)(x), x, self.switch.batch.mask_like(x))
            return _with_input(args, kwargs, at, x)
        return self._enter_rows(module, args, kwargs, at, x, groups)

    def show(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the module's input for the adapters in force that read it elsewhere."""
        if not self.watchers.isdisjoint(self.switch.current().names):
            self.switch.seen[self.path] = _input(args, kwargs)[1]

    def for_decoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A decoder's arguments, with the mask of this encoder's output as its virtual tokens widened it."""
        states, groups = kwargs.get("encoder_hidden_states"), self.plan()
        if not isinstance(states, Tensor) or not any(group.prompts for group in groups):
            return kwargs
        return {
            **kwargs,
            "encoder_attention_mask": Layout.memory(self, groups, states, kwargs.get("encoder_attention_mask")),
        }

    def follow(self, module: nn.Module, groups: tuple[Group, ...], device: torch.device) -> None:
        """Bring the deltas to the device of their input and the mode of their module, where either has changed."""
        kept = self._followed
        if kept and kept[0] is groups and kept[1:] == (module.training, device):
            return
        for group in groups:
            for delta in group.everything:
                _follow(delta, module, device)
        self._followed = (groups, module.training, device)

    def _enter_rows(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        at: int | str,
        x: Tensor,
        groups: tuple[Group, ...],
    ) -> Any:
        total, count = total_rows(groups), int(x.shape[0])
        if count == 1 and total > 1:
            # One entry for all rows (positions): give each row its own.
            width = self.switch.batch.rows or total
            args, kwargs = _split(args, kwargs, count, torch.zeros(width, dtype=torch.long, device=x.device))
            x = _input(args, kwargs)[1]
            count = width
        if self.rows == "unknown" or count % total:
            raise RoutingError(
                Finding(
                    "R106",
                    f"cannot tell which row each of the {count} entries at {self.path} belongs to ({total} rows)",
                    fix="give all rows of the batch the same adapters: use(model, NAME)",
                )
            )
        if self._kinds.inputs:
            rows = self._rows(groups, count, x.device)
            parts = list(rows.split(x))
            for place, (group, index) in enumerate(zip(groups, rows.indices, strict=True)):
                for delta in group.befores:
                    parts[place] = delta.before(parts[place])
                for branch in group.streams:
                    mask = self.switch.batch.mask_like(x, index)
                    parts[place] = branch.branch(plain_forward(module)(parts[place]), parts[place], mask)
            x = rows.join(parts)
        return _with_input(args, kwargs, at, x)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the module ran, even in vain: put parameters back, then change the output."""
        try:
            if output is None or self._added:
                return None
            if self._layout is not None:
                return self._layout.trim(output)
            groups = self.plan()
            if not groups:
                return None
            _, x = _input(args, kwargs)
            if groups[0].rows is not None:
                self._put_back(module)
                output = self._leave_rows(module, args, kwargs, x, output, groups)
            else:
                output = self._changed(module, groups[0], x, output, None, x)
            for entry in self._kinds.entries:
                self.switch.seen.pop(entry, None)
            return output
        finally:
            self.settle(module)

    def _changed(
        self, module: nn.Module, group: Group, x: Tensor, output: Any, index: Tensor | None, whole: Tensor
    ) -> Any:
        """The output of `module` for input `x`, as the deltas of `group` change it.

        `index` are its entries in the `whole` input, None for all.
        """
        for product in group.beside(x) if group.products else ():
            output = output + self.product(module, product, x).to(output.dtype)
        if group.acts:
            base = self._base(module, group, output, index, whole) if group.asks_base else None
            for delta, over in group.adds:
                added = delta.add_over(x, base) if over and base is not None else delta.add(x)
                if added is not None:
                    output = output + added.to(output.dtype)
            for delta in group.afters:
                output = delta.after(output)
            for part in group.slices:
                output = _change_slice(part, x, output, base)
        if group.branches:
            output = self._branched(group, x, output, index, whole)
        return output

    def _branch_rows(self, groups: tuple[Group, ...], x: Tensor, output: Any, rows: Rows) -> Any:
        """As by groups, but without gradients: only the rows that change are touched, in a copy."""
        y: Tensor = (output[0] if isinstance(output, tuple) else output).clone()
        for group, index, at in zip(groups, rows.indices, self._places(groups, int(x.shape[0]), x.device), strict=True):
            if group.branches:
                at.put(y, self._branched(group, at.take(x), at.take(y), index, x))
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _places(self, groups: tuple[Group, ...], count: int, device: torch.device) -> tuple[Entries, ...]:
        """The entries of each group; kept, as `_rows` are."""
        kept = self._kept_places
        if kept is None or kept[0] is not groups or kept[1:3] != (count, device):
            total = total_rows(groups)
            places = tuple(Entries(group.rows or (), count, total, device) for group in groups)
            self._kept_places = kept = (groups, count, device, places)
        return kept[3]

    def _branched(self, group: Group, x: Tensor, output: Any, index: Tensor | None, whole: Tensor) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        for site, delta in group.branches:
            given = y
            if site.kind == "sublayer" and delta.reads_input:
                given = x if site.entry == site.path else self.switch.seen_at(site.entry)
                if site.entry != site.path and index is not None:
                    given = given.index_select(0, index)
            mask = self.switch.batch.mask_like(whole, index) if delta.reads_mask else None
            y = delta.branch(given.reshape(y.shape), y, mask)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def product(self, module: nn.Module, delta: ParameterDelta, x: Tensor) -> Tensor:
        """What `delta`, which stands for the map's weight, adds to its output, [..., out], for the input x [..., in].

        One without an `add` gives the weight as it is to be: the difference is made again in the backward pass, so that
        nothing dense is kept where weights are packed.
        """
        own = partial(self.own_weight, module)
        if delta.has_add:
            return delta.add(x, own)
        across = is_across(module)

        def changed(x: Tensor) -> Tensor:
            base = own().detach()
            change = (delta.parameter(base) - base).to(x.dtype)
            return x @ change if across else F.linear(x, change)

        if not torch.is_grad_enabled():
            return changed(x)
        found: Tensor = checkpoint(changed, x, use_reentrant=False, preserve_rng_state=False)
        return found

    def _base(self, module: nn.Module, group: Group, output: Tensor, index: Tensor | None, whole: Tensor) -> Base:
        across = linear_kind(module) == "conv1d"
        bias = getattr(module, "bias", None)
        forward = plain_forward(module)
        beside = group.products if group.packed else ()

        def bare(z: Tensor) -> Tensor:
            y: Tensor = forward(z)
            y = y if bias is None else y - bias
            for product in beside:
                y = y + self.product(module, product, z).to(y.dtype)
            return y

        def weight() -> Tensor:
            whole = dense(module)
            for product in beside:
                base = self.own_weight(module)
                whole = whole + turned(module, product.parameter(base) - base)
            return whole.T if across else whole

        mask = self.switch.batch.mask_like(whole, index)
        stored = None if beside else module._parameters.get("weight")
        return Base(output=output, map=bare, weight=weight, stored=stored, bias=bias, mask=mask)

    def _leave_rows(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        output: Any,
        groups: tuple[Group, ...],
    ) -> Any:
        if not self._kinds.outputs:
            return output
        count = int(x.shape[0])
        rows = self._rows(groups, count, x.device)
        if isinstance(output, Tensor) and output.shape[0] == 1 < count:
            # One entry for all rows (positions made inside the module).
            output = output.expand(count, *output.shape[1:])
        if not isinstance(output, (Tensor, tuple)):
            raise RoutingError(
                Finding("R107", f"{self.path} returns {type(output).__name__}: rows cannot be told apart there")
            )
        if self._kinds.branches_alone and not torch.is_grad_enabled():
            return self._branch_rows(groups, x, output, rows)
        parts, given = list(_split_output(output, rows, count)), rows.split(x)
        for place, (group, index) in enumerate(zip(groups, rows.indices, strict=True)):
            beside = group.beside(given[place])
            if len(beside) < sum(len(deltas) for _, deltas in group.parameters):
                assert index is not None
                # The rows again, with this group's parameters; its forward, so that no hook runs twice.
                self._replace(module, group, beside)
                try:
                    part_args, part_kwargs = _split(args, kwargs, count, index)
                    part = plain_forward(module)(*part_args, **part_kwargs)
                    if isinstance(part, Tensor) and part.shape[0] == 1 < len(index):
                        part = part.expand(len(index), *part.shape[1:])
                    parts[place] = self._changed(module, group, given[place], part, index, x)
                finally:
                    self._put_back(module)
            elif group.acts or group.branches or beside:
                parts[place] = self._changed(module, group, given[place], parts[place], index, x)
        return _join_output(output, parts, rows, count)

    def _rows(self, groups: tuple[Group, ...], count: int, device: torch.device) -> Rows:
        """How `count` entries fall to the groups; kept, since every step of a batch asks the same."""
        kept = self._kept_rows
        if kept is None or kept[0] is not groups or kept[1:3] != (count, device):
            self._kept_rows = kept = (groups, count, device, Rows.of(groups, count, device))
        return kept[3]

    def _replace(self, module: nn.Module, group: Group, beside: Sequence[ParameterDelta]) -> None:
        """Put the parameters of `group` in place; what acts `beside` its map is left out."""
        for name, deltas in group.parameters:
            if beside:
                deltas = tuple(delta for delta in deltas if not any(delta is other for other in beside))
                if not deltas:
                    continue
            now = module._parameters[name]
            assert now is not None
            self._taken[name] = now
            original = self.switch.originals.get((self.path, name))
            base = now if original is None else original
            value = deltas[0].parameter(base)
            if now is not base:  # an adapter is merged into it: the changes add up
                value = now + (value - base)
            for delta in deltas[1:]:
                value = value + (delta.parameter(base) - base)
            module._parameters[name] = value  # type: ignore[assignment]

    def own_weight(self, module: nn.Module) -> Tensor:
        """The base's own weight, whatever is merged into it or stands in its place during this call.

        A packed one as numbers, in the layout that it had before.
        """
        original = self.switch.originals.get((self.path, "weight"))
        if self.packed:
            return plain_weight(module, original)
        now = self._taken["weight"] if "weight" in self._taken else module._parameters["weight"]
        found = now if original is None else original
        assert found is not None
        return found

    def _put_back(self, module: nn.Module) -> None:
        for name, own in self._taken.items():
            module._parameters[name] = own  # type: ignore[assignment]
        self._taken.clear()

    def settle(self, module: nn.Module) -> None:
        """Put back what belongs to the module itself, also after a call that was interrupted."""
        self._put_back(module)
        self._added = False
        if self._splice is not None:
            self._splice.remove(module)
            self._splice = None
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts between calls, and with a configuration of its own.
        return {
            **self.__dict__,
            "_layout": None,
            "_splice": None,
            "substitute": None,
            "_planned": None,
            "_plans": {},
            "kept_prefix": None,
        }

    @property
    def splice(self) -> Splice | None:
        """What the attention call in progress is given."""
        return self._splice


def _traced(placed: Sequence[tuple[Site, str, Delta]]) -> tuple[tuple[Delta, tuple[str, ...]], ...] | None:
    """Deltas of one adapter at a linear map with the steps that they do; None where other things act there."""
    found: list[tuple[Delta, tuple[str, ...]]] = []
    for site, _, delta in placed:
        if isinstance(delta, BranchDelta) and site.kind != "stream" and not (delta.reads_input or delta.reads_mask):
            found.append((delta, ("branch",)))
            continue
        if not isinstance(delta, LinearDelta) or site.columns or acts(delta, "add_over"):
            return None
        found.append((delta, tuple(step for step in ("before", "add", "after") if acts(delta, step))))
    return tuple(found)


def _change_slice(part: Slice, x: Tensor, output: Tensor, base: Base | None) -> Tensor:
    """`output` with the columns of one part of a fused map changed."""
    index = columns_of(part.columns, output.device)
    y = output.index_select(-1, index)
    if base is not None:
        whole = base

        def bare(z: Tensor) -> Tensor:
            return whole.map(z).index_select(-1, index)

        bias = None if base.bias is None else base.bias[index]
        base = replace(
            base, output=base.output.index_select(-1, index), map=bare, weight=lambda: whole.weight()[index], bias=bias
        )
    for delta in part.deltas:
        added = delta.add_over(x, base) if base is not None and acts(delta, "add_over") else delta.add(x)
        if added is not None:
            y = y + added.to(y.dtype)
    for delta in part.deltas:
        if acts(delta, "after"):
            y = delta.after(y)
    return output.index_copy(-1, index, y)


def columns_of(columns: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The output columns that ranges (start, stop) name, in order; int64 on `device`."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in columns])


def _split_output(output: Any, rows: Rows, count: int) -> Iterable[Any]:
    """`output` (a tensor, or a tuple: a router's, a block's) by group; what has no entry a row goes to every group."""
    if isinstance(output, Tensor):
        return rows.split(output)
    by_part = [
        rows.split(each) if isinstance(each, Tensor) and each.shape[0] == count else (each,) * len(rows.sizes)
        for each in output
    ]
    return zip(*by_part, strict=True)


def _join_output(output: Any, parts: Sequence[Any], rows: Rows, count: int) -> Any:
    if isinstance(output, Tensor):
        return rows.join(parts)
    return tuple(
        rows.join([part[place] for part in parts]) if isinstance(each, Tensor) and each.shape[0] == count else each
        for place, each in enumerate(output)
    )


def junction_of(module: nn.Module) -> Junction | None:
    """The junction at `module`, if there is one."""
    return module.__dict__.get(_KEY)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module.__dict__[_KEY].enter(module, args, kwargs)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return module.__dict__[_KEY].leave(module, args, kwargs, output)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
    """Where the call's first tensor stands, and the tensor."""
    for position, value in enumerate(args):
        if isinstance(value, Tensor):
            return position, value
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name, value
    raise RoutingError(Finding("R108", "a module with deltas was called without a tensor"))


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], at: int | str, x: Tensor) -> Any:
    if isinstance(at, int):
        return (*args[:at], x, *args[at + 1 :]), kwargs
    return args, {**kwargs, at: x}


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], count: int, index: Tensor) -> Any:
    """The call's arguments with every tensor of `count` entries cut down to `index`."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
            return value.index_select(0, index)
        return value

    return tuple(cut(a) for a in args), {name: cut(a) for name, a in kwargs.items()}


def _follow(delta: Delta, module: nn.Module, device: torch.device) -> None:
    """Bring `delta` to the device of its input and the mode of its module; parameters keep their identity."""
    if delta.training is not module.training:
        delta.train(module.training)
    for tensor in (*delta.parameters(), *delta.buffers()):
        if tensor.device != device and not tensor.is_meta:
            tensor.data = tensor.data.to(device)
