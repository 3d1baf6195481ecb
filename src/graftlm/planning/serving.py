"""What serving takes: keys and values a token, bytes an adapter, memory for rows of a length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftlm.models.loading import generates
from graftlm.planning.memory import RUNTIME_BYTES, said
from graftlm.planning.plan import Asked, Plan
from graftlm.planning.step import Shape, meta_model
from graftlm.planning.tracing import Trace

__all__ = ["Serving", "cache_bytes", "serving"]


@dataclass(frozen=True)
class Serving:
    """What a base with adapters takes while it answers `rows` texts of `length` tokens at once.

    `adapter_bytes` is what one adapter holds in memory, `cache_bytes_per_token` the keys and values of one token of one
    text. `terms` are bytes by name: weights, quantisation, adapters, cache, activations (of reading one text of the
    length, the highest moment besides) and runtime.
    """

    rows: int
    length: int
    adapters: int
    adapter_bytes: int
    cache_bytes_per_token: float
    terms: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """The most memory that the process holds."""
        return sum(self.terms.values())

    @property
    def adapters_per_gb(self) -> float:
        """How many adapters a gigabyte holds."""
        return 10**9 / max(self.adapter_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "rows": self.rows,
            "length": self.length,
            "adapters": self.adapters,
            "adapter_bytes": self.adapter_bytes,
            "adapters_per_gb": round(self.adapters_per_gb, 1),
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "total_bytes": self.total_bytes,
            "terms": dict(self.terms),
        }

    def __str__(self) -> str:
        cache = f"{said(self.cache_bytes_per_token)} of keys and values a token" if self.terms["cache"] else "no cache"
        return (
            f"serving  {self.rows} rows x {self.length:,} tokens, {self.adapters} adapters: {said(self.total_bytes)}  "
            f"{cache}, {said(self.adapter_bytes)} an adapter, {self.adapters_per_gb:,.0f} adapters a GB"
        )


def serving(step: Asked, plan: Plan | None = None, *, adapters: int = 1) -> Serving:
    """What it takes to answer `step.shape.rows` texts of its length at once with `adapters` adapters of its method.

    `plan` is that of the step where it is known. Raises as `graftlm.plan`.

    Example:
        >>> from graftlm.planning.plan import asked
        >>> found = serving(asked("bundled", "lora(rank=8)", batch=4, length=128), adapters=100)
        >>> found.cache_bytes_per_token, found.adapter_bytes
        (5120.0, 286720)
    """
    plan = plan or step.plan()
    shape = replace(step.shape, recompute="none", evaluation_rows=0)
    reading = replace(step, method=None, accumulate=1, shape=replace(shape, rows=1, labelled=1 / shape.length)).plan()
    cache = cache_bytes(step.config, shape) if generates(step.config) else 0
    rows = step.shape.rows * step.accumulate
    return Serving(
        rows=rows,
        length=shape.length,
        adapters=adapters,
        adapter_bytes=plan.terms["deltas"],
        cache_bytes_per_token=cache / shape.length,
        terms={
            "weights": plan.terms["weights"],
            "quantisation": plan.terms["quantisation"],
            "adapters": adapters * plan.terms["deltas"],
            "cache": rows * cache,
            "activations": reading.terms["activations"] + reading.terms["logits"],
            "runtime": RUNTIME_BYTES[step.device],
        },
    )


def cache_bytes(config: Any, shape: Shape) -> int:
    """The bytes of what the model of `config` keeps of one text of `shape.length` tokens while it writes on."""
    model = meta_model(config, "lm", shape.dtype).eval()
    ids = torch.ones(1, shape.length, dtype=torch.long)
    with Trace(), torch.no_grad():
        kept = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    layers = getattr(kept.past_key_values, "layers", None) or [kept.past_key_values]
    found = {id(each): each for layer in layers for each in vars(layer).values() if isinstance(each, Tensor)}
    return sum(each.numel() * each.element_size() for each in found.values())
