"""Direct preference optimisation: the chosen answer becomes likelier than the rejected one, beside a reference.

Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; label smoothing as in Mitchell 2023, "A note on DPO with
noisy preferences"; IPO as in Azar et al. 2023, "A General Theoretical Paradigm...", eq. 17, with log-probabilities per
token as its authors' code has them. With r = log p(y) - log p_ref(y) of chosen y_w and rejected y_l, and
d = r(y_w) - r(y_l):

    sigmoid   -(1 - e) log sigmoid(b d) - e log sigmoid(-b d)
    ipo       (d - 1 / (2 b))^2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.by_row import Answers
from graftlm.objectives.sequences import sequence_scores

__all__ = ["DPO"]


@dataclass(frozen=True)
class DPO(Answers):
    """The DPO loss of each pair; sequences are chosen, rejected, chosen, rejected ...

    The batch must hold `reference` [sequences], the same sums under the model before training.

    Example:
        >>> import torch
        >>> DPO().count({"group": torch.tensor([0, 0, 1, 1])})
        2
    """

    needs: ClassVar[tuple[str, ...]] = ("reference",)

    beta: float = 0.1
    smoothing: float = 0.0
    kind: str = "sigmoid"

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """The number of pairs."""
        return int(batch["group"].shape[0]) // 2

    def sequence_values(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The log-probability of each answer, [sequences]; per token for IPO."""
        sums, counts = sequence_scores(outputs, batch)
        return sums / counts.clamp(min=1) if self.kind == "ipo" else sums

    def rewards(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The implied rewards b r of chosen and rejected answers, [pairs, 2]."""
        return self.beta * (self.sequence_values(outputs, batch) - batch["reference"]).reshape(-1, 2)

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self.rewards(outputs, batch).unbind(1)
        gap = chosen - rejected
        if self.kind == "ipo":
            return (gap / self.beta - 1 / (2 * self.beta)).square()
        return -(1 - self.smoothing) * F.logsigmoid(gap) - self.smoothing * F.logsigmoid(-gap)
