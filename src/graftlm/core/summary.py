"""A summary of what is attached to a model: adapters, parameters, sites by role."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from graftlm.core.adapter import Adapter, adapters
from graftlm.core.storage import parameter_count

__all__ = ["Summary", "summary"]


@dataclass(frozen=True)
class Summary:
    """Counts for one model; `print` shows them as a table."""

    model_name: str
    base_parameters: int
    adapters: tuple[Adapter, ...]

    @property
    def trainable_parameters(self) -> int:
        """Numbers that training would change."""
        return sum(p.numel() for adapter in self.adapters for p in adapter.parameters() if p.requires_grad)

    def __str__(self) -> str:
        lines = [f"{self.model_name}  {self.base_parameters:,} parameters"]
        for adapter in self.adapters:
            places = Counter(part.site.role or part.site.path.rpartition(".")[2] for part in adapter.parts)
            where = " ".join(f"{role}:{count}" for role, count in sorted(places.items()))
            share = 100 * adapter.parameter_count / max(self.base_parameters, 1)
            state = "merged" if adapter.merged else "attached"
            lines.append(
                f"  {adapter.name}  {adapter.method}  {adapter.parameter_count:,} parameters ({share:.2f} %)  "
                f"{state}  {where}"
            )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What is attached to `model` and how large it is."""
    return Summary(
        model_name=type(model).__name__,
        base_parameters=parameter_count(model),
        adapters=tuple(adapters(model).values()),
    )
