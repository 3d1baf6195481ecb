"""Full fine-tuning: trained copies of every parameter; the yardstick for all other methods.

Parameters: all of the model's, tied ones once. Start: the base's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftlm.core import Site, Survey
from graftlm.methods.parameters import Parameters

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Parameters):
    """Full fine-tuning: train every parameter; the yardstick for all other methods.

    Because the base is kept for comparison and unmerging, the weights are held twice.

    Example:
        >>> print(Full())
        full
    """

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full fine-tuning"
    learning_rate: ClassVar[float] = 5e-5
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-6, 1e-3)

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the model; tied weights once."""
        return list(survey.parameters)
