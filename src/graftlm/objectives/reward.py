"""Reward modelling: a head's number for an answer is larger for the chosen than for the rejected one.

The Bradley-Terry loss -log sigmoid(r(y_w) - r(y_l)): Ouyang et al. 2022, "Training language models to follow
instructions with human feedback", eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.by_row import ByRow

__all__ = ["Reward"]


class Reward(ByRow):
    """The pairwise loss; sequences are chosen, rejected, chosen, rejected ..., logits [sequences, 1].

    Example:
        >>> import torch
        >>> Reward().count({"group": torch.tensor([0, 0, 1, 1])})
        2
    """

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Both answers' token ids, one sequence each."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """The number of pairs."""
        return int(batch["group"].shape[0]) // 2

    def rewards(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The rewards of chosen and rejected answers, [pairs, 2]."""
        del batch
        rewards: Tensor = outputs.logits[:, 0].float().reshape(-1, 2)
        return rewards

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each pair in nats."""
        chosen, rejected = self.rewards(outputs, batch).unbind(1)
        return -F.logsigmoid(chosen - rejected)
