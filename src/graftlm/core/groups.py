"""Groups: the deltas that act together on some rows of a batch at one module, and how a tensor falls to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftlm.core.delta import BranchDelta, Delta, EmbedDelta, KeyValueDelta, LinearDelta, ParameterDelta, acts
from graftlm.core.routing import entries
from graftlm.core.sites import Site
from graftlm.errors import Finding, RoutingError

__all__ = ["Entries", "Group", "Rows", "Slice", "check_count", "total_rows"]


@dataclass(frozen=True)
class Slice:
    """The deltas at one part of a fused map."""

    columns: tuple[tuple[int, int], ...]
    deltas: tuple[LinearDelta, ...]


@dataclass(frozen=True)
class Group:
    """The deltas that act on some rows at one module: `rows` None means all."""

    rows: tuple[int, ...] | None
    befores: tuple[LinearDelta, ...] = ()
    adds: tuple[tuple[LinearDelta, bool], ...] = ()  # with whether it asks the base
    afters: tuple[LinearDelta, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: tuple[tuple[str, tuple[ParameterDelta, ...]], ...] = ()
    products: tuple[ParameterDelta, ...] = ()  # those of `parameters` that may act beside their map
    packed: bool = False  # whether the weight is packed: they must
    branches: tuple[tuple[Site, BranchDelta], ...] = ()
    streams: tuple[BranchDelta, ...] = ()  # before the module, which is the norm behind the add
    prefixes: tuple[KeyValueDelta, ...] = ()
    prompts: tuple[EmbedDelta, ...] = ()
    #: How far positions of tokens are moved by virtual tokens at attention calls.
    shift: int = 0
    #: Whether there are prefixes at the attention calls behind this sequence.
    prefixed: bool = False
    #: Whether nothing acts.
    idle: bool = field(init=False, default=False)
    #: Whether a linear delta acts, and whether one asks the base.
    acts: bool = field(init=False, default=False)
    asks_base: bool = field(init=False, default=False)
    #: Whether nothing acts but linear deltas that change the input or add something of it, without asking the base.
    map_only: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        # Asked at every call: worked out once.
        asking = any(over for _, over in self.adds) or any(
            acts(delta, "add_over") for part in self.slices for delta in part.deltas
        )
        object.__setattr__(self, "idle", not (self.shift or self.prefixed or len(self.everything) > 0))
        object.__setattr__(self, "acts", bool(self.adds or self.afters or self.slices))
        object.__setattr__(self, "asks_base", asking)
        alone = len(self.adds) + len(self.befores) == len(self.everything) and not (self.shift or self.prefixed)
        object.__setattr__(self, "map_only", bool(self.adds or self.befores) and alone and not asking)

    def beside(self, x: Tensor) -> tuple[ParameterDelta, ...]:
        """The parameter deltas that act beside their map for this input, not through a changed weight."""
        return self.products if self.packed else tuple(d for d in self.products if d.adds(x, self.rows is not None))

    @property
    def inserted(self) -> int:
        """How many virtual tokens are put in between the rows' own; those in slots take the place of tokens."""
        return sum(delta.length for delta in self.prompts if delta.position != "slots")

    @property
    def everything(self) -> tuple[Delta, ...]:
        """Every delta of the group."""
        return (
            *self.befores,
            *(delta for delta, _ in self.adds),
            *self.afters,
            *(delta for part in self.slices for delta in part.deltas),
            *(delta for _, deltas in self.parameters for delta in deltas),
            *(delta for _, delta in self.branches),
            *self.streams,
            *self.prefixes,
            *self.prompts,
        )


def check_count(count: int, total: int) -> None:
    """Raise RoutingError where `count` entries cannot fall to `total` rows."""
    if count % total:
        raise RoutingError(Finding("R104", f"the routing has {total} choices, the batch has {count} rows"))


def total_rows(groups: Sequence[Group]) -> int:
    """How many rows the groups have together."""
    return sum(len(group.rows or ()) for group in groups)


@dataclass(frozen=True)
class Rows:
    """The entries of each group, and how to cut a tensor into groups and put it together again at one copy.

    One group for all rows is the whole tensor, with an index of None.
    """

    indices: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    there: Tensor | None  # entries in the order of the groups; None where they are in that order already
    back: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Group], count: int, device: torch.device) -> Rows:
        """How `count` entries fall to `groups`. Raises RoutingError where rows cannot be told apart."""
        if groups[0].rows is None:
            return cls((None,), (count,), None, None)
        total = total_rows(groups)
        check_count(count, total)
        indices = tuple(entries(group.rows or (), count, total, device) for group in groups)
        order = torch.cat(indices)
        if bool((order == torch.arange(count, device=device)).all()):
            return cls(indices, tuple(map(len, indices)), None, None)
        return cls(indices, tuple(map(len, indices)), order, order.argsort())

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The entries of each group; views where the order allows it."""
        if self.there is not None:
            whole = whole.index_select(0, self.there)
        parts: tuple[Tensor, ...] = torch.split(whole, list(self.sizes))
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of `split`. Raises RoutingError where the parts are of different widths."""
        if len({part.shape[1:] for part in parts}) > 1:
            widths = sorted({int(part.shape[-1]) for part in parts})
            raise RoutingError(
                Finding(
                    "R117",
                    f"the adapters of this batch give outputs of different widths ({', '.join(map(str, widths))})",
                    fix="one batch for each: use(model, NAME)",
                )
            )
        whole = torch.cat(list(parts))
        return whole if self.back is None else whole.index_select(0, self.back)


class Entries:
    """Some entries of the first dimension: a piece of it where they lie together."""

    def __init__(self, rows: Sequence[int], count: int, total: int, device: torch.device) -> None:
        rows = sorted(rows)
        each = count // total
        self.rows, self.start, self.length = rows, rows[0] * each, len(rows) * each
        together = rows[-1] - rows[0] + 1 == len(rows)
        self.index = None if together else entries(tuple(rows), count, total, device)
        self.all = together and len(rows) == total

    def take(self, x: Tensor) -> Tensor:
        """Those of x; a view where they lie together."""
        if self.all:
            return x
        return x.narrow(0, self.start, self.length) if self.index is None else x.index_select(0, self.index)

    def add(self, y: Tensor, change: Tensor) -> None:
        """Add `change`, of a shape that theirs takes, to those of y."""
        if self.index is None:
            self.take(y).add_(change.to(y.dtype))
        else:
            y.index_add_(0, self.index, change.to(y.dtype).expand(self.length, *y.shape[1:]))

    def put(self, y: Tensor, value: Tensor) -> None:
        """Write to those of y."""
        if self.index is None:
            self.take(y).copy_(value)
        else:
            y.index_copy_(0, self.index, value.to(y.dtype))
