"""Norm tuning: only the scales and shifts of the normalisation layers are trained.

Qi et al. 2022 ("Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models") and Zhao et al.
2023 ("Tuning LayerNorm in Attention"). Parameters: d for a norm with a scale alone (RMSNorm), 2 d with a shift.
Start: the base's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftlm.core import Site, Survey, Targets
from graftlm.methods.parameters import Parameters

__all__ = ["NormTuning"]


@dataclass(frozen=True)
class NormTuning(Parameters):
    """Train the parameters of every normalisation layer, or of those that `targets` name.

    Example:
        >>> print(NormTuning())
        norm
    """

    name: ClassVar[str] = "norm"
    title: ClassVar[str] = "norm tuning"
    learning_rate: ClassVar[float] = 3e-3

    targets: Targets = "norm"

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the norms."""
        return survey.select_parameters(self.targets)
