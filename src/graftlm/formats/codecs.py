"""The table from methods to PEFT's words and back: one codec a method of PEFT's, and what may stand beside any of them.

A codec is one class: PEFT's name for the method, its configuration's fields with their defaults, the key of each
tensor, the configuration for some parts, and the method for a configuration. `CODECS` lists them. Modules that are
trained whole (`modules_to_save`) and biases (`bias`) stand beside a method in PEFT; they are read and written here for
all codecs alike.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import (
    Method,
    Part,
    Site,
    Survey,
    WholeParameterDelta,
    linear_kind,
    original_parameters,
    survey,
)
from graftlm.errors import AdapterError, Finding, GraftError, nearest
from graftlm.formats.matching import (
    exactly,
    kept,
    parameter_suffixes,
    pattern_of,
    shortest_suffixes,
    targeted,
    targeted_parameters,
)
from graftlm.methods import BitFit, DoRA, Head, LoRA, Modules, PrefixTuning, PromptTuning
from graftlm.methods.lora import start_of, weight_at

__all__ = [
    "CODECS", "PREFIX", "Codec", "Planned", "beside", "codec_of", "lacks", "understood",
]  # fmt: skip

#: What PEFT puts before the path of a module.
PREFIX = "base_model.model."

#: Fields of every PEFT configuration; what they say holds whatever their value.
_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": None,
}


@dataclass(frozen=True)
class Planned:
    """One delta as a file sees it: where it acts, its tensors, and the numbers that steer it (scales)."""

    method: Method
    site: Site
    is_parameter: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    numbers: tuple[tuple[str, float], ...]
    #: Whether only the file tells the sizes; `shapes` are then those of a fresh delta, and binding in their names only.
    sizes_from_file: bool = False

    def state_key(self, name: str) -> str:
        """The name of the delta's tensor `name` in `Adapter.state()`."""
        return self.site.key if self.is_parameter else f"{self.site.key}.{name}"


