"""The model as it was before training, without a second copy of it: the adapter left out, or at its starting values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graftlm.core import Adapter, in_eval_mode, use
from graftlm.objectives.objective import Objective

__all__ = ["Reference", "Standing", "mean_loss", "settle"]


class Reference:
    """What DPO and KTO compare with.

    An adapter that starts as the identity is left out of the routing. One that does not (a random prompt, weights that
    were trained before) keeps a copy of its starting values, which take the place of the trained ones for a moment:
    leaving it out would compare with another model than training started from. With `rest`, the reference is the
    routing to that adapter: one that the new one stands on, or the stored start of a finished one.

    Example:
        >>> reference = Reference(adapter)                                                  # doctest: +SKIP
        >>> with reference.acting(): before = model(**batch).logits                         # doctest: +SKIP
    """

    def __init__(self, adapter: Adapter, *, trained_before: bool = False, rest: str | None = None) -> None:
        self.adapter, self.rest = adapter, rest
        identity = not trained_before and all(part.starts_as_identity for part in adapter.method.parts)
        self._start = None if identity or rest is not None else _copies(adapter.state())

    @property
    def by_values(self) -> bool:
        """Whether starting values are kept (a copy of the adapter, never of the base)."""
        return self._start is not None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The reference is the model, for the block."""
        if self._start is None:
            with use(self.adapter.model, self.rest):
                yield
            return
        now = _copies(self.adapter.state())
        self.adapter.load_state(self._start)
        try:
            yield
        finally:
            self.adapter.load_state(now)


class Standing:
    """The model as it stands: its own reference, before there is an adapter that could be told from it."""

    def acting(self) -> AbstractContextManager[None]:
        """Nothing changes for the block."""
        return nullcontext()


def settle(
    model: Any,
    objective: Objective,
    batches: Sequence[dict[str, Any]],
    reference: Reference | Standing | None,
    *,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> None:
    """Write what the objective needs to know before a step into its batches: nothing for most."""
    if not objective.needs:
        return
    assert reference is not None or "reference" not in objective.needs
    for batch in batches:
        # Without dropout: both sides are compared, and a random mask is no part of either model.
        with torch.no_grad(), in_eval_mode(model):
            if "reference" in objective.needs and reference is not None:
                with reference.acting():
                    batch["reference"] = _values(model, objective, batch)
            if "policy" in objective.needs:
                batch["policy"] = _values(model, objective, batch)
    objective.before_step(batches, total)


def mean_loss(
    model: Any, objective: Objective, batch: dict[str, Any], reference: Reference | Standing | None = None
) -> Tensor:
    """The batch's mean loss; without a `reference` the model is its own, as it is before anything is attached."""
    settle(model, objective, [batch], reference or Standing())
    return objective.loss_sum(objective.outputs(model, batch), batch) / max(objective.count(batch), 1)


def _values(model: Any, objective: Objective, batch: Mapping[str, Tensor]) -> Tensor:
    on_device = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
    return objective.sequence_values(objective.outputs_before(model, on_device), on_device)


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
