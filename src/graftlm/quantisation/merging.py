"""Merging over packed weights: into a plain copy, and what is lost where that is packed again.

`adapter.merge()` on a packed base puts a weight of numbers in place of the codes and keeps those. Here the result
leaves: a model without adapters whose weights are dequantised W + change, computed in float32 and rounded once to the
type that was asked for. transformers loads it like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core import Adapter, adapters, attach, dense, keep_merged, original_parameters, use
from graftlm.core.storage import is_across, is_offloaded
from graftlm.errors import AdapterError, Finding, ModelError, nearest
from graftlm.quantisation.converting import quantize, quantized
from graftlm.quantisation.linear import QuantizedLinear
from graftlm.quantisation.storage import Format, as_format

__all__ = ["Repacked", "merged_copy", "repacked_copy"]


def merged_copy(model: nn.Module, names: Sequence[str] | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A plain copy of `model` with the adapters `names` merged into it (by itself all that are attached).

    No weight of it is packed, no adapter is attached. `dtype` is the type of all its weights; without one, each map
    has the type that it had before it was packed. `model` stays as it is.

    Raises NotMergeable for adapters without a folded form, AdapterError for unknown names, ModelError for a model
    that is partly on disk.

    Example:
        >>> merged_copy(model, dtype=torch.bfloat16).save_pretrained("merged")           # doctest: +SKIP
    """
    attached = adapters(model)
    chosen = list(attached) if names is None else list(names)
    if unknown := [name for name in chosen if name not in attached]:
        close = nearest(unknown[0], attached)
        raise AdapterError(
            Finding(
                "Q108",
                f"no adapter {unknown[0]!r} is attached; there are {', '.join(attached) or 'none'}",
                fix=close[0] if close else "",
            )
        )
    if away := next((path for path, module in model.named_modules() if is_offloaded(module)), None):
        raise ModelError(
            Finding("Q107", f"{away} lies on disk: a copy needs it in memory", fix="load it without device_map")
        )
    twin = copy.deepcopy(model)
    kept: dict[str, Adapter] = adapters(twin)
    for adapter in kept.values():
        adapter.detach()
    touched = {part.site.path for name in chosen for part in kept[name].parts}
    types = unpack(twin, dtype, whole=touched)
    # What was detached is attached to the plain maps, from its own values.
    for name in chosen:
        attach(twin, kept[name].method, name=name, state=kept[name].state(), trainable=False)
    if chosen:
        use(twin, tuple(chosen))
        for name in chosen:
            adapters(twin)[name].merge()
        keep_merged(twin)
    for path, kind in types.items():
        twin.get_submodule(path).to(kind)
    if dtype is not None:
        twin.to(dtype)
        if hasattr(twin, "config"):
            twin.config.dtype = dtype
    return twin


def unpack(model: nn.Module, dtype: torch.dtype | None, whole: Collection[str]) -> dict[str, torch.dtype]:
    """Put maps of numbers in place of the packed ones of `model`; gives the type that each is to have in the end.

    Those at the paths `whole` are in float32 until then, so that a merge rounds once.
    """
    types = {}
    for path, module in list(quantized(model)):
        own = getattr(module, "dtype", None) or getattr(module, "compute_dtype", None)
        types[path] = dtype or (own if isinstance(own, torch.dtype) else None) or torch.float32
        model.set_submodule(path, _plain(module, torch.float32 if path in whole else types[path]))
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # type: ignore[union-attr]
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    return types


def _plain(module: nn.Module, kind: torch.dtype) -> nn.Module:
    weight = dense(module).detach()
    bias: Any = module.bias
    made: Any
    if is_across(module):
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            made = Conv1D(weight.shape[0], weight.shape[1])  # type: ignore[no-untyped-call]
        weight = weight.T
    else:
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.to(kind).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(kind), requires_grad=False)
    return made.train(module.training)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Repacked:
    """A merged model that was packed again, and what that lost.

    `lost` is, by path of each map that changed, the size of what is missing or wrong in the change after packing, as a
    share of the change itself: 0 is all kept, 1 as wrong as if nothing had been merged.
    """

    model: nn.Module
    format: Format
    lost: Mapping[str, float]

    def __str__(self) -> str:
        if not self.lost:
            return f"{self.format}: no packed map changed"
        worst = max(self.lost, key=lambda path: self.lost[path])
        mean = sum(self.lost.values()) / len(self.lost)
        return (
            f"{self.format}: of the change of {len(self.lost)} maps {100 * mean:.0f} % is lost on average, "
            f"{100 * self.lost[worst]:.0f} % at {worst}"
        )


def repacked_copy(
    model: nn.Module, names: Sequence[str] | None = None, *, format: str | Format | None = None
) -> Repacked:
    """As `merged_copy`, and packed again in `format` (by itself that of the base): small, and it loses.

    Raises ModelError where there is no format to pack in; else as `merged_copy` and `quantize`.

    Example:
        >>> print(repacked_copy(model))  # bundled in nf4, a LoRA of rank 8 with B about 0.01     # doctest: +SKIP
        nf4: of the change of 35 maps 108 % is lost on average, 109 % at model.layers.1.mlp.up_proj

    More than 100 % says that packing again moved the weights further than the change had.
    """
    before = dict(quantized(model))
    own = next((module.format for module in before.values() if isinstance(module, QuantizedLinear)), None)
    wanted = as_format(format) if format is not None else own
    if wanted is None:
        raise ModelError(Finding("Q109", "the base is not packed by graftlm, so it has no format", fix='format="nf4"'))
    twin = merged_copy(model, names)
    merged: dict[str, Tensor] = {}
    for path in before:
        plain = twin.get_submodule(path)
        weight = dense(plain).detach().float()
        merged[path] = weight.T if type(plain).__name__ == "Conv1D" else weight
    quantize(twin, wanted)
    originals = original_parameters(model)
    lost = {}
    for path, module in before.items():
        stored = originals.get((path, "weight"))
        base = dense(module, stored).detach().float()
        change = merged[path] - base
        if (size := change.norm()) > 0:
            lost[path] = float((dense(twin.get_submodule(path)).float() - base - change).norm() / size)
    return Repacked(twin, wanted, lost)
