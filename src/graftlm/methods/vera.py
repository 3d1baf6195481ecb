"""VeRA: two trained vectors around random maps that all sites share (Kopiczko et al. 2024, "VeRA: Vector-based...").

    y = W x + b + l_b * (B (l_d * (A x)))          (equation 2; * is by entry)

A in R^{r x in} and B in R^{out x r} are random, frozen and the same for every site: each takes the first columns of A
and the first rows of B that its widths need. Start: l_d is `start`, l_b zero, so the change is zero; A and B are
uniform as kaiming_uniform makes them, drawn from `seed` in the order and the way of PEFT, so that both draw the same
numbers. Parameters: out + r a site; A and B are stored once an adapter, with its first site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Delta, LinearDelta, Method, Site, Survey, Targets, device_at

__all__ = ["VeRA", "VeRADelta"]


@dataclass(frozen=True)
class VeRA(Method):
    """Vectors around shared random maps; `rank` is wider than LoRA's since only its diagonal is trained.

    Example:
        >>> print(VeRA(rank=64, targets="query,value"))
        vera(rank=64,targets='query,value')
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    learning_rate: ClassVar[float] = 1e-2
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-4, 1e-1)

    rank: int = 256
    targets: Targets = "attention"
    start: float = 0.1
    dropout: float = 0.0
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(
            (self.rank >= 1, f"rank {self.rank} is not a whole number from 1", "rank=256"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.05"),
            (self.start != 0, "start 0 leaves both vectors without a gradient", "start=0.1"),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The linear maps that `targets` name in `layers`."""
        return survey.select(self.targets, layers=self.layers, exclude=self.exclude, kinds=("linear", "conv1d"))

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[Delta]:
        """A fresh pair of vectors for each site; the first site's delta owns the shared maps."""
        width_in = max(site.in_features for site in sites)
        width_out = max(site.out_features for site in sites)
        deltas: list[VeRADelta] = []
        for site in sites:
            with torch.device(device_at(modules, site.path) if values else torch.device("meta")):
                owner = deltas[0].shared if deltas else Projection(self.rank, width_in, width_out, self.seed)
                delta = VeRADelta(site, self.rank, self.start, self.dropout, owner)
                if not deltas:
                    delta.projection = owner  # registered here, and nowhere else
                deltas.append(delta)
        return list(deltas)


class Projection(nn.Module):
    """The shared random maps A [rank, widest input] and B [widest output, rank]."""

    vera_A: Tensor  # noqa: N815  # PEFT's names
    vera_B: Tensor  # noqa: N815

    def __init__(self, rank: int, width_in: int, width_out: int, seed: int) -> None:
        super().__init__()
        device = torch.empty(0).device  # the current default: that of the module, or meta
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, shape in (("vera_A", (rank, width_in)), ("vera_B", (width_out, rank))):
            bound = math.sqrt(6 / shape[1])
            if device.type == "meta":
                value = torch.empty(shape)
            else:
                value = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator).to(device)
            self.register_buffer(name, value)


class VeRADelta(LinearDelta):
    """The change l_b * (B (l_d * (A x))) at one linear map."""

    def __init__(self, site: Site, rank: int, start: float, dropout: float, shared: Projection) -> None:
        super().__init__()
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), start, dtype=torch.float32))
        self.vera_lambda_b = nn.Parameter(torch.zeros(site.out_features, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.width_in, self.width_out = site.in_features, site.out_features
        self._shared = (shared,)  # in a tuple, so that only the owner registers it

    @property
    def shared(self) -> Projection:
        """The maps that all sites of the adapter share."""
        return self._shared[0]

    def _maps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self.shared.vera_A[:, : self.width_in], self.shared.vera_B[: self.width_out]
        return down.to(like.device, like.dtype), up.to(like.device, like.dtype)

    def add(self, x: Tensor) -> Tensor:
        """The change for x of shape [..., in]; the vectors take the type of x."""
        if self.dropout is not None:
            x = self.dropout(x)
        down, up = self._maps(x)
        narrow = F.linear(x, down) * self.vera_lambda_d.to(x.dtype)
        return F.linear(narrow, up) * self.vera_lambda_b.to(x.dtype)

    def wake(self) -> None:
        """Draw l_b at random, so that the change is not zero."""
        nn.init.normal_(self.vera_lambda_b, std=0.02)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + diag(l_b) B diag(l_d) A."""
        down, up = self._maps(weight)
        return weight + (self.vera_lambda_b[:, None] * up) @ (self.vera_lambda_d[:, None] * down), bias
