"""The order in which the trainer takes rows: as a stream brings them, or those of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from graftlm.data.streaming import Stream
from graftlm.data.tokenising import Item

__all__ = ["ByLength", "Streamed"]


class Streamed(IterableDataset[Item]):
    """The items of `stream`, without end and without a length."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Item]:
        return iter(self.stream)


class ByLength(Sampler[int]):
    """Rows shuffled by seed and pass, then put in order of length within every fifty steps' worth of them.

    The longest row comes first: memory that does not suffice is found in the first step.

    Example:
        >>> order = list(ByLength([1, 9, 1, 9], per_step=2))
        >>> {order[0], order[1]}
        {1, 3}
    """

    def __init__(self, lengths: Sequence[int], per_step: int, seed: int = 0) -> None:
        self.lengths, self.per_step, self.seed, self.epoch = list(lengths), per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass it is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = get_length_grouped_indices(self.lengths, self.per_step, generator=draws)  # type: ignore[no-untyped-call]
        return iter(order)
