"""Proximal policy optimisation: tokens that led to more than was expected become likelier, within a clip.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eqs. 7 and 9, without an entropy bonus; advantages by
Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16; the distance
to the model before training taken off token by token as in Ouyang et al. 2022 ("InstructGPT"), and the clipped loss of
values, which are no part of the first paper, as its authors' code (openai/baselines) has them. For the tokens
t = 1..T of an answer with the reward R, old values v_t (what was expected before token t) and r = p(y_t) / p_old(y_t):

    r_t = -b (log p_old(y_t) - log p_ref(y_t)),   with R added to r_T
    d_t = r_t + g v_(t+1) - v_t,   v_(T+1) = 0
    A_t = sum_k (g l)^k d_(t+k),   G_t = A_t + v_t,   A' = (A - mean) / sqrt(variance + 1e-8) over the step's tokens
    loss_t = -min(r A'_t, clip(r, 1 - e, 1 + e) A'_t)
             + c / 2 max((V_t - G_t)^2, (clip(V_t, v_t - e', v_t + e') - G_t)^2)

Mean and variance are taken over the whole optimizer step, so that loss and gradient do not depend on how it is cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.core import adapters
from graftlm.errors import Finding, RunError
from graftlm.kernels import with_states
from graftlm.objectives.grpo import answered
from graftlm.objectives.online import Online
from graftlm.objectives.sequences import token_table

__all__ = ["PPO", "generalized_advantages"]


@dataclass(frozen=True)
class PPO(Online):
    """The PPO loss of each token of the answers.

    What the model gives for a batch is a pair, [N, T] each: what `token_table` reads, and the value at each token, the
    value head's number at the states that predict it. `value` is that head (`graftlm.methods.Value`).

    Example:
        >>> PPO(discount=0.9, gae_lambda=0.5).gae_lambda
        0.5
    """

    unit: ClassVar[str] = "tokens"

    discount: float = 1.0
    gae_lambda: float = 0.95
    value_weight: float = 0.1
    value_clip: float = 0.2
    value: Callable[[Tensor], Tensor] | None = None

    def on(self, model: Any) -> PPO:
        """This objective with the value head of the adapter that acts on `model`, the last one that has such a head."""
        readers = [
            part.delta for each in adapters(model).values() for part in each.parts if part.method.name == "value"
        ]
        return replace(self, value=readers[-1] if readers else None)

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        """The loss of each token or the model's outputs, and the values [N, T], 0 outside the answers."""
        assert self.value is not None
        outputs: Any
        if self.head is not None:
            outputs, states = self.head.losses_and_states(model, self.inputs(batch), batch["labels"])
        else:
            found, outputs = with_states(model, self.inputs(batch))
            if found is None:
                message = (
                    f"the last hidden states of {type(model).__name__} cannot be told, which PPO's values come from"
                )
                raise RunError(Finding("U145", message, fix="--task grpo"))
            states = found
        values = F.pad(self.value(states[:, :-1]), (1, 0))  # what token t is worth is read before it
        return outputs, torch.where(answered(batch), values, 0.0)

    def sequence_values(self, outputs: tuple[Any, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The log-probability of each token of the answers, and the value before it, [N, T, 2]."""
        told, values = outputs
        return torch.stack([token_table(told, batch), values], dim=2)

    def before_step(self, batches: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]) -> None:
        """Write `advantages`, whitened over the step, and `returns`, [N, T] each, into each batch."""
        plain = []
        for batch in batches:
            mask = answered(batch)
            log_probs, values = batch["policy"].unbind(2)
            rewards = -self.kl_weight * (log_probs - batch["reference"][:, :, 0])
            last = torch.arange(mask.shape[1], device=mask.device).mul(mask).argmax(1)
            rewards[torch.arange(len(mask), device=mask.device), last] += batch["rewards"].to(rewards)
            found = generalized_advantages(torch.where(mask, rewards, 0.0), values, self.discount, self.gae_lambda)
            batch["returns"] = found + values
            plain.append((found, torch.zeros_like(mask) if "void" in batch else mask))
        chosen = torch.cat([found[mask] for found, mask in plain])
        count, whole = total(torch.stack([chosen.new_tensor(len(chosen)), chosen.sum()]))
        mean = whole / count
        variance = total((chosen - mean).square().sum()) / (count - 1).clamp(min=1)
        for batch, (found, _) in zip(batches, plain, strict=True):
            batch["advantages"] = (found - mean) * torch.rsqrt(variance + 1e-8)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of answers."""
        return int(answered(batch).sum())

    def each(self, outputs: tuple[Any, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each token, [N, T]; 0 outside the answers."""
        told, values = outputs
        log_probs, before = batch["policy"].unbind(2)
        loss = self.clipped(token_table(told, batch) - log_probs, batch["advantages"])
        clipped = torch.clamp(values, before - self.value_clip, before + self.value_clip)
        errors = torch.maximum((values - batch["returns"]).square(), (clipped - batch["returns"]).square())
        return torch.where(answered(batch), loss + self.value_weight / 2 * errors, 0.0)

    def row_losses(self, outputs: tuple[Any, Tensor], batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """The summed loss and the tokens of each answer."""
        return self.each(outputs, batch).double().sum(1).tolist(), answered(batch).sum(1).tolist()


def generalized_advantages(rewards: Tensor, values: Tensor, discount: float, decay: float) -> Tensor:
    """A_t of rewards and values [N, T], both 0 behind the end of a row.

    Example:
        >>> generalized_advantages(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), 1.0, 0.5).tolist()
        [[0.25, 0.5]]
    """
    found = torch.zeros_like(rewards)
    follows, after = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for at in reversed(range(rewards.shape[1])):
        follows = rewards[:, at] + discount * after - values[:, at] + discount * decay * follows
        found[:, at], after = follows, values[:, at]
    return found
