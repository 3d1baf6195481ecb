"""Gates around deltas: what a wrapped delta changes is multiplied by a factor, whatever its port.

    linear   x + g (before(x) - x),   g add(x),   y + g (after(y) - y)
    branch   y + g (branch(y) - y)
    kv       g K, g V
    param    W + g (parameter(W) - W)

`GatedMethod` is what methods with a gate share: they wrap a method, or each part of a sum, and leave sites, samples and
learning rates to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import (
    Base,
    BranchDelta,
    Delta,
    KeyValueDelta,
    LinearDelta,
    Method,
    ParameterDelta,
    Part,
    Samples,
    Site,
    Survey,
    device_at,
)
from graftlm.core.delta import acts, folds
from graftlm.errors import Finding, MethodError

__all__ = ["Gate", "GatedBranchDelta", "GatedKeyValueDelta", "GatedLinearDelta", "GatedMethod", "GatedParameterDelta"]

_STEPS = ("before", "add", "add_over", "after")


class Gate(nn.Module):
    """The factor g; subclasses compute it."""

    #: Whether it depends on the input; then there is no merged form, and only additions can be gated.
    reads_input: ClassVar[bool] = False

    def factor(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The factor for the input x [rows, tokens, width], in its type: of a shape that x's rows and tokens take."""
        raise NotImplementedError

    def wake(self) -> None:
        """Let something through from the start."""


