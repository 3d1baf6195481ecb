"""What objectives share that have one loss a row, and those among them that read whole answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graftlm.kernels import LossHead
from graftlm.objectives.objective import Objective
from graftlm.objectives.sequences import sequence_inputs, sequence_outputs

__all__ = ["Answers", "ByRow"]


class ByRow(Objective):
    """An objective of which `each` gives the loss of each row."""

    unit: ClassVar[str] = "rows"

    @abstractmethod
    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The losses that `loss_sum` adds up, [rows], in float32."""

    def loss_sum(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed losses of the rows."""
        return self.each(outputs, batch).sum()

    def row_losses(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """The loss of each row."""
        each = self.each(outputs, batch)
        return each.tolist(), [1] * len(each)


@dataclass(frozen=True)
class Answers(ByRow):
    """An objective over sequences of a prompt and an answer each, of which the model says how likely the answer is.

    `head` is the model's `graftlm.kernels.LossHead`, where that is known; `tail_only` asks other models for logits from
    the first labelled position on.
    """

    tail_only: bool = False
    head: LossHead | None = None

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Token ids of prompts with their answers, one sequence each."""
        return sequence_inputs(batch, tail_only=self.tail_only)

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """The loss of each token [sequences, tokens], or what the model returns where its head is not known."""
        return sequence_outputs(model, batch, tail_only=self.tail_only, head=self.head)
