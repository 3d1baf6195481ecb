"""The fingerprint of a base model: a short hash that says whether two models are the same backbone.

It covers the backbone alone, so a checkpoint has one fingerprint as a causal model and as a classifier; heads and
poolers, which come and go with the task, are left out. Values are sampled and rounded to bfloat16, so the type and the
device that a model was loaded with do not matter. Attached and merged adapters do not matter either.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core import original_parameters
from graftlm.core.storage import fetched
from graftlm.quantisation.foreign import as_loaded

__all__ = ["fingerprint"]

_SAMPLES = 16
#: Configuration that says how a model is loaded, run, trained or labelled, not what it computes.
_VOLATILE = re.compile(
    r"^_|token_id|dropout|label|version|dtype|attn_implementation|^(architectures|auto_map|finetuning_task|"
    r"gradient_checkpointing|initializer_factor|initializer_range|is_decoder|name_or_path|output_attentions|"
    r"output_hidden_states|pretraining_tp|problem_type|quantization_config|return_dict|router_aux_loss_coef|"
    r"task_specific_params|tie_word_embeddings|use_cache)$"
)


def fingerprint(model: nn.Module) -> str:
    """The 16 hexadecimal characters that stand for the backbone of `model`.

    The same for a model in float32 and bfloat16, on any device, under another head, with adapters attached or merged;
    another for other weights of the same shape. Quantised storage counts as another base. A model without values
    (meta device) is told by its configuration and shapes alone.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> fingerprint(model) == fingerprint(model.bfloat16())
        True
    """
    backbone, prefix = _backbone(model)
    skipped = _outside(model, backbone)
    originals = original_parameters(model)
    tensors: dict[str, Tensor] = {}
    away: dict[str, tuple[nn.Module, str]] = {}  # on disk, perhaps
    seen: set[int] = set()
    for path, module in backbone.named_modules():
        if any(path == skip or path.startswith(skip + ".") for skip in skipped):
            continue
        for name, now in module._parameters.items():
            parameter = originals.get((f"{prefix}.{path}".strip(".") if prefix else path, name), now)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                tensors[f"{path}.{name}"] = as_loaded(parameter)
                if parameter.is_meta:
                    away[f"{path}.{name}"] = module, name
    facts = {
        "config": _lasting(getattr(model, "config", None)),
        "tensors": {name: list(tensors[name].shape) for name in sorted(tensors)},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(_sampled(_here(tensors[name], away.get(name)) for name in sorted(tensors)))
    return digest.hexdigest()[:16]


def _backbone(model: nn.Module) -> tuple[nn.Module, str]:
    inner = getattr(model, "base_model", model)
    path = next((path for path, module in model.named_modules() if module is inner), None)
    return (model, "") if path is None else (inner, path)


def _outside(model: nn.Module, backbone: nn.Module) -> list[str]:
    """Paths in the backbone that belong to a task: its pooler, and the output embedding of a model without a base."""
    paths = [name for name, _ in backbone.named_children() if name == "pooler"]
    find: Any = getattr(model, "get_output_embeddings", None)
    if backbone is model and callable(find):
        head = find()
        paths += [path for path, module in model.named_modules() if module is head]
    return paths


def _lasting(config: Any) -> Any:
    if isinstance(config, dict):
        # What is switched off is left out: a later transformers may bring new settings, and they start switched off.
        lasting = {str(key): _lasting(value) for key, value in config.items() if not _VOLATILE.search(str(key))}
        return {key: value for key, value in lasting.items() if value not in (None, False, [], {})}
    return _lasting(config.to_dict()) if hasattr(config, "to_dict") else config


def _here(tensor: Tensor, owner: tuple[nn.Module, str] | None) -> Tensor:
    found = fetched(*owner) if owner is not None else None
    return tensor if found is None else found


def _sampled(tensors: Iterable[Tensor]) -> bytes:
    samples = []
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:  # codes of packed weights too: they tell one format from another
            if type(tensor) not in (Tensor, nn.Parameter):  # of another library, which may know no views
                tensor = tensor.dequantize()
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16))
    if not samples:
        return b""
    # Gathered on one device first: one copy to the host rather than one for each tensor.
    gathered = torch.cat([sample.to(samples[0].device) for sample in samples])
    return gathered.cpu().view(torch.int16).numpy().tobytes()
