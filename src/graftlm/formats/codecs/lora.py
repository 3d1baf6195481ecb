"""LoRA and its kin in PEFT's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from graftlm.core import Method, Part, linear_kind, original_parameters, survey
from graftlm.errors import AdapterError, Finding
from graftlm.formats.codecs.codec import Codec, Planned
from graftlm.formats.codecs.parameters import once_for_tied
from graftlm.formats.matching import (
    parameter_suffixes,
    pattern_of,
    selectors_for,
    shortest_suffixes,
    targeted_or_faults,
    targeted_parameters,
)
from graftlm.methods import DoRA, LoRA
from graftlm.methods.lora import start_of, weight_at

__all__ = ["LoRACodec"]


class LoRACodec(Codec):
    """LoRA, with one rank and alpha for each module."""

    peft_type = "LORA"
    method = LoRA
    defaults: ClassVar[Mapping[str, Any]] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "alpha_pattern": (dict, type(None)),
        "bias": (str,),
        "exclude_modules": (str, list, type(None)),
        "init_lora_weights": (bool, str, type(None)),
        "layers_pattern": (str, list, type(None)),
        "layers_to_transform": (int, list, type(None)),
        "lora_alpha": (int, float),
        "lora_bias": (bool,),
        "lora_dropout": (int, float),
        "modules_to_save": (list, type(None)),
        "r": (int,),
        "rank_pattern": (dict, type(None)),
        "target_modules": (str, list, type(None)),
        "target_parameters": (list, type(None)),
        "trainable_token_indices": (list, dict, type(None)),
        "use_dora": (bool,),
        "use_rslora": (bool,),
    }
    # How A and B were started, and where to find a fused layout that our modules do not have.
    inert = frozenset(
        {"corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_ga_config", "megatron_core",
         "qalora_group_size"}
    )  # fmt: skip
    #: Ours for PEFT's starts. Of those that move a part of the base's weights into A and B, we know two by name.
    _starts: ClassVar[Mapping[Any, str]] = {
        None: "default",
        True: "default",
        False: "default",
        "gaussian": "gaussian",
        "orthogonal": "default",
        "eva": "default",
        "pissa": "pissa",
        "olora": "olora",
    }
    _names: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
    }

    def key(self, path: str, name: str) -> str:
        """The key in the file of tensor `name` of the delta at module `path`."""
        return super().key(path, self._names.get(name, name))

    def keys(self, parts: Sequence[Planned]) -> dict[str, str]:
        """As for any codec; where parameters of one module are targeted, PEFT nests them, the first one innermost."""
        found = {}
        for index, part in enumerate(parts):
            later = [other.site for other in parts[index + 1 :] if other.site.path == part.site.path]
            nested = sum(part.site.kind == site.kind == "experts" for site in later)
            path = part.site.path + ".base_layer" * nested
            for name, _ in part.shapes:
                if not name.startswith("start_"):  # of the base, and not in the file
                    found[part.state_key(name)] = self.key(path, name)
        return found

    def complete(self, parts: Sequence[Planned], state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """`state` with A0 and B0 of PiSSA and OLoRA, as they follow from this base's weights."""
        found, originals = dict(state), original_parameters(model)
        for part in parts:
            method = part.method
            if isinstance(method, LoRA) and any(name == "start_down" for name, _ in part.shapes):
                path = part.site.path
                weight = weight_at(part.site, model.get_submodule(path), method.name, originals.get((path, "weight")))
                down, up = start_of(weight, method.start, method.rank_at(path), method.scale_at(path))
                found[part.state_key("start_down")], found[part.state_key("start_up")] = down, up
        return found

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """With the trained rows of a tied embedding once; PEFT stores them again where it stores embeddings."""
        del config
        return once_for_tied(tensors, model, "token_adapter.trainable_tokens_delta")

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """LoraConfig's fields for `parts`, whose methods must agree in all but rank, alpha and place."""
        methods = [part.method for part in parts if isinstance(part.method, LoRA)]
        first = methods[0]
        kinds = {(m.dropout, m.rslora, m.bias, m.start, isinstance(m, DoRA)) for m in methods}
        if len(kinds) > 1 or any(part.site.part for part in parts):
            return None
        places = [part.site.key if part.site.kind == "experts" else part.site.path for part in parts]
        ranks = {place: method.rank_at(place) for place, method in zip(places, methods, strict=True)}
        alphas = {place: method.alpha_at(place) for place, method in zip(places, methods, strict=True)}
        modules = [part.site.path for part in parts if part.site.kind != "experts"]
        experts = [part.site.key for part in parts if part.site.kind == "experts"]
        return {
            "alpha_pattern": _patterns(first.alpha_pattern, alphas, first.alpha),
            "fan_in_fan_out": any(part.site.kind == "conv1d" for part in parts),
            "lora_alpha": _number(first.alpha),
            "lora_bias": first.bias,
            "lora_dropout": first.dropout,
            "init_lora_weights": "gaussian" if first.start == "gaussian" else True,
            "r": first.rank,
            "rank_pattern": _patterns(first.rank_pattern, ranks, first.rank),
            "target_modules": shortest_suffixes(modules, model) if modules else None,
            "target_parameters": parameter_suffixes(experts, model) or None,
            "use_dora": isinstance(first, DoRA),
            "use_rslora": first.rslora,
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """LoRA at the modules that PEFT would choose by `config`."""
        faults = []
        if (start := config.get("init_lora_weights")) not in self._starts:
            faults.append(
                Finding(
                    "A206",
                    f"LORA with init_lora_weights={start!r} is not supported here: it changes the base's weights too",
                    fix='save it with peft\'s save_pretrained(..., path_initial_model_for_weight_conversion="...")',
                )
            )
        if not (config.get("target_parameters") or config.get("target_modules")):
            faults.append(Finding("A216", "target_modules is not set"))
            raise AdapterError(faults)
        config = {"target_modules": None, **config}
        paths, misplaced = targeted_or_faults(config, model, self.peft_type, ("linear", "conv1d", "embedding"))
        faults += misplaced
        experts, misfits = self._experts(config, model)
        faults += misfits
        ranks, alphas = (
            {key: value for key, value in (config.get(field) or {}).items() if _is_used(key, [*paths, *experts])}
            for field in ("rank_pattern", "alpha_pattern")
        )
        modules = dict(model.named_modules())
        if start == "olora" and any(linear_kind(modules[path]) == "conv1d" for path in paths):
            faults.append(
                Finding(
                    "A206",
                    "LORA with init_lora_weights='olora' on Conv1D is not supported: PEFT takes their weight the wrong "
                    "way round there, so that the model was another one from the start",
                )
            )
        if faults:
            raise AdapterError(faults)
        kind = DoRA if config.get("use_dora", False) else LoRA
        modules_meant = selectors_for(config["target_modules"], paths, survey(model)) if paths else []
        return kind(
            start=self._starts[start],
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=[*modules_meant, *experts],
            rslora=config.get("use_rslora", False),
            bias=config.get("lora_bias", False),
            rank_pattern=ranks,
            alpha_pattern={key: float(value) for key, value in alphas.items()},
        )

    def _experts(self, config: Mapping[str, Any], model: nn.Module) -> tuple[list[str], list[Finding]]:
        """The stacks of experts that `target_parameters` means, and what is wrong with it."""
        words = config.get("target_parameters") or []
        known = {site.key for site in survey(model).parameters if site.kind == "experts"}
        found = targeted_parameters(words, model)
        faults = [
            Finding("A217", f"{name} is no stack of experts, which LORA cannot target here")
            for name in found
            if name not in known
        ]
        if words and not found:
            shown = ", ".join(map(str, words[:4]))
            faults.append(Finding("A217", f"target_parameters ({shown}) match nothing in {type(model).__name__}"))
        return found, faults


def _is_used(pattern: str, paths: Sequence[str]) -> bool:
    return any(pattern_of([pattern], path) for path in paths)


def _patterns(own: Mapping[str, Any], wanted: Mapping[str, float], default: float) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern` that gives each path its number: the method's own if that does."""
    ordered = sorted(own)  # the file is sorted, and the first match counts
    if all(own.get(pattern_of(ordered, path) or "", default) == number for path, number in wanted.items()):
        return {pattern: _number(own[pattern]) for pattern in ordered}
    return {f"^{re.escape(path)}": _number(number) for path, number in wanted.items() if number != default}


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


class AdaLoRACodec(LoRACodec):
    """AdaLoRA, read as the plain LoRA that it is after training: each map with the rank that was handed out to it.

    PEFT's scale stays alpha / (init_r + 1e-5) whatever rank is left, and E goes into the rows of A; a map that was left
    no rank is not changed. Our own AdaLoRA is saved as plain LoRA too, so nothing is written under this name.
    """

    peft_type = "ADALORA"
    #: What says how AdaLoRA trained, and nothing about the result.
    _schedule: ClassVar[dict[str, Any]] = {
        "beta1": 0.85,
        "beta2": 0.85,
        "deltaT": 1,
        "orth_reg_weight": 0.5,
        "target_r": 8,
        "tfinal": 0,
        "tinit": 0,
        "total_step": None,
    }
    defaults: ClassVar[Mapping[str, Any]] = {**LoRACodec.defaults, **_schedule, "init_r": 12, "rank_pattern": None}
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **{
            field: LoRACodec.reads[field]
            for field in (
                "bias", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
                "modules_to_save", "rank_pattern", "target_modules", "trainable_token_indices",
            )
        },
        "init_r": (int,),
    }  # fmt: skip
    inert = LoRACodec.inert | frozenset(_schedule) | frozenset({"init_lora_weights", "r", "use_rslora"})

    def key(self, path: str, name: str) -> str:
        """The key in the file of tensor `name` of the delta at module `path`."""
        return Codec.key(self, path, name)

    def shapes(self, parts: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
        """The shapes of A, B and E."""
        ranks = {self.key(part.site.path, "lora_E"): (dict(part.shapes)["lora_A"][0], 1) for part in parts}
        return {**super().shapes(parts), **ranks}

    def unpack(self, parts: Sequence[Planned], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A with its rows multiplied by E, and B."""
        found = super().unpack(parts, tensors)
        for part in parts:
            scales = tensors[self.key(part.site.path, "lora_E")]
            found[part.state_key("lora_A")] = scales * found[part.state_key("lora_A")]
        return found

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Without the empty tensors of maps that were left no rank."""
        found = super().effective(tensors, config, model)
        return {key: tensor for key, tensor in found.items() if tensor.numel() or ".lora_" not in key}

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """LoRA at the modules that PEFT would choose by `config`, with the ranks that it says."""
        faults = []
        rank, alpha = config.get("init_r", 12), float(config.get("lora_alpha", 8))
        if rank < 1:
            faults.append(Finding("A216", f"init_r cannot be {rank}"))
        if not config.get("target_modules"):
            faults.append(Finding("A216", "target_modules is not set"))
        paths, misplaced = targeted_or_faults(config, model, self.peft_type, ("linear", "conv1d"))
        faults += misplaced
        left = {}
        for name, chosen in (config.get("rank_pattern") or {}).items():
            if (
                not isinstance(chosen, list)
                or len(chosen) != rank
                or not all(isinstance(each, bool) for each in chosen)
            ):
                faults.append(Finding("A216", f"rank_pattern of {name} is no list of {rank} times true or false"))
            else:
                left[name.partition(".lora_E")[0]] = sum(chosen)
        if not faults and paths and not any(left.get(path, rank) for path in paths):
            faults.append(Finding("A216", "rank_pattern leaves no map a rank, so that there is nothing to load"))
        if faults:
            raise AdapterError(faults)
        kept = [path for path in paths if left.get(path, rank)]
        words = config["target_modules"] if kept == paths else ""
        changed = {f"^{re.escape(path)}": left[path] for path in kept if left.get(path, rank) != rank}
        return LoRA(
            rank=rank,
            alpha=_adalora_alpha(alpha, rank, rank),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=selectors_for(words, kept, survey(model)),
            rank_pattern=changed,
            alpha_pattern={pattern: _adalora_alpha(alpha, count, rank) for pattern, count in changed.items()},
        )


def _adalora_alpha(alpha: float, rank: int, start: int) -> float:
    """The alpha with which plain LoRA of `rank` has the scale of AdaLoRA that started from rank `start`."""
    return (alpha if alpha > 0 else float(rank)) * rank / (start + 1e-5)
