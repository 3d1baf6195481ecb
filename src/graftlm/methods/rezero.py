"""ReZero: a learned factor around every change, zero at the start (Bachlechner et al. 2020, "ReZero is All You Need").

    y + g (delta's change),   g a number, zero at the start

The paper puts g before the sublayers of a network that is trained from scratch; here it is put before the changes that
a method makes. What starts at zero behind a gate of zero would never get a gradient, and nor would the gate: the delta
inside starts away from zero instead (`Delta.wake`; LoRA draws B as A). With `shared` there is one gate a layer, as in
the authors' code. Merged where the method inside merges: W + g (fold(W) - W). A site has one number beside the
method's own.

A prefix or a prompt has no gate that is the identity at zero: attention still looks at keys of zero. They are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import Delta, EmbedDelta, KeyValueDelta, Method, Site
from graftlm.errors import Finding, MethodError
from graftlm.methods.gates import Gate, GatedMethod
from graftlm.methods.lora import LoRA

__all__ = ["ReZero", "ScalarGate"]


@dataclass(frozen=True)
class ReZero(GatedMethod):
    """A learned factor around every change of a method, zero at the start (Bachlechner et al. 2020).

    `method` is what is gated, a sum of several too. `start` is where the factor begins; `shared` has one a layer.

    Example:
        >>> print(ReZero(LoRA(rank=4), shared=True))
        rezero(method=lora(rank=4),shared=True)
    """

    name: ClassVar[str] = "rezero"
    title: ClassVar[str] = "ReZero gates"
    learning_rate: ClassVar[float] = LoRA.learning_rate

    method: Method = field(default_factory=LoRA)
    start: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == 0:  # both factors of the product start small, and at the rate of one it hardly moves
            low, high = self.learning_rate_range
            self.__dict__["learning_rate"] = 5 * self.learning_rate
            self.__dict__["learning_rate_range"] = (low, 10 * high)

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]  # it depends on a setting
        """Whether nothing is changed at the start."""
        return self.start == 0 or self.method.starts_as_identity

    def owner_of(self, number: int, sites: Sequence[Site]) -> int:
        """The first site of the layer where gates are shared."""
        if not self.shared or sites[number].layer is None:
            return number
        return [_layer_of(site) for site in sites].index(_layer_of(sites[number]))

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """The deltas of the method inside, away from zero, each with a gate around it. Raises MethodError."""
        made = super().build_all(sites, modules, values=values)
        if self.start == 0 and self.method.starts_as_identity:
            for delta in made:
                try:
                    delta.inner.wake()  # type: ignore[operator, union-attr]  # every gated delta has one inside
                except NotImplementedError:
                    raise MethodError(
                        Finding(
                            "T142",
                            f"rezero: {self.method.name} starts as the base and knows no other start, and behind a "
                            "gate of zero neither would ever get a gradient",
                            fix=f"rezero({self.method}, start=1)",
                        )
                    ) from None
        return made

    def gate_of(self, site: Site, module: nn.Module, delta: Delta) -> ScalarGate:  # noqa: ARG002
        """A fresh gate at `start`."""
        if isinstance(delta, (KeyValueDelta, EmbedDelta)):
            raise MethodError(
                Finding(
                    "T143",
                    f"rezero: {self.method.name} has no gate that changes nothing at zero, since attention looks at "
                    "keys of zero too",
                    fix=str(self.method),
                )
            )
        return ScalarGate(self.start)


def _layer_of(site: Site) -> tuple[str, int | None]:
    # Cross attention is a part of the decoder's layer.
    return ("decoder" if site.stack == "cross" else site.stack, site.layer)


class ScalarGate(Gate):
    """One learned number."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((), start, dtype=torch.float32))

    def wake(self) -> None:
        """Start at one."""
        nn.init.ones_(self.value)

    def factor(self, x: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """The number, in the type of x."""
        return self.value.to(x.dtype)
