"""Layer freezing: whole layers are trained, the others stay as they are.

The last two are "FT-Top2" in Li & Liang 2021 ("Prefix-Tuning"). Parameters: all of theirs; 12 d^2 + 13 d in a layer of
GPT-2. Start: the base's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graftlm.core import Site, Survey
from graftlm.core.sites import parse_layers
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import Parameters, in_layers

__all__ = ["Layers"]


@dataclass(frozen=True)
class Layers(Parameters):
    """Layer freezing: train whole layers, freeze the others (by default the last two, "FT-Top2" in Li & Liang 2021).

    `layers` takes `-2:` (the last two), `0-3`, `5` or `0,2,4`.

    Example:
        >>> print(Layers("-4:"))
        layers(layers='-4:')
    """

    name: ClassVar[str] = "layers"
    title: ClassVar[str] = "unfrozen layers"
    learning_rate: ClassVar[float] = 5e-5
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-6, 1e-3)

    layers: str | int | Sequence[int] = "-2:"

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the chosen layers."""
        wanted = parse_layers(self.layers, survey.layer_count)
        chosen = in_layers(survey, range(survey.layer_count) if wanted is None else wanted)
        if not chosen:
            raise MethodError(Finding("T111", f"layers: {self.layers!r} names no layer of {survey.model_name}"))
        return chosen
