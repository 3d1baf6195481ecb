"""Causal language modelling: every labelled token is predicted from those before it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels import LossHead
from graftlm.objectives.objective import Objective
from graftlm.objectives.sequences import IGNORED, aligned, sequence_inputs

__all__ = ["IGNORED", "CausalLM"]


@dataclass(frozen=True)
class CausalLM(Objective):
    """Cross-entropy of the labelled tokens; labels [rows, tokens] are not shifted, -100 where nothing is learned.

    With the model's `head` (see `graftlm.kernels.LossHead`) no [tokens, vocabulary] matrix is ever held, and logits are
    made where there are labels only. `tail_only` is for models whose head is not known: it asks the model for logits
    from the first labelled position on, where the model can (transformers' `logits_to_keep`).

    Example:
        >>> import torch
        >>> batch = {"labels": torch.tensor([[-100, -100, 3, 1]])}
        >>> CausalLM().count(batch)
        2
    """

    unit: ClassVar[str] = "tokens"

    tail_only: bool = False
    head: LossHead | None = None

    @classmethod
    def of(cls, model: Any) -> CausalLM:
        """The objective for `model`, with its head where that is known."""
        return cls(tail_only="logits_to_keep" in inspect.signature(model.forward).parameters, head=LossHead.of(model))

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Token ids, mask and positions; no key-value cache."""
        return sequence_inputs(batch, tail_only=self.tail_only and self.head is None)

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """The loss of each token [rows, tokens], or what the model returns where its head is not known."""
        if self.head is None:
            return super().outputs(model, batch)
        return self.head.losses(model, self.inputs(batch), batch["labels"])

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled positions that have a token before them."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss_sum(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed negative log-likelihood in nats; logits [rows, tokens, vocabulary] are read where labels are."""
        if isinstance(outputs, Tensor):
            return outputs.sum()
        logits, labels, wanted = aligned(outputs, batch)
        return F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")

    def row_losses(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """Nats and labelled tokens of each row."""
        if isinstance(outputs, Tensor):
            return outputs.double().sum(1).tolist(), (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        logits, labels, wanted = aligned(outputs, batch)
        each = torch.zeros(labels.shape, device=logits.device)
        each[wanted] = F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none")
        return each.double().sum(1).tolist(), wanted.sum(1).tolist()
