"""The shape of an objective: inputs for the model, a count, a sum of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["Objective"]


class Objective(ABC):
    """What training minimises: `loss_sum / count` over all rows of an optimizer step."""

    #: The name of what `count` counts: "tokens" or "rows".
    unit: ClassVar[str]

    @abstractmethod
    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model is called with."""

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """What `loss_sum` and `row_losses` are given: the model's outputs for the batch."""
        return model(**self.inputs(batch))

    @abstractmethod
    def count(self, batch: Mapping[str, Tensor]) -> int:
        """How many losses the batch sums."""

    @abstractmethod
    def loss_sum(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of the losses, a scalar in float32."""

    @abstractmethod
    def row_losses(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
        """The sum and the count of the losses of each row, for evaluation."""
