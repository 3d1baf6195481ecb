"""Sequence to sequence: the decoder writes the target, token by token, from what the encoder read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from graftlm.objectives.token_labels import TokenLabels

__all__ = ["Seq2Seq"]


class Seq2Seq(TokenLabels):
    """Cross-entropy of the target's tokens; `decoder_input_ids` are the labels shifted by the model's own rule.

    Example:
        >>> import torch
        >>> Seq2Seq().count({"labels": torch.tensor([[4, 5, 1], [6, 1, -100]])})
        5
    """

    names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "decoder_input_ids")

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Both sides' token ids; no key-value cache."""
        return super().inputs(batch) | {"use_cache": False}
