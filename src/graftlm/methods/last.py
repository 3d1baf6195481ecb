"""The last layers: the k layers nearest the output are trained whole, the others stay as they are.

"FT-Top2" in Li & Liang 2021 ("Prefix-Tuning") for k = 2. Parameters: all of theirs. Start: the base's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftlm.core import Site, Survey
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import Parameters, in_layers

__all__ = ["Last"]


@dataclass(frozen=True)
class Last(Parameters):
    """Train the last `count` layers, of each stack where there are two; `layers` chooses others.

    Example:
        >>> print(Last(4))
        last(count=4)
    """

    name: ClassVar[str] = "last"
    title: ClassVar[str] = "last layers"
    learning_rate: ClassVar[float] = 5e-5
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-6, 1e-3)

    count: int = 2

    def __post_init__(self) -> None:
        self.require((self.count >= 1, f"count {self.count} is not a whole number from 1", "count=2"))

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the last `count` layers, without the head's."""
        if self.count > survey.layer_count:
            raise MethodError(
                Finding(
                    "T111",
                    f"last: {survey.model_name} has {survey.layer_count} layers, not {self.count}",
                    fix=f"count={survey.layer_count}",
                )
            )
        return in_layers(survey, range(survey.layer_count - self.count, survey.layer_count))