class _Gated(Delta):
    """What every gated delta has: the gate, its own or that of another delta, and the delta inside."""

    def __init__(self, inner: Delta, gate: Gate, label: str, owns: bool = True) -> None:
        super().__init__()
        self.inner = inner
        self.label, self.owns = label, owns
        # A tuple hides the gate from this delta's children: it may belong to another one.
        self._gate = (gate,)
        if owns:  # by the method's name: two gated methods may meet at one site
            self.add_module(f"{label}_gate", gate)
        self.sizes_from_state = inner.sizes_from_state  # type: ignore[misc]  # as the one inside

    @property
    def gate(self) -> Gate:
        """The gate, whoever holds it."""
        return self._gate[0]

    def around(self, inner: Delta) -> Delta:
        """The same gate around another delta."""
        return type(self)(inner, self.gate, self.label, self.owns)

    def wake(self) -> None:
        """Start with an open gate and a delta that changes something."""
        self.gate.wake()
        self.inner.wake()

    def adopt(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Let the delta inside take its shapes."""
        own = {name.removeprefix("inner."): shape for name, shape in shapes.items() if name.startswith("inner.")}
        self.inner.adopt(own)


class GatedLinearDelta(_Gated, LinearDelta):
    """A gate around a delta at a linear-like module."""

    inner: LinearDelta

    def acts(self, step: str) -> bool:
        """As the delta inside; with a gate that reads the input through `add_over` alone, which knows the padding."""
        if self.gate.reads_input:
            return step == "add_over"
        return acts(self.inner, step)

    @property
    def folds(self) -> bool:
        """Whether there is a merged form: one step of a delta that has one, by a factor that is the same for all."""
        steps = {"add" if step == "add_over" else step for step in _STEPS if acts(self.inner, step)}
        return folds(self.inner) and not self.gate.reads_input and len(steps) == 1

    def before(self, x: Tensor) -> Tensor:
        """x + g (before(x) - x)."""
        return x + self.gate.factor(x, None) * (self.inner.before(x) - x)

    def add(self, x: Tensor) -> Tensor | None:
        """g add(x)."""
        change = self.inner.add(x)
        return None if change is None else self.gate.factor(change, None) * change

    def add_over(self, x: Tensor, base: Base) -> Tensor | None:
        """g add(x), where the gate may read x and its padding."""
        change = self.inner.add_over(x, base) if acts(self.inner, "add_over") else self.inner.add(x)
        if change is None:
            return None
        read = x if self.gate.reads_input else change
        factor: Tensor = self.gate.factor(read, base.mask)
        return factor * change

    def after(self, y: Tensor) -> Tensor:
        """y + g (after(y) - y)."""
        return y + self.gate.factor(y, None) * (self.inner.after(y) - y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + g (fold(W) - W), and the bias alike."""
        factor: Tensor = self.gate.factor(weight, None)
        folded, shift = self.inner.fold(weight, bias)
        if shift is not None:
            start = torch.zeros_like(shift) if bias is None else bias
            shift = start + factor * (shift - start)
        return weight + factor * (folded - weight), shift


class GatedParameterDelta(_Gated, ParameterDelta):
    """A gate around a delta at a parameter."""

    inner: ParameterDelta

    def parameter(self, base: Tensor) -> Tensor:
        """W + g (parameter(W) - W)."""
        return base + self.gate.factor(base, None) * (self.inner.parameter(base) - base)

    @property
    def has_add(self) -> bool:
        """As the delta inside."""
        return self.inner.has_add

    def adds(self, x: Tensor, rows: bool) -> bool:
        """As the delta inside."""
        return self.inner.adds(x, rows)

    def add(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """g add(x)."""
        change = self.inner.add(x, weight)
        factor: Tensor = self.gate.factor(change, None)
        return factor * change


class GatedBranchDelta(_Gated, BranchDelta):
    """A gate around a delta at a sublayer; a gate that reads the input reads what the delta inside reads."""

    inner: BranchDelta

    def __init__(self, inner: BranchDelta, gate: Gate, label: str, owns: bool = True) -> None:
        super().__init__(inner, gate, label, owns)
        self.reads_input = inner.reads_input  # type: ignore[misc]  # as the one inside
        self.reads_mask = inner.reads_mask or gate.reads_input  # type: ignore[misc]

    def branch(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """y + g (branch(y) - y)."""
        change = getattr(self.inner, "change", None)
        # Where the delta gives its change by itself, nothing of it is lost beside a large y.
        own: Tensor = change(x, y) if change else self.inner.branch(x, y, mask) - y
        return y + self.gate.factor(x, mask) * own


class GatedKeyValueDelta(_Gated, KeyValueDelta):
    """A gate around keys and values, which multiplies both."""

    inner: KeyValueDelta

    def __init__(self, inner: KeyValueDelta, gate: Gate, label: str, owns: bool = True) -> None:
        super().__init__(inner, gate, label, owns)
        self.length, self.shifts_positions = inner.length, inner.shifts_positions
        self.reads_input = inner.reads_input or gate.reads_input  # type: ignore[misc]

    @property
    def has_bias(self) -> bool:
        """As the one inside."""
        return self.inner.has_bias

    def bias(self, place: int, count: int) -> Tensor:
        """That of the one inside: the virtual tokens stand where they stood."""
        return self.inner.bias(place, count)

    def keys_values(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """g K and g V: [heads, length, head width], or [rows, ...] where the gate depends on the row."""
        keys, values = self.inner.keys_values(x, mask)
        factor: Tensor = self.gate.factor(x, mask)
        if factor.dim():
            factor = factor.reshape(-1, 1, 1, 1)
        return factor.to(keys.dtype) * keys, factor.to(values.dtype) * values


@dataclass(frozen=True)
class GatedMethod(Method):
    """A method, or each part of a sum, with a gate around every delta; subclasses give the gate."""

    method: Method

    def __post_init__(self) -> None:
        self.require((isinstance(self.method, Method), f"{self.method!r} is no method", f"{self.name}(lora)"))
        # A gate learns at the rate of what is behind it.
        ranges = [part.learning_rate_range for part in self.method.parts]
        self.__dict__["learning_rate"] = min(part.learning_rate for part in self.method.parts)
        self.__dict__["learning_rate_range"] = (min(low for low, _ in ranges), max(high for _, high in ranges))

    @property
    def parts(self) -> tuple[Method, ...]:
        """One for each part of the method inside."""
        inner = self.method.parts
        if len(inner) == 1 and inner[0] is self.method:
            return (self,)
        kept = self.__dict__.get("_parts")
        if kept is None:  # made once: an adapter tells its parts' methods by identity
            kept = self.__dict__["_parts"] = tuple(replace(self, method=part) for part in inner)
        made: tuple[Method, ...] = kept
        return made

    def gate_of(self, site: Site, module: nn.Module, delta: Delta) -> Gate:
        """A fresh gate for `delta` at `site`, on the current default device. Raises MethodError where none fits."""
        raise NotImplementedError

    def owner_of(self, number: int, sites: Sequence[Site]) -> int:  # noqa: ARG002
        """The number of the site whose gate the one at `number` takes: its own, unless gates are shared."""
        return number

    def sites(self, survey: Survey) -> Sequence[Site]:
        """The sites of the method inside."""
        return self.method.sites(survey)

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """The deltas of the method inside, each with a gate around it."""
        made: list[Delta] = []
        gates: list[Gate] = []
        for number, delta in enumerate(self.method.build_all(sites, modules, values=values)):
            site, owner = sites[number], self.owner_of(number, sites)
            with torch.device(device_at(modules, site.path) if values else torch.device("meta")):
                gate = gates[owner] if owner < number else self.gate_of(site, modules[site.path], delta)
            gates.append(gate)
            kind = _kind_of(delta)
            if kind is None:
                raise MethodError(
                    Finding("T143", f"{self.name}: a gate has no meaning around {self.method.name} at {site.key}",
                            fix=str(self.method))
                )  # fmt: skip
            made.append(kind(delta, gate, self.method.name, owner == number))
        return made

    @property
    def needs_samples(self) -> bool:
        """As the method inside."""
        return self.method.needs_samples

    @property
    def sample_rows(self) -> int:
        """As the method inside."""
        return self.method.sample_rows

    def measure(self, model: nn.Module, sites: Sequence[Site], samples: Samples) -> Any:
        """As the method inside."""
        return self.method.measure(model, sites, samples)

    def apply_measured(self, parts: Sequence[Part], measured: Any, model: nn.Module) -> None:
        """As the method inside."""
        self.method.apply_measured(self._inside(parts), measured, model)

    @property
    def context_taken(self) -> int:
        """As the method inside."""
        return self.method.context_taken

    def learning_rate_factor(self, parameter: str) -> float:
        """As the method inside says; one for gates."""
        own = parameter.startswith("inner.")
        return self.method.learning_rate_factor(parameter.removeprefix("inner.")) if own else 1.0

    def penalty(self, parts: Sequence[Part]) -> Tensor | None:
        """As the method inside."""
        return self.method.penalty(self._inside(parts))

    def after_step(self, parts: Sequence[Part], step: int, total: int) -> None:
        """As the method inside."""
        self.method.after_step(self._inside(parts), step, total)

    def bake(self, part: Part) -> Part:
        """The same gate around the plain form of the delta inside."""
        assert isinstance(part.delta, _Gated)
        (before,) = self._inside([part])
        plain = self.method.bake(before)
        if plain is before:
            return part
        kept = self.__dict__.get("_plain")
        if kept is None or kept.method is not plain.method:
            kept = self.__dict__["_plain"] = replace(self, method=plain.method)
        return Part(kept, part.site, part.delta.around(plain.delta))

    def _inside(self, parts: Sequence[Part]) -> list[Part]:
        found = []
        for part in parts:
            assert isinstance(part.delta, _Gated)
            found.append(Part(self.method, part.site, part.delta.inner))
        return found


def _kind_of(delta: Delta) -> type[Any] | None:
    kinds: tuple[tuple[type[Delta], type[Any]], ...] = (
        (LinearDelta, GatedLinearDelta),
        (BranchDelta, GatedBranchDelta),
        (KeyValueDelta, GatedKeyValueDelta),
        (ParameterDelta, GatedParameterDelta),
    )
    return next((gated for kind, gated in kinds if isinstance(delta, kind)), None)
