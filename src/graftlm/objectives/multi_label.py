"""Multi-label classification: each label is there or not, whatever the others are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.classification import Classification

__all__ = ["MultiLabel"]


class MultiLabel(Classification):
    """Binary cross-entropy of every label, its mean over labels summed over rows; labels [rows, classes] of 0 and 1.

    Example:
        >>> import torch
        >>> MultiLabel().count({"labels": torch.tensor([[1., 0.], [1., 1.]])})
        2
    """

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row in nats."""
        logits = outputs.logits.float()
        return F.binary_cross_entropy_with_logits(logits, batch["labels"].float(), reduction="none").mean(1)