class Codec(ABC):
    """How one of PEFT's methods is written and read. To add one, subclass this and add it to `CODECS`.

    Most methods need `key`, `describe` and `understand`. Those whose tensors lie otherwise in PEFT's file (stacked over
    layers, one for all) replace `shapes`, `pack` and `unpack` too.
    """

    #: PEFT's name of the method, as in `adapter_config.json`.
    peft_type: ClassVar[str]
    #: Our method.
    method: ClassVar[type[Method]]
    #: Every field of PEFT's configuration class beside the common ones, with the default there.
    defaults: ClassVar[Mapping[str, Any]]
    #: The fields that `understand` reads, with the types that their values may have.
    reads: ClassVar[Mapping[str, tuple[type, ...]]]
    #: Fields without a meaning after training, whatever their value.
    inert: ClassVar[frozenset[str]] = frozenset()
    #: The word for "the biases of the targeted modules" in `bias`.
    own_biases: ClassVar[str] = "lora_only"
    #: What stands before module paths in the file; prompt methods have "base_model." alone.
    prefix: ClassVar[str] = PREFIX
    #: Whether PEFT does nothing for a model whose task it has no name for.
    needs_task: ClassVar[bool] = False

    def key(self, path: str, name: str) -> str:
        """The key in the file of tensor `name` (a parameter's own name, for trained parameters) at module `path`."""
        return f"{self.prefix}{path}.{name}"

    def keys(self, parts: Sequence[Planned]) -> dict[str, str]:
        """The key in the file for each name in the adapter's state."""
        return {
            part.state_key(name): self.key(part.site.path, part.site.parameter or name)
            for part in parts
            for name, _ in part.shapes
        }

    def shapes(self, parts: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the file."""
        shapes = {part.state_key(name): shape for part in parts for name, shape in part.shapes}
        return {key: shapes[name] for name, key in self.keys(parts).items()}

    def pack(self, parts: Sequence[Planned], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors out of the adapter's state."""
        return {key: state[name] for name, key in self.keys(parts).items()}

    def unpack(self, parts: Sequence[Planned], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's state out of the file's tensors; the reverse of `pack`."""
        return {name: tensors[key] for name, key in self.keys(parts).items()}

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        """The file's tensors without what PEFT stores and never uses."""
        return tensors

    def complete(self, parts: Sequence[Planned], state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """`state` with what the file leaves out because it follows from the base; most methods have no such thing."""
        del parts, model
        return dict(state)

    @abstractmethod
    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """The fields of the configuration that differ from the defaults; None where PEFT has no words for `parts`.

        What is written is read again and compared, so this need not foresee everything.
        """

    @abstractmethod
    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """The method that a PEFT configuration says, without what stands beside it.

        Raises AdapterError with everything that does not fit; TypeError, ValueError or re.error for values that cannot
        be read, which the caller reports.
        """

    def configuration(self, model: nn.Module, **fields: Any) -> dict[str, Any]:
        """All fields of PEFT's configuration, with `fields` in place of defaults."""
        name = getattr(model, "name_or_path", None) or None
        return {**_COMMON, **self.defaults, "base_model_name_or_path": name, "peft_type": self.peft_type, **fields}


def lacks(codec: Codec, config: Mapping[str, Any], place: str) -> list[Finding]:
    """What `config` asks for that is not there, and what has the wrong type."""
    faults = []
    for field, value in sorted(config.items()):
        if field in _COMMON or field in codec.inert or field in ("peft_type", "runtime_config"):
            continue
        if field in codec.reads:
            if not isinstance(value, codec.reads[field]) or (
                isinstance(value, bool) and bool not in codec.reads[field]
            ):
                faults.append(Finding("A216", f"{field} cannot be {value!r}", place=place))
        elif value != codec.defaults.get(field) and value not in (None, False, [], {}):
            faults.append(
                Finding("A206", f"{codec.peft_type} with {field}={value!r} is not supported here", place=place)
            )
    return faults


# --- what stands beside any method ----------------------------------------------------------------------------------


def beside(codec: Codec, parts: Sequence[Part], targets: Iterable[str], model: nn.Module) -> dict[str, Any] | None:
    """`bias`, `modules_to_save` and `task_type` for the parameters that `parts` train; None where PEFT has no words."""
    if not all(
        isinstance(part.method, (Head, Modules, BitFit))
        and isinstance(part.delta, WholeParameterDelta)
        and not part.site.aliases
        for part in parts
    ):
        return None
    names = _parameter_names(model)
    trained = {part.site.key for part in parts}
    whole: list[str] = []
    for path, _ in model.named_modules(remove_duplicate=False):
        own = [name for name in names if name.startswith(path + ".")]
        inside = any(path.startswith(outer + ".") for outer in whole)
        if path and own and not inside and trained.issuperset(own):
            if all(name.endswith(".bias") for name in own):
                continue  # left to `bias`
            whole.append(path)
    rest = {name for name in trained if not _under(whole, name)}
    bias = "none"
    if rest:
        if rest == {name for name in names if name.endswith(".bias") and not _under(whole, name)}:
            bias = "all"
        elif rest == {f"{path}.bias" for path in targets} & names.keys():
            bias = codec.own_biases
        else:
            return None
    words = _words_for(whole, model)
    if words is None:
        return None
    fields: dict[str, Any] = {"bias": bias, "modules_to_save": words or None}
    if any(field not in codec.defaults and value not in ("none", None) for field, value in fields.items()):
        return None
    fields = {field: value for field, value in fields.items() if field in codec.defaults}
    task = _task_of(model)
    # PEFT keeps the head of these tasks by itself, and then wants it in the file.
    if any(path not in whole for path in kept(_HEADS.get(task or "", ()), model)):
        task = None
    if task is None:
        kind = type(model)
        fields["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {**fields, "task_type": task}


def understood(codec: Codec, config: Mapping[str, Any], model: nn.Module) -> Method:
    """The whole method that `config` says: the codec's own, and what `bias` and `modules_to_save` put beside it.

    Raises as `Codec.understand` does.
    """
    faults = []
    if (bias := config.get("bias", "none")) not in ("none", "all", codec.own_biases):
        faults.append(Finding("A216", f"bias cannot be {bias!r}", fix='"bias": "none"'))
    heads = _HEADS.get(str(config.get("task_type")), ())
    config = {**config, "modules_to_save": [*(config.get("modules_to_save") or []), *heads]}
    try:
        method = codec.understand(config, model)
    except GraftError as error:
        raise AdapterError([*faults, *error.findings]) from None
    if faults:
        raise AdapterError(faults)
    here = survey(model)
    targets = [site.path for part in method.parts for site in part.sites(here)]
    for other in _methods_beside(config, targets, model, here):
        method = method + other
    return method


def _methods_beside(config: Mapping[str, Any], targets: Sequence[str], model: nn.Module, here: Survey) -> list[Method]:
    found: list[Method] = []
    names = _parameter_names(model)
    words = config.get("modules_to_save") or []
    whole = [path for path in kept(words, model) if any(name.startswith(path + ".") for name in names)]
    if whole:
        found.append(_modules(words, whole, here))
    if (bias := config.get("bias", "none")) != "none":
        if bias == "all":
            keys = [name for name in names if name.endswith(".bias") and not _under(whole, name)]
        else:
            keys = [f"{path}.bias" for path in targets if f"{path}.bias" in names]
        everywhere: set[str] = set()
        with contextlib.suppress(GraftError):  # a model without biases: `bias` then says nothing
            everywhere = {site.key for site in BitFit(add=False).sites(here)}
        if keys:
            found.append(
                BitFit(add=False)
                if everywhere == set(keys)
                else BitFit([exactly(key.removesuffix(".bias")) for key in keys], add=False)
            )
    return found


def _modules(words: Sequence[str], paths: Sequence[str], here: Survey) -> Modules:
    """Modules by PEFT's own words where ours mean the same by them, else by exact paths."""
    exact = Modules([exactly(path) for path in paths])
    known = [word for word in dict.fromkeys(words) if any(path == word or path.endswith("." + word) for path in paths)]
    try:
        by_words = {site.key for site in Modules(known).sites(here)}
    except GraftError:
        return exact
    return Modules(known) if by_words == {site.key for site in exact.sites(here)} else exact


#: The modules that PEFT keeps for a task, whether or not its configuration says so.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def _task_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def _parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _under(paths: Iterable[str], name: str) -> bool:
    return any(name.startswith(path + ".") for path in paths)


def _words_for(whole: Sequence[str], model: nn.Module) -> list[str] | None:
    """Words that mean exactly the modules `whole` to PEFT, which also matches inside a name."""
    words: set[str] = set()
    for path in whole:
        parts = path.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        word = next((word for word in endings if set(kept([word], model)) <= set(whole)), None)
        if word is None:
            return None
        words.add(word)
    return sorted(words)


# --- LoRA -----------------------------------------------------------------------------------------------------------


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
        paths = targeted(config, model)
        experts, misfits = self._experts(config, model)
        faults += misfits
        ranks, alphas = (
            {key: value for key, value in (config.get(field) or {}).items() if _is_used(key, [*paths, *experts])}
            for field in ("rank_pattern", "alpha_pattern")
        )
        modules = dict(model.named_modules())
        if not paths and config["target_modules"]:
            names = {path.rpartition(".")[2] for path, module in modules.items() if linear_kind(module)}
            words = config["target_modules"]
            shown = words if isinstance(words, str) else ", ".join(map(str, words[:4]))
            close = [near for word in (words if isinstance(words, list) else [words]) for near in nearest(word, names)]
            hint = f", nearest: {', '.join(dict.fromkeys(close))}" if close else ""
            faults.append(Finding("A217", f"target_modules ({shown}) match nothing in {type(model).__name__}{hint}"))
        faults += [
            Finding("A217", f"{path} is a {type(modules[path]).__name__}, which LORA cannot target here")
            for path in paths
            if linear_kind(modules[path]) is None
        ]
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
        modules_meant = _selectors(config["target_modules"], paths, survey(model)) if paths else []
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


def _selectors(words: str | Sequence[str], paths: Sequence[str], here: Survey) -> list[str]:
    """Our selectors for exactly `paths`: PEFT's words where ours mean the same by them, else exact paths."""
    if not isinstance(words, str):
        words = sorted(words)
        try:
            if {site.path for site in here.select(words)} == set(paths):
                return list(words)
        except GraftError:
            pass
    return [exactly(path) for path in paths]


def _patterns(own: Mapping[str, Any], wanted: Mapping[str, float], default: float) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern` that gives each path its number: the method's own if that does."""
    ordered = sorted(own)  # the file is sorted, and the first match counts
    if all(own.get(pattern_of(ordered, path) or "", default) == number for path, number in wanted.items()):
        return {pattern: _number(own[pattern]) for pattern in ordered}
    return {f"^{re.escape(path)}": _number(number) for path, number in wanted.items() if number != default}


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


# --- virtual tokens -------------------------------------------------------------------------------------------------


class _VirtualCodec(Codec):
    """What PEFT's prompt methods share: one tensor `prompt_embeddings` for the whole model, and no wrapped modules."""

    prefix = "base_model."
    needs_task = True
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "modules_to_save": (list, type(None)),
        "num_transformer_submodules": (int, type(None)),
        "num_virtual_tokens": (int,),
    }
    _sizes: ClassVar[dict[str, Any]] = {
        "modules_to_save": None,
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": None,
        "num_virtual_tokens": None,
        "token_dim": None,
    }
    _sizes_said_by_the_tensor: ClassVar[frozenset[str]] = frozenset({"num_attention_heads", "num_layers", "token_dim"})

    def key(self, path: str, name: str) -> str:  # noqa: ARG002
        """The one key there is."""
        return "prompt_embeddings"

    def _length(self, config: Mapping[str, Any]) -> int:
        length = config.get("num_virtual_tokens")
        if not isinstance(length, int) or length < 1:
            raise AdapterError(Finding("A216", f"num_virtual_tokens cannot be {length!r}"))
        return length


class PromptTuningCodec(_VirtualCodec):
    """Prompt tuning at the start of the sequence; in encoder-decoders of the encoder's.

    For those PEFT also stores, and never uses, as many vectors again for the decoder.
    """

    peft_type = "PROMPT_TUNING"
    method = PromptTuning
    defaults: ClassVar[Mapping[str, Any]] = {
        **_VirtualCodec._sizes,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    # How the prompt was started.
    inert = _VirtualCodec._sizes_said_by_the_tensor | frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
    )

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Without the decoder's half, which PEFT never reads."""
        found, length = tensors.get("prompt_embeddings"), config.get("num_virtual_tokens")
        if found is None or not isinstance(length, int) or config.get("num_transformer_submodules") != 2:
            return tensors
        return {**tensors, "prompt_embeddings": found[:length]} if found.shape[:1] == (2 * length,) else tensors

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """PromptTuningConfig's fields for one prompt that stands at the start."""
        first, *others = parts
        method = first.method
        assert isinstance(method, PromptTuning)
        if others or method.position != "start":
            return None
        sizes = attention_sizes(model)
        return {
            "num_attention_heads": sizes[1] if sizes else None,
            "num_layers": sizes[0] if sizes else None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": method.length,
            "token_dim": first.site.in_features,
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:  # noqa: ARG002
        """A prompt of the length that `config` says."""
        return PromptTuning(length=self._length(config))


class PTuningCodec(PromptTuningCodec):
    """P-tuning: PEFT stores what its network computes, which is a prompt; so it is read as one."""

    peft_type = "P_TUNING"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_VirtualCodec._sizes,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
    inert = _VirtualCodec._sizes_said_by_the_tensor | frozenset(
        {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
    )


class PrefixTuningCodec(_VirtualCodec):
    """Prefix tuning with shifted positions: k and v of all layers side by side, [tokens, layers x 2 x heads x width].

    In encoder-decoders PEFT splits its tensor otherwise than it was trained for: half of it is never used and layers
    share prefixes, with a bias of relative positions over them. Such files cannot be read exactly, and are refused.
    """

    peft_type = "PREFIX_TUNING"
    method = PrefixTuning
    defaults: ClassVar[Mapping[str, Any]] = {
        **_VirtualCodec._sizes,
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    }
    # What is stored is what the projection computes.
    inert = _VirtualCodec._sizes_said_by_the_tensor | frozenset(
        {"encoder_hidden_size", "init_weights", "prefix_projection"}
    )

    def shapes(self, parts: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
        """The shape of the one tensor."""
        shapes = [shape for part in parts for _, shape in part.shapes]
        return {"prompt_embeddings": (shapes[0][0], sum(shape[1] for shape in shapes))}

    def pack(self, parts: Sequence[Planned], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys and values of all layers side by side: k0, v0, k1, v1, ..."""
        names = [part.state_key(name) for part in parts for name in ("prefix_key", "prefix_value")]
        return {"prompt_embeddings": torch.cat([state[name] for name in names], dim=1)}

    def unpack(self, parts: Sequence[Planned], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each layer's own columns."""
        names = [part.state_key(name) for part in parts for name in ("prefix_key", "prefix_value")]
        widths = [dict(part.shapes)[name][1] for part in parts for name in ("prefix_key", "prefix_value")]
        return dict(zip(names, torch.split(tensors["prompt_embeddings"], widths, dim=1), strict=True))

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """PrefixTuningConfig's fields for a prefix of every layer with shifted positions."""
        method = parts[0].method
        assert isinstance(method, PrefixTuning)
        sizes = attention_sizes(model)
        widths = {(part.site.kv_heads, part.site.head_width) for part in parts}
        alike = all(part.method is method for part in parts) and len(widths) == 1
        if sizes is None or not alike or method.positions != "shifted" or sizes[0] != len(parts):
            return None
        heads, width = widths.pop()
        return {
            "encoder_hidden_size": heads * width,
            "num_attention_heads": heads,
            "num_layers": len(parts),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": method.length,
            "token_dim": heads * width,
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """A prefix of the length that `config` says, with shifted positions."""
        length = self._length(config)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise AdapterError(
                Finding(
                    "A206",
                    f"{self.peft_type} of an encoder-decoder is not supported here: PEFT gives layer i the keys and "
                    "values of layer 2i, and has no prefix in the encoder",
                    fix="train it anew: prefix(length=...)",
                )
            )
        return PrefixTuning(length=length, positions="shifted")


def attention_sizes(model: nn.Module) -> tuple[int, int] | None:
    """How many layers and attention heads the model's configuration says; None where it has other words."""
    config = getattr(model, "config", None)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    return (layers, heads) if isinstance(layers, int) and isinstance(heads, int) else None


#: Every codec by PEFT's name of its method.
CODECS: dict[str, Codec] = {
    codec.peft_type: codec for codec in (LoRACodec(), PromptTuningCodec(), PTuningCodec(), PrefixTuningCodec())
}


def codec_of(method: Method) -> Codec | None:
    """The codec that writes `method`, if PEFT has a word for it."""
    return next((codec for codec in CODECS.values() if isinstance(method, codec.method)), None)
