r"""Gates that read the input: how much of a change a text gets (Mao et al. 2022, "UniPELT", section 3).

    g = mean over the real tokens t of sigmoid(w . x_t + b),   one g a row;   y + g (delta's change),  g K and g V

x is what the delta itself reads. Padding is left out of the mean, so that it does not change the output (the authors'
code takes it along). Where a token sees only those before it, the mean would tell it of those behind, and would change
while a text is generated: there every token has a gate of its own, sigmoid(w . x_t + b), and keys and values, which all
tokens share, have one without input, sigmoid(b). So it is in decoders and in attention to an encoder.

w and b start uniform in +-1/sqrt(d), as in the authors' code, so that g starts about 1/2. d + 1 numbers a site beside
the method's own. There is no merged form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import BranchDelta, Delta, KeyValueDelta, LinearDelta, Method, Site, Survey
from graftlm.core.delta import acts
from graftlm.errors import Finding, MethodError
from graftlm.methods.gates import Gate, GatedMethod
from graftlm.methods.lora import LoRA

__all__ = ["Gated", "InputGate"]


@dataclass(frozen=True)
class Gated(GatedMethod):
    """Gates that read the input, one around every change of a method (Mao et al. 2022).

    For changes that are added: low-rank ones, adapters, prefixes. LoRA's own scale stays; UniPELT sets it to one.

    Example:
        >>> print(Gated(LoRA(rank=8, alpha=8)))
        gated(method=lora(alpha=8))
    """

    name: ClassVar[str] = "gated"
    title: ClassVar[str] = "Input gates"
    learning_rate: ClassVar[float] = LoRA.learning_rate

    method: Method = field(default_factory=LoRA)

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]  # as the method inside
        """As the method inside."""
        return self.method.starts_as_identity

    def sites(self, survey: Survey) -> list[Site]:
        """The sites of the method inside, with a note where tokens see only those before them."""
        causal = any(site.causal for site in (*survey.attentions, *survey.sequences)) or not survey.attentions
        by_stack = {"encoder": False, "decoder": True, "cross": True}
        return [replace(site, causal=by_stack.get(site.stack, causal)) for site in self.method.sites(survey)]

    def gate_of(self, site: Site, module: nn.Module, delta: Delta) -> InputGate:  # noqa: ARG002
        """A fresh gate. Raises MethodError where what the delta changes is not added, or is no vector."""
        adds = isinstance(delta, LinearDelta) and (acts(delta, "add") or acts(delta, "add_over"))
        bends = isinstance(delta, LinearDelta) and (acts(delta, "before") or acts(delta, "after"))
        if not (adds or isinstance(delta, (BranchDelta, KeyValueDelta))) or bends or site.kind == "embedding":
            raise MethodError(
                Finding(
                    "T143",
                    f"gated: {self.method.name} at {site.key} adds nothing that a gate could read the input of",
                    fix=f"rezero({self.method})",
                )
            )
        width = site.in_features
        if isinstance(delta, KeyValueDelta) and site.causal:
            width = 0
        return InputGate(width, site.causal)


class InputGate(Gate):
    """sigmoid(w . x + b): of each token where `causal`, else the mean over the real tokens; sigmoid(b) without w."""

    reads_input: ClassVar[bool] = True

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(1, width, dtype=torch.float32)) if width else None
        self.bias = nn.Parameter(torch.zeros((1,), dtype=torch.float32))
        if self.weight is not None:
            bound = 1 / math.sqrt(width)
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    def factor(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[rows, tokens, 1] where causal, [rows, 1, 1] where not, a number without x; for x [rows, tokens, width]."""
        if self.weight is None:
            return torch.sigmoid(self.bias[0].to(x.dtype))
        each = torch.sigmoid(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))
        if self.causal or x.dim() < 3:
            return each
        if mask is None:
            return each.mean(1, keepdim=True)
        real = mask.unsqueeze(-1).to(x.dtype)
        return (each * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
