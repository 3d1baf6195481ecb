"""T-Few: language modelling, unlikelihood and length-normalised choice together.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.2.
For a row with the right answer y and N wrong answers y_n, of T and T_n tokens:

    L_LM = -1/T sum_t log p(y_t | x, y_<t)                                                          (their eq. 1)
    L_UL = -sum_n sum_t log(1 - p(y_n,t | x, y_n,<t)) / sum_n T_n                                   (eq. 2)
    L_LN = -log softmax_y(1/T sum_t log p(y_t | x, y_<t)), over all answers                         (eq. 3 and 4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.choice import Choice
from graftlm.objectives.sequences import by_row, token_log_probs

__all__ = ["TFew"]

_NEARLY_ONE = -1e-6  # log-probabilities are kept below it, so that log(1 - p) stays finite


@dataclass(frozen=True)
class TFew(Choice):
    """L_LM + L_UL + L_LN of each row; a batch is that of `Choice` by likelihood.

    Example:
        >>> import torch
        >>> TFew().count({"group": torch.tensor([0, 0]), "target": torch.tensor([0])})
        1
    """

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row in nats."""
        values, owner = token_log_probs(outputs, batch)
        zeros = values.new_zeros(batch["labels"].shape[0])
        counts = zeros.index_add(0, owner, torch.ones_like(values))
        likely = by_row(zeros.index_add(0, owner, values) / counts.clamp(min=1), batch["group"], empty=float("-inf"))
        unlikely = zeros.index_add(0, owner, -torch.log(-torch.expm1(values.clamp(max=_NEARLY_ONE))))

        target = batch["target"]
        right = F.one_hot(target, likely.shape[1]).bool()
        wrong = by_row(unlikely, batch["group"], empty=0.0).masked_fill(right, 0.0).sum(1)
        tokens = by_row(counts, batch["group"], empty=0.0).masked_fill(right, 0.0).sum(1)
        chosen = likely.gather(1, target[:, None])[:, 0]
        return -chosen + wrong / tokens.clamp(min=1) + F.cross_entropy(likely, target, reduction="none")
