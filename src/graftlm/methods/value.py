"""Value: a number for each token of a row, what the rest of an answer is expected to be worth; it changes nothing.

    v_t = w h_t + b,   h_t the states that the output embedding reads, w and b trained

The critic of PPO (Schulman et al. 2017, section 3, with a head on the policy's own body as in Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences", section 2.1). It is a part of the adapter: trained, saved and
loaded with it; no forward calls it. Parameters: d + 1. Start: zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Method, ReadingDelta, Site, Survey
from graftlm.errors import Finding, MethodError

__all__ = ["Value", "ValueDelta"]


@dataclass(frozen=True)
class Value(Method):
    """A value head on the last hidden states of a language model; tasks that need one add it.

    Example:
        >>> print(Value())
        value
    """

    name: ClassVar[str] = "value"
    title: ClassVar[str] = "value head"
    learning_rate: ClassVar[float] = 1e-3

    def sites(self, survey: Survey) -> list[Site]:
        """The output embedding, whose input it reads."""
        found = [site for site in survey.with_role("head") if site.kind == "linear"]
        if len(found) != 1:
            message = f"value: {survey.model_name} has no output embedding, whose input it reads"
            raise MethodError(Finding("T110", message))
        return found

    def build(self, site: Site, module: nn.Module) -> ValueDelta:
        """A head of zeros."""
        del module
        return ValueDelta(site.in_features)


class ValueDelta(ReadingDelta):
    """The map from states to values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value_weight = nn.Parameter(torch.zeros(1, width, dtype=torch.float32))
        self.value_bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, states: Tensor) -> Tensor:
        """The value at each state, [rows, tokens] in float32, for states [rows, tokens, width]."""
        return F.linear(states.float(), self.value_weight, self.value_bias)[..., 0]
