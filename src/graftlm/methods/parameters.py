"""Methods that train existing parameters: BitFit, heads, named modules, layer freezing, full fine-tuning.

Each stands for parameters of the base by trained copies of them (the `param` port): the base's own tensors stay as they
are, so the adapter can be routed, saved and taken off like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graftlm.core import Method, Site, Survey, Targets, WholeParameterDelta
from graftlm.core.sites import parse_layers
from graftlm.errors import Finding, MethodError

__all__ = ["BitFit", "Full", "Head", "Layers", "Modules"]


@dataclass(frozen=True)
class _Parameters(Method):
    def build(self, site: Site, module: nn.Module) -> WholeParameterDelta:
        """A trained copy of the parameter at `site`."""
        base = module._parameters[site.parameter or ""]
        assert base is not None
        if not base.dtype.is_floating_point:
            raise MethodError(
                Finding(
                    "T108",
                    f"{self.name} cannot train {site.key}: its values are stored as {base.dtype}",
                    fix="use method lora, or load the base without quantize",
                )
            )
        return WholeParameterDelta(base)


@dataclass(frozen=True)
class BitFit(_Parameters):
    """Train every bias, and nothing else (Ben Zaken et al. 2021, "BitFit").

    A model without biases (Llama, Mistral, T5) is refused: there is nothing to train. Normalisation shifts count as
    biases, as in the authors' code; a classification head does not (`bitfit+head` is what the paper trains).
    `targets` restricts it to the biases of the named modules, such as the paper's `targets=[query,up]`.

    Example:
        >>> print(BitFit())
        bitfit
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    learning_rate: ClassVar[float] = 1e-3

    targets: Targets = ()

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter that is a bias: those of `targets`, or all outside the head."""
        heads = {site.path for site in survey.with_role("head")}
        pool = (
            survey.select_parameters(self.targets)
            if self.targets
            else [site for site in survey.parameters if site.path not in heads]
        )
        found = [site for site in pool if (site.parameter or "").endswith("bias")]
        if not found:
            raise MethodError(
                Finding("T109", f"bitfit: {survey.model_name} has no biases to train there", fix="--method lora")
            )
        return found


@dataclass(frozen=True)
class Head(_Parameters):
    """Train the head: the modules outside the backbone (classifier, score), or the output embedding.

    With an untrained head this is the frozen-base yardstick ("linear probe").

    Example:
        >>> print(Head())
        head
    """

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "head only"
    learning_rate: ClassVar[float] = 2e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-1)

    def sites(self, survey: Survey) -> list[Site]:
        """Every parameter of the head."""
        if not survey.with_role("head"):
            raise MethodError(Finding("T110", f"head: {survey.model_name} has no head beside its backbone"))
        return survey.select_parameters("head")


@dataclass(frozen=True)
class Modules(_Parameters):
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


@dataclass(frozen=True)
class Layers(_Parameters):
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
        heads = {site.path for site in survey.with_role("head")}
        found = [s for s in survey.parameters if s.layer is not None and s.path not in heads]
        chosen = [site for site in found if wanted is None or site.layer in wanted]
        if not chosen:
            raise MethodError(Finding("T111", f"layers: {self.layers!r} names no layer of {survey.model_name}"))
        return chosen


@dataclass(frozen=True)
class Full(_Parameters):
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
