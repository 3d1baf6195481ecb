"""What the methods have in common that train whole parameters: a trained copy stands for each (the `param` port).

The base's own tensors stay as they are, so the adapter can be routed, saved and taken off like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graftlm.core import Method, Site, WholeParameterDelta
from graftlm.errors import Finding, MethodError

__all__ = ["Parameters", "trained_copy"]


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
