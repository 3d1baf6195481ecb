r"""Hybrids: several methods of one paper at once, as sums of methods of this catalogue.

- MAM (He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", section 4.6): a prefix at
  every attention call and a scaled parallel adapter beside every feed-forward part.
- UniPELT (Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning"): a prefix, a
  Pfeiffer adapter and LoRA on query and value, each behind a gate that reads the input. LoRA's gate stands in place of
  alpha / rank, so alpha is the rank here. With biases trained too: `unipelt+bitfit`.

The name stands for the sum: an adapter holds the parts, and is stored as their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from graftlm.core import Method
from graftlm.methods.gated import Gated
from graftlm.methods.lora import LoRA
from graftlm.methods.parallel import ParallelAdapter
from graftlm.methods.prefix import PrefixTuning
from graftlm.methods.series import SeriesAdapter

__all__ = ["MAM", "UniPELT"]


@dataclass(frozen=True)
class Recipe(Method):
    """A method that stands for a sum of others."""

    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.parts  # says what is wrong with the settings

    @cached_property
    def parts(self) -> tuple[Method, ...]:  # made once: adapters tell them by identity
        """The methods that it is the sum of."""
        return self.summands()

    def summands(self) -> tuple[Method, ...]:
        """Those methods, with this one's settings."""
        raise NotImplementedError


@dataclass(frozen=True)
class MAM(Recipe):
    """Mix-and-match adapters: a prefix and scaled parallel adapters (He et al. 2021).

    `length` and `mlp` are those of the prefix, `width` and `scale` those of the adapters beside the feed-forward parts.

    Example:
        >>> print(*MAM(length=10).parts, sep="\\n")
        prefix(length=10,mlp=800)
        parallel(width=512)
    """

    name: ClassVar[str] = "mam"
    title: ClassVar[str] = "MAM adapter"
    learning_rate: ClassVar[float] = 1e-4
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 3e-3)

    length: int = 30
    mlp: int = 800
    width: int = 512
    scale: float = 4.0

    def summands(self) -> tuple[Method, ...]:
        """The prefix and the adapters."""
        return (PrefixTuning(length=self.length, mlp=self.mlp), ParallelAdapter(width=self.width, scale=self.scale))


@dataclass(frozen=True)
class UniPELT(Recipe):
    """A prefix, Pfeiffer adapters and LoRA, each behind a gate that reads the input (Mao et al. 2022).

    `length` and `mlp` are those of the prefix, `reduction` that of the adapters, `rank` that of LoRA.

    Example:
        >>> print(*UniPELT().parts, sep="\\n")
        gated(method=prefix(length=10,mlp=512))
        gated(method=series(reduction=16,variant=pfeiffer))
        gated(method=lora(alpha=8,targets='query,value'))
    """

    name: ClassVar[str] = "unipelt"
    title: ClassVar[str] = "UniPELT"
    learning_rate: ClassVar[float] = 5e-4
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 3e-3)

    length: int = 10
    mlp: int = 512
    reduction: int = 16
    rank: int = 8

    def summands(self) -> tuple[Method, ...]:
        """The prefix, the adapters and LoRA, each behind its gates."""
        return (
            Gated(PrefixTuning(length=self.length, mlp=self.mlp)),
            Gated(SeriesAdapter(reduction=self.reduction, variant="pfeiffer")),
            Gated(LoRA(rank=self.rank, alpha=self.rank, targets="query,value")),
        )
