"""What methods at existing parameters have in common (the `param` port): trained copies of them, and whole weights.

The base's own tensors stay as they are, so the adapter can be routed, saved and taken off like any other.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from graftlm.core import Method, Site, Survey, WholeParameterDelta
from graftlm.core.storage import is_across, is_packed
from graftlm.errors import Finding, MethodError

__all__ = [
    "Parameters",
    "in_layers",
    "need_values",
    "output_scale",
    "shape_of",
    "trained_copy",
    "weights_at",
]


def trained_copy(method: Method, site: Site, module: nn.Module) -> WholeParameterDelta:
    """A trained copy of the parameter at `site`. Raises MethodError where it is stored as whole numbers."""
    base = module._parameters[site.parameter or ""]
    assert base is not None
    if not base.dtype.is_floating_point:
        raise MethodError(
            Finding(
                "T108",
                f"{method.name} cannot train {site.key}: its values are stored as {base.dtype}",
                fix="use method lora, or load the base without quantize",
            )
        )
    return WholeParameterDelta(base)


@dataclass(frozen=True)
class Parameters(Method):
    """A method whose deltas hold whole parameters; subclasses choose the sites."""

    def build(self, site: Site, module: nn.Module) -> WholeParameterDelta:
        """A trained copy of the parameter at `site`."""
        return trained_copy(self, site, module)


def output_scale(module: nn.Module) -> float:
    """What the embedding multiplies its rows by (Gemma, BART), 1 elsewhere."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale)


def in_layers(survey: Survey, wanted: Container[int]) -> list[Site]:
    """The parameters of the `wanted` layers, without the head's."""
    heads = {site.path for site in survey.with_role("head")}
    return [site for site in survey.parameters if site.layer in wanted and site.path not in heads]


def weights_at(method: Method, sites: Sequence[Site]) -> list[Site]:
    """The weights of the maps at `sites`, as sites. Raises MethodError for a part of a fused map: its weight is one."""
    parts = sorted({site.part for site in sites if site.part})
    if parts:
        whole = next(site.path.rpartition(".")[2] for site in sites if site.part)
        raise MethodError(
            Finding(
                "T161",
                f"{method.name} changes whole weights, and {', '.join(parts)} are parts of {whole}",
                fix=f"targets={whole}",
            )
        )
    return [replace(site, parameter="weight") for site in sites]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """The shape of `core.storage.plain_weight`, without unpacking anything."""
    across = is_across(module)
    if is_packed(module):
        size = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        return size[::-1] if across else size
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return int(rows), int(columns)


def need_values(name: str, place: str, tensor: Tensor) -> None:
    """Raise MethodError in the name of a method where the numbers at `place` are stored as whole numbers."""
    if not tensor.dtype.is_floating_point:
        raise MethodError(
            Finding(
                "T133",
                f"{name} needs the values of {place}, which are stored as {tensor.dtype}",
                fix="use method lora, or load the base without quantize",
            )
        )
