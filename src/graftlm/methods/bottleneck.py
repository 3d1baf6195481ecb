r"""What adapters with a bottleneck share: two small maps with a non-linearity between them, and where sublayers are.

    A(x) = W_up act(W_down x + b_1) + b_2,   W_down in R^{m x in},  W_up in R^{out x m}

Parameters: m (in + out) + m + out a site. Not linear in x, so it has no merged form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import BottleneckMaps, Site, Survey, Targets
from graftlm.core.sites import parse_layers, selectors
from graftlm.errors import Finding, MethodError, nearest

__all__ = ["ACTIVATIONS", "STARTS", "Bottleneck", "branch_sites", "width_checks", "width_of"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

#: How the maps start: `identity` has W_up zero and W_down uniform in +-1/sqrt(in), so that the adapter does nothing at
#: first; `near-identity` has both normal with a deviation of 1e-3, cut off at two deviations (Houlsby et al. 2019).
STARTS = ("identity", "near-identity")

_NEAR = 1e-3
_WORDS = ("attention", "cross", "ffn")


def branch_sites(method: str, survey: Survey, kind: str, targets: Targets, layers: str | int | Sequence[int] | None,
                 ) -> list[Site]:  # fmt: skip
    """The sites of `survey.branches` of that kind which `targets` name, in `layers`.

    A target is `attention` (cross-attention too), `cross` or `ffn`, with a stack before a slash if need be.
    Raises MethodError with every target that names nothing.
    """
    pool = [site for site in survey.branches if site.kind == kind]
    wanted = parse_layers(layers, survey.layer_count)
    words = selectors(targets)
    chosen: set[str] = set()
    faults: list[Finding] = []
    if not pool:
        faults.append(
            Finding(
                "T140",
                f"{method}: it is not known where {survey.model_name} adds its feed-forward part to the stream"
                if kind == "stream"
                else f"{method}: no sublayers are known in {survey.model_name}",
                fix="series" if kind == "stream" else "lora",
            )
        )
    for selector in words if pool else ():
        found = [site for site in pool if _is_meant(selector, site)]
        chosen.update(site.path for site in found)
        if not found:
            close = nearest(selector, _WORDS)
            have = " ".join(sorted({site.role or "" for site in pool}))
            finding = Finding(
                "T141",
                f"{method}: {survey.model_name} has no sublayer {selector!r}; it has {have}",
                fix=f"targets={close[0] if close else 'ffn'}",
            )
            faults.append(finding)
    if faults:
        raise MethodError(faults)
    return [site for site in pool if site.path in chosen and (wanted is None or site.layer in wanted)]


def _is_meant(selector: str, site: Site) -> bool:
    stack, slash, word = selector.rpartition("/")
    if slash and stack != site.stack:
        return False
    return site.role == word or (word == "attention" and site.role == "cross")


def width_of(features: int, width: int, reduction: int | None) -> int:
    """The width m of the bottleneck between maps of `features`: `features / reduction` where that is given."""
    return max(1, features // reduction) if reduction else width


def width_checks(width: int, reduction: int | None) -> tuple[tuple[bool, str, str], ...]:
    """What `Method.require` must check of a bottleneck's width."""
    return (
        (isinstance(width, int) and width >= 1, f"width {width!r} is not a whole number from 1", "width=64"),
        (
            reduction is None or (isinstance(reduction, int) and reduction >= 1),
            f"reduction {reduction!r} is not a whole number from 1",
            "reduction=16",
        ),
    )


class Bottleneck(nn.Module):
    """The two small maps of one site, from `width_in` through `width` to `width_out`."""

    def __init__(
        self, width_in: int, width: int, width_out: int, activation: str, dropout: float = 0.0, start: str = "identity"
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down_weight = nn.Parameter(torch.empty(width, width_in, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.up_weight = nn.Parameter(torch.zeros(width_out, width, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.zeros(width_out, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout) if dropout else None
        if start == "near-identity":
            for weight in (self.down_weight, self.up_weight):
                nn.init.trunc_normal_(weight, std=_NEAR, a=-2 * _NEAR, b=2 * _NEAR)
        else:
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))

    def wake(self) -> None:
        """Draw W_up like W_down, so that the bottleneck does something from the start."""
        nn.init.kaiming_uniform_(self.up_weight, a=math.sqrt(5))

    def maps(self, scale: float = 1.0) -> BottleneckMaps | None:
        """The maps and what is between them; None while entries are dropped."""
        if self.dropout is not None and self.training:
            return None
        activation = ACTIVATIONS[self.activation]
        return BottleneckMaps(self.down_weight, self.down_bias, self.up_weight, self.up_bias, activation, scale)

    def forward(self, x: Tensor) -> Tensor:
        """W_up act(W_down x + b_1) + b_2 for x of shape [..., in]; the small maps take the type of x."""
        narrow = F.linear(x, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype))
        narrow = ACTIVATIONS[self.activation](narrow)
        if self.dropout is not None:
            narrow = self.dropout(narrow)
        return F.linear(narrow, self.up_weight.to(x.dtype), self.up_bias.to(x.dtype))
