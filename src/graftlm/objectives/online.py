"""What the objectives share that learn from rewards of the model's own answers.

A batch has an answer a sequence, those to one prompt side by side: `labels` [N, T] on the answer's tokens, `rewards`
[N], and what `settle` finds of the model before training (`reference`) and as it sampled (`policy`): the
log-probability of each token of an answer, [N, T], 0 elsewhere. `before_step` makes `advantages` [N] of them.

Answers are sampled at temperature 1, without cuts: what is sampled is what is trained. Each is learnt from once, so the
ratio to the policy that sampled is 1 unless dropout moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftlm.objectives.by_row import Answers
from graftlm.objectives.sequences import token_table

__all__ = ["Online"]


@dataclass(frozen=True)
class Online(Answers):
    """A policy-gradient objective over groups of `answers` to the same prompt."""

    needs: ClassVar[tuple[str, ...]] = ("reference", "policy")

    answers: int = 8
    kl_weight: float = 0.04
    clip: float = 0.2

    def sequence_values(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The log-probability of each token of the answers, [N, T]."""
        return token_table(outputs, batch)

    def advantages(self, rewards: Tensor) -> Tensor:
        """How much better each answer is than the others to its prompt; rewards and result [prompts, answers]."""
        raise NotImplementedError

    def scored(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The rewards [N] that advantages are made of."""
        return batch["rewards"]

    def before_step(self, batches: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]) -> None:
        """Write the advantages into each batch."""
        del total
        for batch in batches:
            batch["advantages"] = self.advantages(self.scored(batch).reshape(-1, self.answers)).flatten()

    def clipped(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """The loss -min(r A, clip(r) A) of ratios r, as Schulman et al. 2017, eq. 7."""
        ratio = torch.exp(log_ratio)
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages)
