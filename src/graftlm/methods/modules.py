"""Whole modules: trained copies of the modules that the user names (`modules_to_save` in PEFT).

Parameters: all of theirs. Start: the base's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftlm.core import Site, Survey, Targets
from graftlm.methods.parameters import Parameters

__all__ = ["Modules"]


@dataclass(frozen=True)
class Modules(Parameters):
    """Train whole modules, named as in `targets` elsewhere (PEFT's `modules_to_save`).

    Example:
        >>> print(Modules(["embed_tokens", "lm_head"]))
        modules(targets=[embed_tokens,lm_head])
    """

    name: ClassVar[str] = "modules"
    title: ClassVar[str] = "whole modules"
    learning_rate: ClassVar[float] = 5e-5
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-6, 1e-2)

    targets: Targets = "head"

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the named modules; a tied weight at the named module alone."""
        return survey.select_parameters(self.targets)
