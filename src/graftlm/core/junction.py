"""Junctions: where deltas meet a module of the base, through two hooks that stay the same whatever is attached.

A junction lives in the module's `__dict__` (not among its children), so the base keeps its class, repr, parameter
names and checkpoint keys, and a copy of the model carries its own deltas. The hooks are plain functions of this file
that look the junction up in the module they are given. Before the call, parameters are replaced and inputs changed;
after it, the parameters are put back and the additions made. With one choice a row, each group gets its own deltas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlm.core.delta import Delta, LinearDelta, ParameterDelta, acts
from graftlm.core.routing import Batch, Choice, Routing, entries
from graftlm.errors import Finding, RoutingError

__all__ = ["Junction", "Replay", "Switch", "junction_of"]

_KEY = "_graftlm_junction"


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

    def remember(self) -> None:
        """Note the routing of a training forward that starts now, for its recomputation."""
        if not torch.is_grad_enabled():
            return
        if self.recomputed:
            self.awaiting, self.recomputed = [], False
        if self.routing not in self.awaiting:
            # Without checkpointing nothing ever asks for these: keep the list short.
            self.awaiting = [*self.awaiting[-31:], self.routing]


class Replay:
    """Stands for a block's checkpointing function: what it recomputes meets the routing of its own forward."""

    def __init__(self, checkpoint: Callable[..., Any], switch: Switch) -> None:
        self.checkpoint, self.switch = checkpoint, switch

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `block` as before; its recomputation is routed like this call."""
        routing, switch = self.switch.current(), self.switch

        def replayed(*inputs: Any, **options: Any) -> Any:
            before, switch.recomputing = switch.recomputing, routing
            try:
                return block(*inputs, **options)
            finally:
                switch.recomputing = before

        return self.checkpoint(replayed, *args, **kwargs)


@dataclass(frozen=True)
class _Group:
    """The deltas that act on some rows: `rows` None means all."""

    rows: tuple[int, ...] | None
    befores: tuple[LinearDelta, ...]
    adds: tuple[LinearDelta, ...]
    afters: tuple[LinearDelta, ...]
    parameters: tuple[tuple[str, tuple[ParameterDelta, ...]], ...]

    @property
    def idle(self) -> bool:
        return not (self.befores or self.adds or self.afters or self.parameters)

    def deltas(self) -> set[Delta]:
        return {*self.befores, *self.adds, *self.afters, *(d for _, ds in self.parameters for d in ds)}


class Junction:
    """The deltas attached at one module, by adapter, and the plan of the routing in force."""

    def __init__(self, module: nn.Module, path: str, rows: str, switch: Switch) -> None:
        self.path, self.rows, self.switch = path, rows, switch
        self.deltas: dict[str, list[tuple[str, Delta]]] = {}  # adapter -> (parameter name or "", delta)
        self._planned: tuple[Routing, tuple[_Group, ...]] | None = None
        self._taken: dict[str, Tensor | None] = {}
        module.__dict__[_KEY] = self
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(_enter, with_kwargs=True),
            module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
        ]

    def put(self, adapter: str, delta: Delta, parameter: str = "") -> None:
        """Attach `delta` for `adapter`; `parameter` names what a parameter delta stands for."""
        self.deltas.setdefault(adapter, []).append((parameter, delta))
        self._planned = None

    def take(self, adapter: str, module: nn.Module) -> None:
        """Remove what `adapter` put here; the last one out removes the junction itself."""
        self.settle(module)
        self.deltas.pop(adapter, None)
        self._planned = None
        if not self.deltas:
            for handle in self._handles:
                handle.remove()
            module.__dict__.pop(_KEY, None)

    # --- the plan ---

    def plan(self) -> tuple[_Group, ...]:
        """The groups of the routing in force, without idle ones where one choice holds for all rows."""
        routing = self.switch.current()
        if self._planned is None or self._planned[0] is not routing:
            if routing.rows is None:
                groups = tuple(g for g in (self._group(routing.whole, None),) if not g.idle)
            else:
                groups = tuple(self._group(choice, rows) for choice, rows in routing.groups)
                if all(group.idle for group in groups):
                    groups = ()
            self._planned = (routing, groups)
        return self._planned[1]

    def _group(self, choice: Choice, rows: tuple[int, ...] | None) -> _Group:
        linear: list[LinearDelta] = []
        parameters: dict[str, list[ParameterDelta]] = {}
        for name in choice:
            for parameter, delta in self.deltas.get(name, ()):
                if isinstance(delta, LinearDelta):
                    linear.append(delta)
                elif isinstance(delta, ParameterDelta):
                    parameters.setdefault(parameter, []).append(delta)
        return _Group(
            rows,
            befores=tuple(delta for delta in linear if acts(delta, "before")),
            adds=tuple(delta for delta in linear if acts(delta, "add")),
            afters=tuple(delta for delta in linear if acts(delta, "after")),
            parameters=tuple((name, tuple(deltas)) for name, deltas in parameters.items()),
        )

    # --- one call ---

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module runs: put parameters in place, change inputs."""
        self.settle(module)
        groups = self.plan()
        if not groups:
            return None
        at, x = _input(args, kwargs)
        for group in groups:
            for delta in group.deltas():
                _follow(delta, module, x)
        if groups[0].rows is None:
            group = groups[0]
            self._replace(module, group)
            if not group.befores:
                return None
            for delta in group.befores:
                x = delta.before(x)
            return _with_input(args, kwargs, at, x)
        return self._enter_rows(args, kwargs, at, x, groups)

    def _enter_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at: int | str, x: Tensor, groups: tuple[_Group, ...]
    ) -> Any:
        total, count = _total(groups), int(x.shape[0])
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
        for group in groups:
            if group.befores:
                index = entries(group.rows or (), count, total, x.device)
                part = x.index_select(0, index)
                for delta in group.befores:
                    part = delta.before(part)
                x = x.index_copy(0, index, part)
        return _with_input(args, kwargs, at, x)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the module ran, even in vain: put parameters back, then change the output."""
        self.settle(module)
        if output is None:
            return None
        groups = self.plan()
        if not groups:
            return None
        _, x = _input(args, kwargs)
        if groups[0].rows is not None:
            return self._leave_rows(module, args, kwargs, x, output, groups)
        group = groups[0]
        for delta in group.adds:
            added = delta.add(x)
            if added is not None:
                output = output + added.to(output.dtype)
        for delta in group.afters:
            output = delta.after(output)
        return output

    def _leave_rows(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        output: Any,
        groups: tuple[_Group, ...],
    ) -> Any:
        total, count = _total(groups), int(x.shape[0])
        for group in groups:
            if group.idle:
                continue
            index = entries(group.rows or (), count, total, x.device)
            if group.parameters:
                # The rows again, with this group's parameters; module.forward, so that no hook runs twice.
                self._replace(module, group)
                try:
                    part_args, part_kwargs = _split(args, kwargs, count, index)
                    part = module.forward(*part_args, **part_kwargs)
                finally:
                    self.settle(module)
            else:
                part = output.index_select(0, index)
            part_x = x.index_select(0, index)
            for delta in group.adds:
                added = delta.add(part_x)
                if added is not None:
                    part = part + added.to(part.dtype)
            for delta in group.afters:
                part = delta.after(part)
            output = self._put_rows(output, index, part, count)
        return output

    def _put_rows(self, output: Any, index: Tensor, part: Any, count: int) -> Any:
        if isinstance(output, Tensor):
            if output.shape[0] == 1 < count:  # one entry for all rows (positions made inside the module)
                output, part = output.expand(count, *output.shape[1:]), part.expand(len(index), *part.shape[1:])
            return output.index_copy(0, index, part)
        if isinstance(output, tuple) and all(isinstance(each, Tensor) for each in output):  # a router's
            return tuple(each.index_copy(0, index, own) for each, own in zip(output, part, strict=True))
        raise RoutingError(
            Finding("R107", f"{self.path} returns {type(output).__name__}: rows cannot be told apart there")
        )

    def _replace(self, module: nn.Module, group: _Group) -> None:
        for name, deltas in group.parameters:
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

    def settle(self, module: nn.Module) -> None:
        """Put the module's own parameters back, also after a call that was interrupted."""
        for name, own in self._taken.items():
            module._parameters[name] = own  # type: ignore[assignment]
        self._taken.clear()


def _total(groups: tuple[_Group, ...]) -> int:
    return sum(len(group.rows or ()) for group in groups)


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


def _follow(delta: Delta, module: nn.Module, x: Tensor) -> None:
    """Bring `delta` to the device of its input and the mode of its module; parameters keep their identity."""
    if delta.training is not module.training:
        delta.train(module.training)
    for tensor in (*delta.parameters(), *delta.buffers()):
        if tensor.device != x.device and not tensor.is_meta:
            tensor.data = tensor.data.to(x.device)
