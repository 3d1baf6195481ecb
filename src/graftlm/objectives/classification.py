"""Sequence classification: one label a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.by_row import ByRow

__all__ = ["Classification"]


class Classification(ByRow):
    """Cross-entropy of each row's label; labels [rows], logits [rows, classes].

    Example:
        >>> import torch
        >>> Classification().count({"labels": torch.tensor([0, 2])})
        2
    """

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Token ids, mask and, where the tokenizer makes them, token types."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names if name in batch}

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """The number of rows."""
        return int(batch["labels"].shape[0])

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The cross-entropy of each row in nats."""
        return F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")
