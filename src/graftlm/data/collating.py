"""Puts items of different lengths into one batch of tensors, padded on the side that the model needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftlm.data.tokenising import IGNORED

__all__ = ["Collator", "MaskingCollator", "SequencesCollator", "TargetsCollator", "length_of"]


def length_of(item: Mapping[str, Any]) -> int:
    """The tokens of an item, of its longest sequence where it has several: rows of like length share a batch.

    Example:
        >>> length_of({"sequences": [{"input_ids": [1]}, {"input_ids": [1, 2]}]})
        2
    """
    if "sequences" in item:
        return max(len(sequence["input_ids"]) for sequence in item["sequences"])
    return len(item["input_ids"])


@dataclass(frozen=True, slots=True)
class Collator:
    """Items to a batch of B rows and T tokens.

    The batch has `input_ids` (B, T), `attention_mask` (B, T; 1 for tokens, 0 for padding), `labels` (B, T) with -100
    where nothing is trained, or (B,) with class ids or numbers, or (B, classes) with floats, and `row` (B,), the rows'
    numbers in their file for error reports:
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
        if all("position_ids" in item for item in items):
            # Packed rows: texts are told apart by positions that start anew, and a mask would hide that. Padding is a
            # text of its own.
            positions = [[*item["position_ids"], *range(width - len(item["input_ids"]))] for item in items]
            batch["position_ids"] = torch.tensor(positions)
        else:
            batch["attention_mask"] = self._padded([[1] * len(tokens) for tokens in ids], width, 0)
        if all("token_type_ids" in item for item in items):
            batch["token_type_ids"] = self._padded([item["token_type_ids"] for item in items], width, 0)
        if all("labels" in item for item in items):
            labels = [item["labels"] for item in items]
            by_row = isinstance(labels[0], (int, float)) or (len(labels[0]) > 0 and isinstance(labels[0][0], float))
            batch["labels"] = torch.tensor(labels) if by_row else self._padded(labels, width, IGNORED)
        if all("row" in item for item in items):
            batch["row"] = torch.tensor([item["row"] for item in items])
        if self.position_ids and "attention_mask" in batch:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch

    def _padded(self, lists: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
        padded = torch.full((len(lists), width), value, dtype=torch.long)
        for line, values in zip(padded, lists, strict=True):
            place = slice(width - len(values), width) if self.side == "left" else slice(0, len(values))
            line[place] = torch.tensor(values, dtype=torch.long)
        return padded


@dataclass(frozen=True, slots=True)
class SequencesCollator:
    """Items with several sequences each to one batch of N sequences.

    Beside what `inner` makes of the sequences there are `group` (N,), the item's place in the batch, `target` (B,) and
    `row` (B,).

    Example:
        >>> item = {"sequences": [{"input_ids": [5, 6]}, {"input_ids": [5, 7, 8]}], "target": 1, "row": 1}
        >>> batch = SequencesCollator(Collator(pad_id=0, pad_to_multiple_of=1))([item])
        >>> batch["input_ids"].tolist(), batch["group"].tolist(), batch["target"].tolist()
        ([[5, 6, 0], [5, 7, 8]], [0, 0], [1])
    """

    inner: Collator | TargetsCollator

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch of `items`."""
        batch = self.inner([sequence for item in items for sequence in item["sequences"]])
        batch["group"] = torch.tensor([at for at, item in enumerate(items) for _ in item["sequences"]])
        batch["target"] = torch.tensor([item["target"] for item in items])
        if all("row" in item for item in items):
            batch["row"] = torch.tensor([item["row"] for item in items])
        return batch


@dataclass(frozen=True, slots=True)
class TargetsCollator:
    """Items of an encoder-decoder: `labels` (B, T') have a width of their own, and `decoder_input_ids` come from them.

    `decoder_inputs` is the model's own rule for shifting labels (`prepare_decoder_input_ids_from_labels`).
    """

    inner: Collator
    decoder_inputs: Callable[[Tensor], Tensor]

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch of `items`."""
        batch = self.inner([{name: item[name] for name in ("input_ids", "row") if name in item} for item in items])
        labels = self.inner([{"input_ids": item["labels"], "labels": item["labels"]} for item in items])["labels"]
        batch["labels"] = labels
        batch["decoder_input_ids"] = self.decoder_inputs(labels)
        return batch


@dataclass(slots=True)
class MaskingCollator:
    """Items of whole texts to batches with hidden tokens (Devlin et al. 2019, section 3.1).

    `share` of the tokens that are no control tokens are hidden, at least one a row: 80 % of them become `mask_id`,
    10 % a random token, 10 % stay. `labels` are the hidden tokens. What is hidden of a row depends on `seed`, row,
    block and `epoch` alone, so neither resuming nor the size of a batch changes it; the trainer counts `epoch` up.

    Example:
        >>> hide = MaskingCollator(Collator(pad_id=0, pad_to_multiple_of=1), mask_id=4, vocabulary=100, control=(1, 2))
        >>> batch = hide([{"input_ids": [1, 50, 51, 52, 2], "row": 1, "block": 0}])
        >>> int((batch["labels"] != -100).sum())
        1
    """

    inner: Collator
    mask_id: int
    vocabulary: int
    control: Collection[int] = ()
    share: float = 0.15
    seed: int = 0
    epoch: int = 0

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch of `items`."""
        return self.inner([self._hidden(item) for item in items])

    def _hidden(self, item: Mapping[str, Any]) -> dict[str, Any]:
        epoch = int(item.get("pass", self.epoch))  # rows of a stream say themselves which pass it is
        draw = np.random.default_rng([self.seed, epoch, int(item.get("row", 0)), int(item.get("block", 0))])
        ids = list(item["input_ids"])
        open_ = [at for at, token in enumerate(ids) if token not in self.control]
        labels = [IGNORED] * len(ids)
        if open_:
            for at in draw.choice(open_, size=max(1, round(self.share * len(open_))), replace=False):
                labels[at] = ids[at]
                lot = draw.random()
                if lot < 0.8:
                    ids[at] = self.mask_id
                elif lot < 0.9:
                    ids[at] = int(draw.integers(self.vocabulary))
        kept = {name: item[name] for name in ("token_type_ids", "row") if name in item}
        return {"input_ids": ids, "labels": labels, **kept}
