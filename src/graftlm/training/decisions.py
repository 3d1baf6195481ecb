"""What a run decides where the settings leave it open: learning rate, epochs, length, heads."""

from __future__ import annotations

import math
from typing import Any

from graftlm.core import Method, Sum
from graftlm.methods import Full, Head, Modules, Value
from graftlm.training.early import context_of

__all__ = [
    "decide_epochs", "decide_learning_rate", "decide_learning_rates", "decide_length",
    "decide_updates", "learning_rate_range_of", "positions_taken", "title_of", "with_head", "with_value",
]  # fmt: skip

_LONGEST_TOKENS = 1024


def decide_learning_rate(method: Method, width: int) -> float:
    """The method's own rate for a model of hidden size `width`: the narrower, the larger.

    The rates of the methods hold at width 2000; they scale with (2000 / width) ** 0.78, the exponent measured for
    Llama models in "LoRA Without Regret" (Schulman et al. 2025), between a half and five times. The rate of
    a sum is that of its first part, heads aside; `decide_learning_rates` tells those of all.

    Example:
        >>> from graftlm.methods import LoRA
        >>> decide_learning_rate(LoRA(), 256), decide_learning_rate(LoRA(), 4096)
        (0.0025, 0.00029)
    """
    rate: float = _leading(method).learning_rate * min(max((2000 / width) ** 0.78, 0.5), 5.0)
    return round(rate, 1 - math.floor(math.log10(rate)))  # two digits: a figure that one can say


def decide_learning_rates(method: Method, width: int) -> list[float]:
    """The rate of each of `method.parts`: its own, as prompts need many times that of a LoRA; a head at most the sum's.

    A recipe (MAM) is no sum: its parts have the rate of the recipe.

    Example:
        >>> from graftlm.methods import LoRA, PromptTuning
        >>> decide_learning_rates(LoRA() + PromptTuning() + Head(), 2000)
        [0.0005, 0.03, 0.0005]
    """
    rate = decide_learning_rate(method, width)
    if not isinstance(method, Sum):
        return [rate for _ in method.parts]
    own = [decide_learning_rate(part, width) for part in method.parts]
    return [min(rate, r) if isinstance(part, Head) else r for part, r in zip(method.parts, own, strict=True)]


def learning_rate_range_of(method: Method) -> tuple[float, float]:
    """The usual learning rates of the part that decides the rate."""
    return _leading(method).learning_rate_range


def title_of(method: Method) -> str:
    """How people write the method: "LoRA", "LoRA + prompt tuning"; a head is not told beside others."""
    if not isinstance(method, Sum):
        return method.title
    return " + ".join(dict.fromkeys(part.title for part in _beside_heads(method)))


def _leading(method: Method) -> Method:
    """The part whose learning rate is taken; a recipe with a rate of its own decides for its parts."""
    return _beside_heads(method)[0] if isinstance(method, Sum) else method


def _beside_heads(method: Method) -> list[Method]:
    others = [part for part in method.parts if not isinstance(part, (Head, Value))]
    return others or list(method.parts)


def decide_updates(task: str, asked: int | None) -> int:
    """How many steps learn from the same answers: the clips of PPO are made for several."""
    return asked or (4 if task == "ppo" else 1)


def decide_epochs(rows: int) -> float:
    """More passes over few rows: ten up to 500 rows, one from 5,000."""
    return float(max(1, min(10, round(5000 / max(rows, 1)))))


def positions_taken(method: Method) -> int:
    """How many positions of the base's context the method takes for virtual tokens.

    Example:
        >>> from graftlm.methods import LoRA, PromptTuning
        >>> positions_taken(LoRA() + PromptTuning(length=20))
        20
    """
    return sum(part.context_taken for part in method.parts)


def decide_length(config: Any, method: Method | None = None) -> int:
    """The most tokens a row may have where nothing else is said: what `method` leaves of the context, up to 1,024."""
    return min(context_of(config) - (positions_taken(method) if method else 0), _LONGEST_TOKENS)


def with_head(method: Method, start: str = "base") -> Method:
    """`method` with a trained head, where it has none: a new classifier must be learned, whatever else is."""
    if any(
        isinstance(part, (Head, Full)) or (isinstance(part, Modules) and part.targets == "head")
        for part in method.parts
    ):
        return method
    return method + Head(start=start)


def with_value(method: Method) -> Method:
    """`method` with a value head, where it has none."""
    return method if any(isinstance(part, Value) for part in method.parts) else method + Value()
