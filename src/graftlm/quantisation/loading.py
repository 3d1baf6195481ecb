"""Quantising while reading: transformers' loader with every linear map of the blocks packed as its weight arrives.

transformers reads one tensor after the other where a quantiser asks for it, and hands each to the operation below; the
dense weight is dropped before the next is read. So the peak is the quantised model and one weight. A quantised model
that was saved (`model.save_pretrained`) says in its configuration how it is packed, and is read back as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftlm.core import survey
from graftlm.quantisation.converting import reserve, sites_to_quantize
from graftlm.quantisation.linear import PACKED, QuantizedLinear
from graftlm.quantisation.sources import Source
from graftlm.quantisation.storage import Format

__all__ = ["METHOD", "PackedConfig", "load_quantized", "settle"]

#: The word for our storage in a model's configuration.
METHOD = "graftlm"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """How a base is packed, as it stands in its configuration (`quantization_config`)."""

    def __init__(
        self,
        format: str = "nf4",
        block: int = 64,
        double: bool = True,
        modules: list[str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # a word of ours
        self.format, self.block, self.double = format, block, double
        #: The paths that are packed; None means as `sites_to_quantize` chooses.
        self.modules = modules

    @classmethod
    def of(cls, format: Format, modules: list[str] | None = None) -> PackedConfig:
        """The configuration for `format`."""
        return cls(format.name, format.block, format.double, modules)

    @property
    def as_format(self) -> Format:
        """The format that it names. Raises ModelError where there is none."""
        return Format(self.format, self.block, self.double)


class _Pack(ConversionOps):
    """Packs one weight as it arrives."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]  # buffers are no lists
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module | None = None,
        source_patterns: list[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """The tensors of each weight in `input_dict`, by their full names."""
        assert model is not None
        # Of a weight that is only renamed, the one pattern is its name in the file.
        keys = source_patterns if source_patterns is not None and len(source_patterns) == len(input_dict) == 1 else []
        found: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            assert isinstance(module, QuantizedLinear)
            weight = weight.T.contiguous() if module.across else weight
            if weight.shape != (module.out_features, module.in_features):
                self.quantizer.misshapen.append(name)
                continue
            for key, tensor in module.format.pack(weight).items():
                found[f"{path}.{key}"] = nn.Parameter(tensor, requires_grad=False) if key == "weight" else tensor
            module._is_hf_initialized = True  # type: ignore[assignment]
            self.quantizer.keys.update((path, key) for key in keys)
        return found


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    requires_calibration = False

    def __init__(self, quantization_config: PackedConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        #: Weights whose shape is not the one that the model's configuration says.
        self.misshapen: list[str] = []
        #: The name in the checkpoint of the weight at each path.
        self.keys: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        assert isinstance(config, PackedConfig)
        if config.modules is None:
            config.modules = sites_to_quantize(survey(model), model)
        return reserve(model, config.as_format, config.modules)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        path, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def load_quantized(
    kind: Any, where: str, config: Any, format: Format, *, dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model of auto class `kind` at `where`, packed as it is read, and transformers' report on what was read.

    Raises ModelError where the model has no linear maps in blocks; what transformers raises is left to the caller.
    """
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options["quantization_config"] = PackedConfig.of(format)
    tensors = _tensors_of(Path(where)) if type(config) in kind._model_mapping else None
    if tensors is None:
        model, report = kind.from_pretrained(where, config=config, use_safetensors=True, **options)
    else:
        with torch.device("meta"):
            own_class = type(kind.from_config(config))
        model, report = own_class.from_pretrained(None, config=config, state_dict=tensors, **options)
        model.config.name_or_path = model.name_or_path = where
        if (Path(where) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(where)
    _remember(model, where, options.get("revision"))
    misshapen = model.hf_quantizer.misshapen
    lost = {f"{name.removesuffix('weight')}{part}" for name in misshapen for part in ("weight", *PACKED)}
    # What stands beside codes comes with them: a checkpoint lacks the weight alone.
    beside = {
        f"{path}.{part}"
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for part in PACKED
    }
    report["missing_keys"] = set(report["missing_keys"]) - lost - beside
    report["mismatched_keys"] = [*(report.get("mismatched_keys") or ()), *misshapen]
    return settle(model), report


def _remember(model: Any, where: str, revision: str | None) -> None:
    """Tell each packed map where its weight lies."""
    folder: str | None = where
    if not Path(where).is_dir():  # a hub id, whose files are on this machine by now
        config = cached_file(where, "config.json", revision=revision, local_files_only=True)
        folder = None if config is None else str(Path(config).parent)
    names = None if folder is None else _files_of(Path(folder))
    if folder is None or names is None:
        return
    index = Path(folder) / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    for path, key in model.hf_quantizer.keys.items():
        module = model.get_submodule(path)
        if len(names) == 1 or key in files:
            module.source = Source(str((Path(folder) / files.get(key, names[0])).absolute()), key)


def settle(model: Any) -> Any:
    """Make a model that was read with our quantiser an ordinary one that only knows from its configuration.

    Its maps are plain modules: transformers need not look after them, nor refuse to train or to move them. A model of
    another quantiser stays as it is.
    """
    if not isinstance(model.__dict__.get("hf_quantizer"), _Quantizer):
        return model
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_is_quantized", False):
            config._is_quantized = False
    return model


def _tensors_of(folder: Path) -> dict[str, Any] | None:
    """Every tensor of the weights in `folder`, each read from its file when it is asked for; None for other layouts.

    Read, not mapped into memory: pages of a mapped file count as the process's own until something else needs them.
    """
    names = _files_of(folder)
    if names is None:
        return None
    found: dict[str, Any] = {}
    for name in names:
        file = safe_open(str(folder / name), framework="pt", backend="pread")
        found |= {key: _Unread(file, key) for key in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
    return found


def _files_of(folder: Path) -> list[str] | None:
    """The files of the weights in `folder`; None for other layouts."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [single.name] if single.is_file() else None


class _Unread:
    """A tensor of a file that is read when it is indexed, as transformers' loader does; a copy is the same one."""

    def __init__(self, file: Any, key: str) -> None:
        self.file, self.key, self._slice = file, key, file.get_slice(key)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._slice[index]
        return tensor

    def get_dtype(self) -> str:
        """The type as it stands in the file."""
        found: str = self._slice.get_dtype()
        return found

    def get_shape(self) -> list[int]:
        """The shape as it stands in the file."""
        found: list[int] = self._slice.get_shape()
        return found

    def __deepcopy__(self, _: Any) -> _Unread:
        return self
