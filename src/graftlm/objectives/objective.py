"""The shape of an objective: inputs for the model, a count, a sum of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["Objective"]


class Objective(ABC):
    """What training minimises: `loss_sum / count` over all rows of an optimizer step."""

    #: The name of what `count` counts: "tokens" or "rows".
    unit: ClassVar[str]
    #: What must be known of a batch before its loss can be: "reference" (the model before training), "policy" (the
    #: model as it is before the step). `before_step` then finds `sequence_values` of them in the batch by these names.
    needs: ClassVar[tuple[str, ...]] = ()

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

    def outputs_before(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """What `sequence_values` is given for `needs`, found without gradients."""
        return self.outputs(model, batch)

    def sequence_values(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What is kept of such a call: a number for each sequence of the batch."""
        raise NotImplementedError

    def before_step(self, batches: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]) -> None:  # noqa: B027
        """Settle what all micro-batches of a step share; `total` sums a tensor over all processes.

        A batch with `void` has rows that another process has too: they count for nothing.
        """
