"""Causal language modelling: every labelled token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.objective import Objective

__all__ = ["IGNORED", "CausalLM"]

#: The label of a position that costs nothing (prompts, padding).
IGNORED = -100


@dataclass(frozen=True)
class CausalLM(Objective):
    """Cross-entropy of the labelled tokens; labels [rows, tokens] are not shifted, -100 where nothing is learned.

    `tail_only` asks the model for logits from the first labelled position on, where the model can (transformers'
    `logits_to_keep`): the prompt's part of the [tokens, vocabulary] matrix is never computed.

    Example:
        >>> import torch
        >>> batch = {"labels": torch.tensor([[-100, -100, 3, 1]])}
        >>> CausalLM().count(batch)
        2
    """

    unit: ClassVar[str] = "tokens"

    tail_only: bool = False

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Token ids, mask and positions; no key-value cache."""
        names = ("input_ids", "attention_mask", "position_ids")
        found: dict[str, Any] = {name: batch[name] for name in names if name in batch} | {"use_cache": False}
        if self.tail_only:
            labelled = (batch["labels"][:, 1:] != IGNORED).any(0).nonzero()
            first = int(labelled[0]) if len(labelled) else batch["labels"].shape[1] - 1
            found["logits_to_keep"] = batch["labels"].shape[1] - first
        return found

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled positions that have a token before them."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss_sum(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed negative log-likelihood in nats; logits [rows, tokens, vocabulary] are read where labels are."""
        logits, labels, wanted = self._aligned(outputs, batch)
        return F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")

    def row_losses(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """Nats and labelled tokens of each row."""
        logits, labels, wanted = self._aligned(outputs, batch)
        each = torch.zeros(labels.shape, device=logits.device)
        each[wanted] = F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none")
        return each.double().sum(1).tolist(), wanted.sum(1).tolist()

    def _aligned(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, kept - 1, vocabulary] with the labels that they predict, and where there are any."""
        logits = outputs.logits[:, :-1]
        labels = batch["labels"][:, -logits.shape[1] :] if logits.shape[1] else batch["labels"][:, :0]
        return logits, labels, labels != IGNORED
