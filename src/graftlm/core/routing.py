"""Routing: which adapters act on which rows of the batch.

A *choice* is the tuple of adapter names that act together: `()` for the base alone. A routing gives one choice to
every row, or one choice a row. It stays in force until the next `use`, so that a block recomputed in the backward pass
meets the adapters that it met in the forward pass. How rows map to the entries of a tensor is explicit: one to one;
one row to several consecutive entries (beams and returned sequences, which `generate` repeats row by row, or flattened
tokens); or an error. A row is never skipped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftlm.errors import Finding, RoutingError

__all__ = ["Choice", "Routing", "Spec", "read_spec"]

Choice = tuple[str, ...]
Spec = str | None | tuple[str, ...] | Sequence[str | tuple[str, ...] | None]


@dataclass(frozen=True)
class Routing:
    """One choice for every row (`rows` is None), or one choice a row."""

    whole: Choice = ()
    rows: tuple[Choice, ...] | None = None
    groups: tuple[tuple[Choice, tuple[int, ...]], ...] = field(init=False, compare=False, repr=False, default=())

    def __post_init__(self) -> None:
        by_choice: dict[Choice, list[int]] = {}
        for row, choice in enumerate(self.rows or ()):
            by_choice.setdefault(choice, []).append(row)
        object.__setattr__(self, "groups", tuple((choice, tuple(rows)) for choice, rows in by_choice.items()))

    @property
    def names(self) -> frozenset[str]:
        """Every adapter that acts on at least one row."""
        return frozenset(name for choice in (self.whole, *(self.rows or ())) for name in choice)

    def without(self, names: Collection[str]) -> Routing:
        """This routing with `names` left out of every choice; itself where it has none of them."""
        if not self.names.intersection(names):
            return self
        whole, *rows = (
            tuple(name for name in choice if name not in names) for choice in (self.whole, *(self.rows or ()))
        )
        return Routing(whole=whole, rows=None if self.rows is None else tuple(rows))

    def __str__(self) -> str:
        if self.rows is None:
            return " + ".join(self.whole) or "base"
        return ", ".join(" + ".join(choice) or "base" for choice in self.rows)


def read_spec(spec: Spec) -> Routing:
    """The routing that `spec` says: None, a name, a tuple of names (together), or a list with one of these a row.

    Example:
        >>> str(read_spec(["support", None, ("support", "tone")]))
        'support, base, support + tone'
    """
    if isinstance(spec, list):
        if not spec:
            raise RoutingError(Finding("R101", "an empty list routes no row", fix="use(model, None)"))
        return Routing(rows=tuple(_choice(entry) for entry in spec))
    return Routing(whole=_choice(spec))


def _choice(entry: object) -> Choice:
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    if isinstance(entry, tuple) and all(isinstance(name, str) for name in entry):
        if len(set(entry)) != len(entry):
            raise RoutingError(Finding("R102", f"{entry!r} names an adapter twice"))
        return entry
    raise RoutingError(
        Finding(
            "R103", f"cannot route to {entry!r}: want None, a name, a tuple of names, or a list with one of these a row"
        )
    )


@dataclass
class Batch:
    """What the current call of the model says about its rows; checked against the routing at the model's entry."""

    rows: int | None = None
    copies: int = 1
    prompt_tokens: int = 0
    #: Which tokens of the stack that runs are real, [rows, tokens so far]; None where all are.
    mask: Tensor | None = None

    def forget(self) -> None:
        """A new routing starts with no beams or samples in progress."""
        self.copies, self.prompt_tokens = 1, 0

    def mask_like(self, x: Tensor, index: Tensor | None = None) -> Tensor | None:
        """Which tokens of `x` [rows, tokens, width] or [entries, width] are real, at the entries `index` (None: all).

        `x` has every row of the batch. None where all are real, and where `x` holds other tokens than the stack that
        runs (an encoder's, in a decoder).
        """
        if self.mask is None or x.dim() < 2:
            return None
        rows, seen = self.mask.shape
        if x.dim() == 2:
            if x.shape[0] % rows or x.shape[0] // rows > seen:
                return None
            found = self.mask[:, seen - x.shape[0] // rows :].flatten()
        else:
            tokens = int(x.shape[1])
            if tokens > seen or x.shape[0] != rows:
                return None
            found = self.mask[:, seen - tokens :]
        return found if index is None else found.index_select(0, index)

    def admit(self, routing: Routing, tensor: Tensor | None, *, cached: bool = False) -> None:
        """Take `tensor` [rows, tokens(, width)] as the batch; raise RoutingError where rows cannot be mapped.

        `cached` says that the call goes on from cached keys and values: only then does one token stand for a row that
        was seen before.
        """
        if tensor is None or tensor.dim() == 0:
            return
        self.rows = int(tensor.shape[0])
        if routing.rows is None:
            return
        wanted, tokens = len(routing.rows), int(tensor.shape[1]) if tensor.dim() > 1 else 1
        if self.rows == wanted:
            self.forget()
            return
        copies, rest = divmod(self.rows, wanted)
        if not rest and copies:
            # Beams and samples: every row stands for consecutive copies that share their prompt.
            known = copies == self.copies and self.prompt_tokens > 0
            if known and cached and tokens == 1:
                return
            going_on = known and tokens > self.prompt_tokens
            if _alike(tensor[:, : self.prompt_tokens] if going_on else tensor, wanted, copies):
                if not going_on:
                    self.copies, self.prompt_tokens = copies, tokens
                return
        raise RoutingError(
            Finding(
                "R104",
                f"the routing has {wanted} choices, the batch has {self.rows} rows",
                fix="use(model, [...]) with one choice a row, or use(model, NAME) for all rows",
            )
        )


def _alike(tensor: Tensor, rows: int, copies: int) -> bool:
    blocks = tensor.reshape(rows, copies, *tensor.shape[1:])
    return bool(torch.equal(blocks, blocks[:, :1].expand_as(blocks)))


def entries(rows: tuple[int, ...], count: int, total: int, device: torch.device) -> Tensor:
    """The positions, among `count` entries in the order of `total` rows, that belong to `rows`; int64 on `device`."""
    each = count // total
    index = torch.tensor(rows, device=device)
    if each == 1:
        return index
    return (index[:, None] * each + torch.arange(each, device=device)).flatten()
