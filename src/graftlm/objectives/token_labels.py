"""Labels at tokens: cross-entropy of every labelled position, at its own place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.objective import Objective
from graftlm.objectives.sequences import IGNORED

__all__ = ["TokenLabels"]


class TokenLabels(Objective):
    """What masked language models, taggers and encoder-decoders share; labels [rows, tokens], -100 where none is."""

    unit: ClassVar[str] = "tokens"
    names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Token ids and mask, and what else the model reads."""
        return {name: batch[name] for name in self.names if name in batch}

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled positions."""
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed cross-entropy in nats; logits [rows, tokens, classes]."""
        wanted = batch["labels"] != IGNORED
        return F.cross_entropy(outputs.logits[wanted].float(), batch["labels"][wanted], reduction="sum")

    def row_losses(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """Nats and labelled positions of each row."""
        labels = batch["labels"]
        wanted = labels != IGNORED
        each = torch.zeros(labels.shape, device=labels.device)
        each[wanted] = F.cross_entropy(outputs.logits[wanted].float(), labels[wanted], reduction="none")
        return each.double().sum(1).tolist(), wanted.sum(1).tolist()
