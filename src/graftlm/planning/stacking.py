"""Steps of deep models, told from two shallow ones: a stack of equal blocks grows by the same amount with each block.

A step is run with few and with more blocks, and what a block adds is taken for all others. Where the blocks are not
alike, or where the method treats them differently, the whole model is run.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from graftlm.core import Method
from graftlm.planning.step import Shape, Traced, trace

__all__ = ["traced"]

_FEW, _MORE = 3, 5
_BY_LAYER = re.compile(r"layers|\.\d|\d\.|reduce|skip|last")


def traced(config: Any, method: Method | None, task: str, shape: Shape, *, classes: int = 2) -> Traced:
    """What `trace` gives for the whole model, in a time that does not depend on its depth."""
    depth = _depth(config)
    if depth is None or depth <= _MORE or _BY_LAYER.search(str(method)):
        return trace(config, method, task, shape, classes=classes)
    few, more = (trace(_cut(config, count), method, task, shape, classes=classes) for count in (_FEW, _MORE))
    return _extended(few, more, depth)


def _depth(config: Any) -> int | None:
    """How many blocks the model has, where all are alike."""
    depth = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    alike = kinds is None or len(set(kinds)) == 1
    # Models with parts of their own kind: encoder-decoders, images and text, dense blocks among experts.
    plain = not getattr(config, "is_encoder_decoder", False) and not hasattr(config, "text_config")
    plain &= not any(getattr(config, name, None) for name in ("mlp_only_layers", "first_k_dense_replace"))
    plain &= getattr(config, "moe_layer_freq", 1) == 1 and getattr(config, "decoder_sparse_step", 1) == 1
    return depth if isinstance(depth, int) and alike and plain else None


def _cut(config: Any, count: int) -> Any:
    shallow = copy.deepcopy(config)
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:count]
    shallow.num_hidden_layers = count
    return shallow


def _extended(few: Traced, more: Traced, depth: int) -> Traced:
    def line(low: int, high: int) -> int:
        return low + (high - low) * (depth - _FEW) // (_MORE - _FEW)

    def counter(low: Counter[Any], high: Counter[Any]) -> Counter[Any]:
        return Counter({name: line(low[name], high[name]) for name in {**low, **high}})

    roles = {role: line(few.trained_by_role.get(role, 0), count) for role, count in more.trained_by_role.items()}
    return replace(
        more,
        sizes=counter(few.sizes, more.sizes),
        peaks={phase: counter(few.peaks[phase], peak) for phase, peak in more.peaks.items()},
        flops=counter(few.flops, more.flops),
        operations={phase: counter(few.operations[phase], found) for phase, found in more.operations.items()},
        trainable=line(few.trainable, more.trainable),
        trained_tensors=line(few.trained_tensors, more.trained_tensors),
        parameters=line(few.parameters, more.parameters),
        largest_bytes=max(few.largest_bytes, more.largest_bytes),
        adapter_bytes=line(few.adapter_bytes, more.adapter_bytes),
        trained_by_role=roles,
    )
