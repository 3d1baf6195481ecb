"""Group relative policy optimisation: answers that beat the others to the same prompt become likelier.

Shao et al. 2024, "DeepSeekMath", eqs. 3 and 4, with every token of a step weighing the same, as in Yu et al. 2025,
"DAPO", section 3.3. With r = p(y_t) / p_old(y_t), A = (R - mean R) / (std R + 1e-4) over the group, and
d = log p_ref(y_t) - log p(y_t), the loss of a token is

    -min(r A, clip(r, 1 - e, 1 + e) A) + b (exp(d) - d - 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftlm.objectives.online import Online
from graftlm.objectives.sequences import IGNORED, token_table

__all__ = ["GRPO"]


@dataclass(frozen=True)
class GRPO(Online):
    """The GRPO loss of each token of the answers.

    Example:
        >>> GRPO(answers=2).advantages(torch.tensor([[1.0, 0.0]])).mul(1000).round().tolist()
        [[707.0, -707.0]]
    """

    unit: ClassVar[str] = "tokens"

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards in standard units of their group."""
        from_mean = rewards - rewards.mean(1, keepdim=True)
        return from_mean / (rewards.std(1, keepdim=True) + 1e-4)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of answers."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each token, [N, T]; 0 outside the answers."""
        now = token_table(outputs, batch)
        loss = self.clipped(now - batch["policy"], batch["advantages"][:, None])
        above = batch["reference"] - now
        loss = loss + self.kl_weight * (torch.exp(above) - above - 1)
        return torch.where(answered(batch), loss, 0.0)

    def row_losses(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """The summed loss and the tokens of each answer."""
        return self.each(outputs, batch).double().sum(1).tolist(), answered(batch).sum(1).tolist()


def answered(batch: Mapping[str, Tensor]) -> Tensor:
    """Where tokens of answers are, [N, T]."""
    found = batch["labels"] != IGNORED
    found[:, 0] = False  # nothing comes before it
    return found
