"""Whole models: the linear maps of the blocks quantised in place, and back into a plain copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from graftlm.core import Survey, Targets, adapters, survey
from graftlm.core.storage import is_packed
from graftlm.errors import Finding, ModelError
from graftlm.quantisation.linear import QuantizedLinear
from graftlm.quantisation.storage import Format, as_format

__all__ = ["quantize", "quantized", "reserve", "sites_to_quantize"]


def sites_to_quantize(found: Survey, model: nn.Module, targets: Targets = "all-linear") -> list[str]:
    """The paths of the modules that are quantised: the linear maps of the blocks that `targets` name.

    Never a head or an embedding, nor a map whose weight is shared with another module.
    """
    shared = {path for site in found.parameters if site.aliases for path, _ in site.places}
    chosen = found.select(targets, kinds=("linear", "conv1d"))
    paths = dict.fromkeys(site.path for site in chosen if site.role != "head" and site.path not in shared)
    return [path for path in paths if _is_plain(model.get_submodule(path))]


def _is_plain(module: nn.Module) -> bool:
    # A subclass may compute something else.
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def quantize(model: nn.Module, format: str | Format = "nf4", *, targets: Targets = "all-linear") -> nn.Module:
    """Quantise the linear maps of the blocks of `model` in place, one after the other, and return it.

    `load_base(..., quantize=...)` does it while it reads, so that the dense model is never whole in memory. Raises
    ModelError for a format that does not exist, for a model with adapters, and where nothing is left to quantise.

    Example:
        >>> model = quantize(model, "nf4")                                 # doctest: +SKIP
    """
    format = as_format(format)
    if names := sorted(adapters(model)):
        raise ModelError(
            Finding("Q103", f"the model has adapters ({', '.join(names)}): quantise it first", fix="adapter.detach()")
        )
    paths = sites_to_quantize(survey(model), model, targets)
    if not paths:
        raise ModelError(Finding("Q104", f"{type(model).__name__} has no dense linear maps in blocks to quantise"))
    for path in paths:
        module = model.get_submodule(path)
        if _weight(module).is_meta:
            raise ModelError(Finding("Q105", f"{path} has no values to quantise: it is on the meta device"))
        model.set_submodule(path, QuantizedLinear.of(module, format))
    return model


def reserve(model: nn.Module, format: Format, paths: Iterable[str] | None = None) -> nn.Module:
    """Put an empty packed map (on the meta device) in place of each at `paths`; by itself those that `quantize` packs.

    Raises ModelError where there is none.
    """
    chosen = list(sites_to_quantize(survey(model), model) if paths is None else paths)
    if not chosen:
        raise ModelError(Finding("Q104", f"{type(model).__name__} has no dense linear maps in blocks to quantise"))
    for path in chosen:
        module = model.get_submodule(path)
        weight = _weight(module)
        across = not isinstance(module, nn.Linear)
        width_out, width_in = reversed(weight.shape) if across else weight.shape
        with torch.device("meta"):
            made = QuantizedLinear(
                width_in, width_out, format, bias=module.bias is not None, dtype=weight.dtype, across=across
            )
        model.set_submodule(path, made)
    return model


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` whose weights are stored in fewer bits, by path; those of other libraries too."""
    return ((path, module) for path, module in model.named_modules() if is_packed(module))
