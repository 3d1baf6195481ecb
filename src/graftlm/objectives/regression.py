"""Regression: one number a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftlm.objectives.classification import Classification

__all__ = ["Regression"]


class Regression(Classification):
    """Squared error of each row's number in standard units (see `graftlm.data.Scale`); labels [rows], logits [rows, 1].

    Example:
        >>> import torch
        >>> Regression().count({"labels": torch.tensor([0.5, -1.0])})
        2
    """

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The squared error of each row."""
        told: Tensor = outputs.logits.float()[:, 0]
        return (told - batch["labels"].float()).square()
