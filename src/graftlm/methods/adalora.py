"""AdaLoRA: low-rank changes whose ranks are handed out by importance while training (Zhang et al. 2023, "AdaLoRA...").

    y = W x + b + s B diag(E) A x,   A in R^{r x in},  B in R^{out x r},  E in R^r,  s = alpha / r      (equation 3)

A, E and B stand for the paper's Q, Lambda and P. Start: E zero, A and B normal with deviation 0.02, so the change is
zero. Training adds R = mean over sites of |A A^T - I| + |B^T B - I| (Frobenius norms, times `orthogonality`; the
paper sums their squares, PEFT takes the norms' mean as here). After every `every` steps the budget b(t) falls from
`rank` to `target_rank` times the number of sites along a cubic between the shares `begin` and `end` of the run
(equation 12 and appendix A), and the triplets of least importance lose their E (equation 8). The importance of a
number w with gradient g is the product of the smoothed |w g| and the smoothed spread around it (equations 9 to 11),
of a triplet E's own plus the means over its row of A and its column of B. A triplet that lost its E can come back
before `end`. Parameters: r (in + out + 1) a site.

Stored as the plain LoRA that it is after training: rows of A multiplied by E. Departure: s divides by the starting
rank, as PEFT does; the paper has no s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import LinearDelta, Method, Part, Site, Survey, Targets
from graftlm.methods.lora import LoRA, LoRADelta

__all__ = ["AdaLoRA", "AdaLoRADelta"]


@dataclass(frozen=True)
class AdaLoRA(Method):
    """LoRA that starts with `rank` everywhere and ends with `target_rank` on average, more where it matters.

    Example:
        >>> print(AdaLoRA(rank=12, target_rank=4))
        adalora(target_rank=4)
    """

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    learning_rate: ClassVar[float] = 2e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 2e-2)

    rank: int = 12
    target_rank: int = 8
    alpha: float = 24.0
    dropout: float = 0.0
    targets: Targets = "attention"
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()
    begin: float = 0.1
    end: float = 0.7
    every: int = 10
    smoothing: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        self.require(
            (self.rank >= 1, f"rank {self.rank} is not a whole number from 1", "rank=12"),
            (
                1 <= self.target_rank <= self.rank,
                f"target_rank {self.target_rank} is not between 1 and rank {self.rank}",
                f"target_rank={max(1, 2 * self.rank // 3)}",
            ),
            (self.alpha > 0, f"alpha {self.alpha} is not above 0", "alpha=24"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.05"),
            (0 <= self.begin <= self.end <= 1, f"begin {self.begin} and end {self.end} are no shares", "begin=0.1"),
            (self.every >= 1, f"every {self.every} is not a whole number from 1", "every=10"),
            (0 <= self.smoothing < 1, f"smoothing {self.smoothing} is not in [0, 1)", "smoothing=0.85"),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The linear maps that `targets` name in `layers`."""
        return survey.select(self.targets, layers=self.layers, exclude=self.exclude, kinds=("linear", "conv1d"))

    def build(self, site: Site, module: nn.Module) -> AdaLoRADelta:
        """A fresh change of the starting rank for `site`."""
        del module
        return AdaLoRADelta(site.in_features, site.out_features, self.rank, self.alpha / self.rank, self.dropout)

    def budget(self, step: int, total: int, sites: int) -> int:
        """How many triplets may act after optimizer step `step` of `total`, over all `sites`."""
        start, goal = self.rank * sites, self.target_rank * sites
        first, last = self._span(total)
        if step < first:
            return start
        if step >= last:
            return goal
        left = 1 - (step - first) / (last - first)
        return goal + math.ceil((start - goal) * left**3)

    def _span(self, total: int) -> tuple[int, int]:
        """The steps between which the budget falls."""
        first = int(self.begin * total)
        return first, max(int(self.end * total), first + 1)

    def penalty(self, parts: Sequence[Part]) -> Tensor | None:
        """How far A's rows and B's columns are from orthonormal, times `orthogonality`."""
        if not self.orthogonality:
            return None
        terms = []
        for part in parts:
            delta = cast(AdaLoRADelta, part.delta)
            one = torch.eye(delta.lora_A.shape[0], device=delta.lora_A.device)
            terms.append(torch.linalg.matrix_norm(delta.lora_A @ delta.lora_A.T - one))
            terms.append(torch.linalg.matrix_norm(delta.lora_B.T @ delta.lora_B - one))
        return self.orthogonality * torch.stack(terms).mean()

    def after_step(self, parts: Sequence[Part], step: int, total: int) -> None:
        """Smooth the importances; hand the budget out where its turn is, and after the end keep what was chosen."""
        deltas = [cast(AdaLoRADelta, part.delta) for part in parts]
        first, last = self._span(total)
        with torch.no_grad():
            if step <= last:
                for delta in deltas:
                    delta.smooth(self.smoothing)
            if first <= step <= last and (step % self.every == 0 or step == last):
                scores = torch.cat([delta.importance().cpu() for delta in deltas])
                kept = torch.zeros_like(scores, dtype=torch.bool)
                kept[scores.topk(self.budget(step, total, len(deltas))).indices] = True
                for delta, mask in zip(deltas, torch.split(kept, [self.rank] * len(deltas)), strict=True):
                    delta.kept.copy_(mask)
                    delta.lora_E.mul_(delta.kept)
            elif step > last:
                for delta in deltas:
                    delta.lora_E.mul_(delta.kept)

    @cached_property
    def plain(self) -> LoRA:
        """The plain LoRA that this is stored as."""
        return LoRA(
            rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets, layers=self.layers,
            exclude=self.exclude,
        )  # fmt: skip

    def bake(self, part: Part) -> Part:
        """The change as a plain LoRA: E goes into the rows of A."""
        delta = cast(AdaLoRADelta, part.delta)
        with torch.device("meta"):
            found = LoRADelta(
                part.site.in_features, part.site.out_features, self.rank, delta.scale, self.dropout, False
            )
        found.lora_A = nn.Parameter((delta.lora_E[:, None] * delta.lora_A).detach().clone(), requires_grad=False)
        found.lora_B = nn.Parameter(delta.lora_B.detach().clone(), requires_grad=False)
        return Part(self.plain, part.site, found)


