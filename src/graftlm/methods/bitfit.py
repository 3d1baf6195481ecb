"""BitFit: the biases are trained, and nothing else (Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient...").

    y = W x + b,   b trained       (section 3)

Where a linear map has no bias (Llama, Mistral, T5), `add` gives it one of zero, as T-Few's code does, so the change
starts as the identity; `norms` does so for normalisations without a shift. Merged, an added bias becomes the map's own.
Parameters: out a map, d a norm; 102,912 in BERT-base (with the pooler's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import Delta, LinearDelta, Method, Site, Survey, Targets
from graftlm.core.sites import selectors
from graftlm.errors import Finding, MethodError, SiteError
from graftlm.methods.parameters import trained_copy

__all__ = ["BiasDelta", "BitFit"]


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias, and nothing else.

    Normalisation shifts count as biases, as in the authors' code; a classification head does not (`bitfit+head` is what
    the paper trains). `targets` restricts it to the biases of the named modules, such as the paper's
    `targets=[query,up]`. With `add`, maps of the blocks that have no bias get one of zero; with `norms`, so do
    norms that have no shift.

    Example:
        >>> print(BitFit(norms=True))
        bitfit(norms=True)
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    learning_rate: ClassVar[float] = 1e-3

    targets: Targets = ()
    add: bool = True
    norms: bool = False

    def sites(self, survey: Survey) -> list[Site]:
        """Every bias of `targets`, or all outside the head; then the maps and norms that get one."""
        chosen: dict[str, Site] = {}
        faults: list[Finding] = []
        kinds = (*(("linear", "conv1d") if self.add else ()), *(("norm",) if self.norms else ()))
        if self.targets:
            for word in selectors(self.targets):
                found: list[Site] = []
                missing: list[Finding] = []
                try:
                    found += survey.select_parameters(word)
                except SiteError as error:
                    missing += error.findings
                if kinds:
                    try:
                        found += survey.select(word, kinds=kinds)
                    except SiteError as error:
                        missing += error.findings
                if not found:
                    faults += missing[:1]
                chosen.update((site.key, site) for site in found)
        else:
            heads = {site.path for site in survey.with_role("head")}
            chosen.update((site.key, site) for site in survey.parameters if site.path not in heads)
            words = (*(("all-linear",) if self.add else ()), *(("norm",) if self.norms else ()))
            for word in words:
                try:
                    found = survey.select(word, kinds=kinds)
                except SiteError:
                    continue  # a model without such maps: nothing to add there
                chosen.update((site.key, site) for site in found)
        if faults:
            raise MethodError(faults)
        have = {place for site in survey.parameters for place in site.places}
        wanted = []
        for site in chosen.values():
            is_bias = (site.parameter or "").endswith("bias")
            if is_bias if site.parameter else site.part or (site.path, "bias") not in have:
                wanted.append(site)
        if not wanted:
            raise MethodError(
                Finding("T109", f"bitfit: {survey.model_name} has no biases to train there", fix="bitfit(add=true)")
            )
        return wanted

    def build(self, site: Site, module: nn.Module) -> Delta:
        """A trained copy of the bias at `site`, or a fresh one of zero."""
        if site.parameter:
            return trained_copy(self, site, module)
        weight = module._parameters.get("weight")
        width = site.out_features or (weight.shape[-1] if weight is not None else 0)
        # Of the norms only torch's own takes a shift that it was made without.
        folds = site.kind != "norm" or (isinstance(module, nn.LayerNorm) and weight is not None)
        return BiasDelta(width, folds)


class BiasDelta(LinearDelta):
    """A bias of zero at a module that has none, or at a part of a fused map."""

    def __init__(self, width: int, folds: bool) -> None:
        super().__init__()
        self.folds = folds
        self.why_not = "" if folds else "its class of norm has no place for a shift"
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))

    def wake(self) -> None:
        """Start a little off zero."""
        nn.init.normal_(self.bias, std=0.02)

    def add(self, x: Tensor) -> Tensor:
        """The bias, in the type of x (float32 for token ids); broadcast over rows and tokens."""
        return self.bias.to(x.dtype) if x.is_floating_point() else self.bias

    def as_shift(self) -> Tensor:
        """The bias."""
        return self.bias

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W, and the bias with this one."""
        return weight, self.bias.detach().clone() if bias is None else bias + self.bias
