"""REINFORCE leave-one-out: each answer is compared with the mean of the others to the same prompt.

Ahmadian et al. 2024, "Back to Basics", eq. 6, with whole answers as actions and the distance to the model before
training as part of the reward. With R = reward - b (log p_old(y) - log p_ref(y)), A = R - mean of the others' R, and
r = p(y) / p_old(y), the loss of an answer is

    -min(r A, clip(r, 1 - e, 1 + e) A)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graftlm.objectives.online import Online
from graftlm.objectives.sequences import token_table

__all__ = ["RLOO"]


@dataclass(frozen=True)
class RLOO(Online):
    """The RLOO loss of each answer.

    Example:
        >>> import torch
        >>> RLOO(answers=3).advantages(torch.tensor([[1.0, 0.0, 0.5]])).tolist()
        [[0.75, -0.75, 0.0]]
    """

    unit: ClassVar[str] = "answers"

    def advantages(self, rewards: Tensor) -> Tensor:
        """Each reward less the mean of the others of its group."""
        others = (rewards.sum(1, keepdim=True) - rewards) / (self.answers - 1)
        return rewards - others

    def scored(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Rewards less the weighted distance to the model before training."""
        return batch["rewards"] - self.kl_weight * (batch["policy"] - batch["reference"]).sum(1)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Answers."""
        return int(batch["labels"].shape[0])

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each answer, [N]."""
        log_ratio = (token_table(outputs, batch) - batch["policy"]).sum(1)
        return self.clipped(log_ratio, batch["advantages"])
