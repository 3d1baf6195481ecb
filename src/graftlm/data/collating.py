"""Puts items of different lengths into one batch of tensors, padded on the side that the model needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.data.tokenising import IGNORED

__all__ = ["Collator"]


@dataclass(frozen=True, slots=True)
class Collator:
    """Items to a batch of B rows and T tokens.

    The batch has `input_ids` (B, T), `attention_mask` (B, T; 1 for tokens, 0 for padding), `labels` (B, T) with -100
    where nothing is trained, or (B,) with class ids, and `row` (B,), the rows' numbers in their file for error reports:
    take `row` out before calling a model. `token_type_ids` (B, T) come along where the items have them, and
    `position_ids` (B, T), counted from each row's first token, where they are asked for.

    Args:
        pad_id: written where there is no token; the attention mask hides it, so any id will do.
        side: `right` for training, `left` for generating from a batch.
        pad_to_multiple_of: T is rounded up to it (1: no rounding), for the sake of fast matrix shapes.
        max_length: T is never rounded up beyond this (a model without positions beyond it).
        position_ids: whether to add them.

    Example:
        >>> items = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
        >>> batch = Collator(pad_id=0, pad_to_multiple_of=1)(items)
        >>> batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[1, 1, 1], [1, 0, 0]], [[-100, 6, 7], [8, -100, -100]])
    """

    pad_id: int
    side: str = "right"
    pad_to_multiple_of: int = 8
    max_length: int | None = None
    position_ids: bool = False

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side is '{self.side}', wanted left or right")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {self.pad_to_multiple_of}, wanted 1 or more")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch of `items`."""
        if not items:
            raise ValueError("a batch of no items")
        longest = max(len(item["input_ids"]) for item in items)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.max_length is not None:
            width = max(longest, min(width, self.max_length))
        ids = [item["input_ids"] for item in items]
        batch = {"input_ids": self._padded(ids, width, self.pad_id)}
        batch["attention_mask"] = self._padded([[1] * len(tokens) for tokens in ids], width, 0)
        if all("token_type_ids" in item for item in items):
            batch["token_type_ids"] = self._padded([item["token_type_ids"] for item in items], width, 0)
        if all("labels" in item for item in items):
            labels = [item["labels"] for item in items]
            whole = isinstance(labels[0], int)
            batch["labels"] = torch.tensor(labels) if whole else self._padded(labels, width, IGNORED)
        if all("row" in item for item in items):
            batch["row"] = torch.tensor([item["row"] for item in items])
        if self.position_ids:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch

    def _padded(self, lists: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
        padded = torch.full((len(lists), width), value, dtype=torch.long)
        for line, values in zip(padded, lists, strict=True):
            place = slice(width - len(values), width) if self.side == "left" else slice(0, len(values))
            line[place] = torch.tensor(values, dtype=torch.long)
        return padded
