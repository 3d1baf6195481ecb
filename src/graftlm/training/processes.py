"""Several processes that train one adapter together (torchrun): what each takes, what they agree on, which one writes.

Each process has the whole base and takes its part of every batch; `GraftTrainer` sums what they find. The main process
alone writes folder, log and scores. A batch is cut up by rows, so that a step is that of one process on the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch.utils.data import Dataset, Sampler

__all__ = ["Part", "Parts", "agreed", "any_of", "begin", "count", "gathered", "is_main", "rank", "void_apart", "wait"]

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=12)  # the others wait while the main process evaluates


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes."""
    return rank() == 0


def begin() -> None:
    """Join the others; each on a device of its own, where there are several."""
    if count() > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def wait() -> None:
    """Go on when every process has come here."""
    if count() > 1:
        torch.distributed.barrier()


def agreed(value: _T) -> _T:
    """The main process's value."""
    if count() == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def any_of(told: bool) -> bool:
    """Whether it is true in any process."""
    return any(gathered(told))


def gathered(value: _T) -> list[_T]:
    """Every process's value, by rank."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, value)
    return found


class Part(Sampler[list[int]]):
    """This process's rows of each batch of `size` that one process would take in the order of `order`.

    A last batch with fewer rows than processes leaves some without: they take a row that does not count, told by a
    number below zero (`Parts`).

    Example:
        >>> [list(Part(range(5), size=4, processes=2, rank=at)) for at in (0, 1)]
        [[[0, 1], [4]], [[2, 3], [-5]]]
    """

    def __init__(self, order: Any, size: int, processes: int, rank: int) -> None:
        self.order, self.size, self.processes, self.rank = order, size, processes, rank
        self.batch_sampler = self  # where the Trainer looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        """Say which pass it is."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for at in self.order:
            batch.append(at)
            if len(batch) == self.size:
                yield self._own(batch)
                batch = []
        if batch:
            yield self._own(batch)

    def _own(self, batch: list[int]) -> list[int]:
        each = -(-len(batch) // self.processes)
        return batch[self.rank * each : (self.rank + 1) * each] or [-1 - batch[0]]


class Parts(Dataset[Mapping[str, Any]]):
    """Items by number; by -1 - n the item n, marked as one that does not count (`void`)."""

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> Mapping[str, Any]:
        return self.items[at] if at >= 0 else {**self.items[-1 - at], "void": True}


def void_apart(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """`collate`, with `void` in a batch whose rows do not count."""

    def both(items: list[Any]) -> Any:
        batch = collate(items)
        if items[0].get("void"):
            batch["void"] = torch.tensor(True)
        return batch

    return both
