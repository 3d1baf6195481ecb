r"""LoRA: a low-rank change beside a frozen linear map (Hu et al. 2021, "LoRA: Low-Rank Adaptation...").

    y = W x + b + s B A drop(x),   A in R^{r x in},  B in R^{out x r},  s = alpha / r   (section 4.1)

`rslora=True` scales with s = alpha / sqrt(r) instead (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor").
Start: A uniform in +-1/sqrt(in) (kaiming_uniform with a = sqrt 5, as in the authors' code; the paper says Gaussian),
B zero, so the change starts at zero. On an embedding A is zero and B normal: y = E[x] + s B A[:, x] (authors' code).
On a fused map (qkv) the change is one rank-r product over the whole map, as in PEFT; the authors' code keeps one for
each part. Parameters: r (in + out) a site.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import LinearDelta, Method, Site, Survey, Targets
from graftlm.errors import Finding, MethodError

__all__ = ["LoRA", "LoRADelta", "LoRAEmbeddingDelta"]


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of linear maps and embeddings.

    `rank_pattern` and `alpha_pattern` give single sites another rank or alpha: the keys are module names, dotted
    suffixes or regular expressions, as in PEFT. `bias=True` adds a trained bias to each change (PEFT's `lora_bias`).

    Example:
        >>> print(LoRA(rank=16, targets="all-linear", rslora=True))
        lora(rank=16,targets=all-linear,rslora=True)
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    learning_rate: ClassVar[float] = 5e-4
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "attention"
    layers: str | int | Sequence[int] | None = None
    exclude: Targets = ()
    rslora: bool = False
    bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = (self.rank, *self.rank_pattern.values())
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        self.require(
            (all(map(_is_regex, patterns)), f"a pattern of {', '.join(patterns)} is not a regular expression", ""),
            (
                all(isinstance(r, int) and r >= 1 for r in ranks),
                f"rank {self.rank!r} is not a whole number from 1",
                "rank=8",
            ),
            (self.alpha > 0, f"alpha {self.alpha} is not above 0", "alpha=16"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.05"),
        )

    def sites(self, survey: Survey) -> list[Site]:
        """The linear maps and embeddings that `targets` name in `layers`."""
        sites = survey.select(self.targets, layers=self.layers, exclude=self.exclude)
        faults = [
            Finding("T106", f"lora: {pattern!r} in {kind} matches none of the {len(sites)} sites")
            for kind, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern in patterns
            if not any(_named(pattern, site.path) for site in sites)
        ]
        faults += [
            Finding("T107", f"lora: bias=True has no meaning on the embedding {site.path}", fix="bias=False")
            for site in sites
            if self.bias and site.kind == "embedding"
        ]
        if faults:
            raise MethodError(faults)
        return sites

    def rank_at(self, path: str) -> int:
        """The rank at the site `path`."""
        return next((rank for pattern, rank in self.rank_pattern.items() if _named(pattern, path)), self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha at the site `path`."""
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if _named(pattern, path)), self.alpha)

    def scale_at(self, path: str) -> float:
        """The factor s of the change at the site `path`."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.rslora else rank)

    def build(self, site: Site, module: nn.Module) -> LoRADelta | LoRAEmbeddingDelta:
        """A fresh low-rank change for `site`."""
        rank, scale = self.rank_at(site.path), self.scale_at(site.path)
        if site.kind == "embedding":
            return LoRAEmbeddingDelta(site.in_features, site.out_features, rank, scale, _output_scale(module))
        return LoRADelta(site.in_features, site.out_features, rank, scale, self.dropout, self.bias)


def _named(pattern: str, path: str) -> bool:
    # PEFT's rule (tuners_utils.get_pattern_key): the pattern ends the path, at a dot or as a whole.
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _output_scale(module: nn.Module) -> float:
    """What the embedding multiplies its rows by (Gemma, BART), 1 elsewhere."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale)


class LoRADelta(LinearDelta):
    """The low-rank change s B A x (+ s c) at one linear map."""

    def __init__(self, width_in: int, width_out: int, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, width_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(width_out, rank, dtype=torch.float32))
        self.lora_bias = nn.Parameter(torch.zeros(width_out, dtype=torch.float32)) if bias else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def add(self, x: Tensor) -> Tensor:
        """s B A drop(x), for x of shape [..., in]; the small matrices take the type of x.

        In PEFT's order of operations, so that both give the same bits.
        """
        if self.dropout is not None:
            x = self.dropout(x)
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale
        if self.lora_bias is not None:
            change = change + (self.scale * self.lora_bias).to(x.dtype)
        return change

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, and the bias with s c."""
        if self.lora_bias is not None:
            change = self.scale * self.lora_bias
            bias = change if bias is None else bias + change
        return weight + self.scale * (self.lora_B @ self.lora_A), bias


class LoRAEmbeddingDelta(LinearDelta):
    """The low-rank change s B A[:, x] at an embedding table of `count` rows of `width`."""

    def __init__(self, count: int, width: int, rank: int, scale: float, output_scale: float) -> None:
        super().__init__()
        self.scale, self.output_scale = scale, output_scale
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, count, dtype=torch.float32))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, rank, dtype=torch.float32))
        nn.init.normal_(self.lora_embedding_B)

    def add(self, x: Tensor) -> Tensor:
        """s B A[:, x] for token ids x of shape [rows, tokens]; gives [rows, tokens, width]."""
        narrow = F.embedding(x, self.lora_embedding_A.T) * (self.scale * self.output_scale)
        return F.linear(narrow, self.lora_embedding_B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """E + s (B A)^T; what the module multiplies its rows by applies to the sum."""
        return weight + self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T, bias