class AdaLoRADelta(LinearDelta):
    """The change s B diag(E) A x at one linear map, with the smoothed importance of its numbers."""

    kept: Tensor

    def __init__(self, width_in: int, width_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, width_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(width_out, rank, dtype=torch.float32))
        self.lora_E = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout) if dropout else None
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.register_buffer("kept", torch.ones(rank, dtype=torch.float32))
        for name in ("lora_A", "lora_B", "lora_E"):
            shape = getattr(self, name).shape
            self.register_buffer(f"{name}_sensitivity", torch.zeros(shape, dtype=torch.float32))
            self.register_buffer(f"{name}_spread", torch.zeros(shape, dtype=torch.float32))

    def add(self, x: Tensor) -> Tensor:
        """s B diag(E) A drop(x), for x of shape [..., in]; the small matrices take the type of x."""
        if self.dropout is not None:
            x = self.dropout(x)
        narrow = F.linear(x, self.lora_A.to(x.dtype)) * self.lora_E.to(x.dtype)
        return F.linear(narrow, self.lora_B.to(x.dtype)) * self.scale

    def wake(self) -> None:
        """Draw E at random, so that the change is not zero."""
        nn.init.normal_(self.lora_E)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B diag(E) A."""
        return weight + self.scale * (self.lora_B * self.lora_E) @ self.lora_A, bias

    def smooth(self, beta: float) -> None:
        """Take this step's gradients into the running sensitivity and its running spread (equations 9 and 10)."""
        for name in ("lora_A", "lora_B", "lora_E"):
            parameter = getattr(self, name)
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            mean, spread = getattr(self, f"{name}_sensitivity"), getattr(self, f"{name}_spread")
            mean.mul_(beta).add_(now, alpha=1 - beta)
            spread.mul_(beta).add_((now - mean).abs(), alpha=1 - beta)

    def importance(self) -> Tensor:
        """The importance of each triplet, [rank] (equations 8 and 11)."""
        of: dict[str, Tensor] = {
            name: getattr(self, f"{name}_sensitivity") * getattr(self, f"{name}_spread")
            for name in ("lora_A", "lora_B", "lora_E")
        }
        return of["lora_E"] + of["lora_A"].mean(dim=1) + of["lora_B"].mean(dim=0)
