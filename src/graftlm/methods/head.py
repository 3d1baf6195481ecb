"""Head: the modules outside the backbone are trained (a "linear probe"), or swapped for fresh ones.

A head belongs to its adapter: it is saved, routed and loaded with it, so each may have its own labels.
Parameters: the head's, or `outputs` (in + 1) in its last map. Start: the base's values, or normal with standard
deviation 0.02 and zero biases, as BERT's authors start a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from graftlm.core import Delta, Site, Survey, WholeParameterDelta
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import Parameters

__all__ = ["FreshDelta", "Head"]

#: Models of which the head must keep the vocabulary's width.
_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


@dataclass(frozen=True)
class Head(Parameters):
    """Train the head: the modules outside the backbone (classifier, score), or the output embedding.

    `outputs` gives the last map of a classification head that many outputs, whatever the base has (logits then have
    that width: compute the loss from them, since the model's own loss counts on its configuration's labels);
    `start=fresh` forgets the base's head. A head of another width cannot be merged.

    Example:
        >>> print(Head(outputs=5))
        head(outputs=5)
    """

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "head only"
    learning_rate: ClassVar[float] = 2e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-1)

    outputs: int | None = None
    start: str = "base"

    def __post_init__(self) -> None:
        self.require(
            (
                self.outputs is None or (isinstance(self.outputs, int) and self.outputs >= 1),
                f"outputs {self.outputs!r} is not a whole number from 1",
                "outputs=2",
            ),
            (self.start in ("base", "fresh"), f"start {self.start!r} is neither base nor fresh", "start=fresh"),
        )

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        """True where the base's own head is trained on."""
        return self.outputs is None and self.start == "base"

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the head, those of its last map last."""
        maps = [site for site in survey.with_role("head") if site.kind in ("linear", "conv1d")]
        if not survey.with_role("head"):
            raise MethodError(Finding("T110", f"head: {survey.model_name} has no head beside its backbone"))
        found = survey.select_parameters("head")
        if self.outputs is None:
            return found
        if survey.model_name.endswith(_LANGUAGE) or not maps:
            raise MethodError(
                Finding("T160", f"head: outputs={self.outputs} cannot be had in {survey.model_name}, whose head "
                        "gives a number to each token of the vocabulary", fix="head")
            )  # fmt: skip
        last = maps[-1].path
        return [*(site for site in found if site.path != last), *(site for site in found if site.path == last)]

    def build(self, site: Site, module: nn.Module) -> WholeParameterDelta:
        """A trained copy of the parameter at `site`, or a fresh one."""
        delta = super().build(site, module)
        return FreshDelta(delta.value, delta.value.shape) if self.start == "fresh" else delta

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A delta for each parameter; those of the last map with `outputs` rows."""
        deltas = super().build_all(sites, modules, values=values)
        if self.outputs is None:
            return deltas
        for at, (site, delta) in enumerate(zip(sites, deltas, strict=True)):
            if site.path == sites[-1].path:
                assert isinstance(delta, WholeParameterDelta)
                with delta.value.device:
                    deltas[at] = FreshDelta(delta.value, torch.Size((self.outputs, *delta.value.shape[1:])))
        return deltas


class FreshDelta(WholeParameterDelta):
    """A parameter that forgets the base's value, in the base's shape or in `shape`."""

    def __init__(self, base: torch.Tensor, shape: torch.Size) -> None:
        super().__init__(torch.empty(shape, dtype=torch.float32))
        self.folds = shape == base.shape
        self.why_not = "" if self.folds else f"it has {shape[0]} outputs where the base has {base.shape[0]}"
        if base.dim() > 1:
            nn.init.normal_(self.value, std=0.02)
        else:
            nn.init.zeros_(self.value)
