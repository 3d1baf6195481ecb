"""Settings files of other tools as a run file here, with a line for each thing that was changed, and for each left out.

Understood are peft's adapter_config.json, and the run files of axolotl, LLaMA-Factory, TRL and the Trainer (YAML or
JSON). Which name is which setting is the table in `foreign`; what differs in meaning is worked out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graftlm.errors import Finding, SettingsError

from .foreign import NO_COUNTERPART, known_elsewhere
from .reading import attempt, resolve
from .schema import SETTINGS, RunSettings

__all__ = ["Translation", "translate"]

_METHODS = {
    "lora": "lora", "qlora": "lora", "dora": "dora", "adalora": "adalora", "ia3": "ia3", "prefix_tuning": "prefix",
    "prompt_tuning": "prompt", "p_tuning": "ptuning", "vera": "vera", "ln_tuning": "norm", "full": "full",
    "freeze": "last",
}  # fmt: skip
_KINDS = {"peft_type", "adapter", "finetuning_type", "fine_tune_type", "lora_model"}
_TASKS = {
    "causal_lm": "sft", "seq_cls": "classify", "token_cls": "tag", "seq_2_seq_lm": "seq2seq", "sft": "sft", "pt": "lm",
    "dpo": "dpo", "kto": "kto", "rm": "reward",
}  # fmt: skip
_LORA = {"rank", "alpha", "dropout", "targets", "layers", "rslora", "bias"}
#: Methods to the options of theirs that other tools have too.
_OPTIONS = {
    "lora": _LORA | {"start"}, "dora": _LORA, "pissa": _LORA, "olora": _LORA,
    "adalora": {"rank", "alpha", "dropout", "targets", "layers", "target_rank"},
    "vera": {"rank", "dropout", "targets", "layers"}, "ia3": {"targets", "feedforward"},
    "prefix": {"length", "mlp"}, "prompt": {"length"}, "ptuning": {"length", "encoder"},
}  # fmt: skip
#: Names that stand in peft's files for an option of one method.
_OF_METHOD = {
    "num_virtual_tokens": "length", "feedforward_modules": "feedforward", "layers_to_transform": "layers",
    "use_rslora": "rslora", "peft_use_rslora": "rslora", "lora_bias": "bias", "init_r": "rank",
    "target_r": "target_rank", "encoder_hidden_size": "mlp", "encoder_reparameterization_type": "encoder",
}  # fmt: skip
_OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"),
    **dict.fromkeys(("paged_adamw_8bit", "pagedadamw8bit"), "paged_adamw_8bit"),
}
_BITS = {"4": "nf4", "8": "int8"}
_COUNTS = {"warmup_steps", "lr_warmup_steps", "num_warmup_steps"}
_PER_PART = {"per_device_train_batch_size", "per_gpu_train_batch_size", "micro_batch_size"}
_SHARES = {"val_set_size", "val_size"}
_SCHEDULES = {
    "constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine",
    "polynomial": "linear", "reduce_lr_on_plateau": "constant",
}  # fmt: skip
_TEMPLATES, _OWN_TEMPLATES = ("template", "chat_template", "template_name"), ("plain", "turns")
_DATA_PATHS = ("data.path", "data.eval_path")


@dataclass(frozen=True)
class Translation:
    """The settings, and what was done with each foreign name: `changed` and `left_out`, a line each."""

    settings: RunSettings
    changed: tuple[str, ...]
    left_out: tuple[str, ...]


def translate(file: Path) -> Translation:
    """The settings that `file` of another tool means here. Raises SettingsError if it cannot be read or does not fit.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     place = Path(folder, "sft.yaml")
        ...     _ = place.write_text("lora_r: 8\\nlora_alpha: 32\\nnum_train_epochs: 2\\n")
        ...     translate(place).settings.method
        'lora(rank=8,alpha=32)'
    """
    try:
        tree = YAML(typ="safe").load(file.read_text(encoding="utf-8"))  # JSON is YAML too
    except OSError as error:
        raise SettingsError(Finding("S109", f"cannot read {file}: {error.strerror or error}")) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(
            Finding("S110", f"{file} is neither YAML nor JSON: {str(error).splitlines()[0]}")
        ) from error
    if not isinstance(tree, Mapping):
        raise SettingsError(Finding("S110", f"{file} holds no settings: a mapping of names to values is wanted"))
    work = _Work()
    for name, value in tree.items():
        try:
            work.take(str(name), value)
        except (TypeError, ValueError):  # "auto", where a number is wanted here
            work.left_out.append(f"{name}: {_short(value)} is left out: it is no number")
    given = work.given()
    for finding in attempt(python=given).findings:
        if finding.code in ("S104", "S106"):  # a word that another tool has and none here means
            name = next(name for name in given if finding.message.startswith(f"{name} "))
            del given[name]
            work.changed = [line for line in work.changed if f" is {name}: " not in line]
            work.left_out.append(f"{finding.message}: left out")
    return Translation(resolve(python=given).settings, tuple(work.changed), tuple(work.left_out))


class _Work:
    """What was found so far."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.method = ""
        self.changed: list[str] = []
        self.left_out: list[str] = []
        self.rows_a_part = 0
        self.warmup_count = 0
        self.projected = False  # without it the width of a prefix's projection says nothing

    def take(self, name: str, value: Any) -> None:
        """One foreign name."""
        key = name.lower().replace("-", "_")
        known = known_elsewhere(key)
        if value is None or value in ([], {}, ""):
            return
        if key in _KINDS and str(value).lower() in _METHODS:
            kind = _METHODS[str(value).lower()]
            if kind != "lora" or not self.method:  # else it was said already which LoRA
                self.method = kind
                self.changed.append(f"{name}: {value} is method: {self.method}")
            if str(value).lower() == "qlora":
                self.settings["model.quantize"] = "nf4"
        elif key in ("use_dora", "peft_use_dora"):
            self._option_if(value, name, "dora")
        elif key in ("lora_target_linear",) and value:
            self.options["targets"] = "all-linear"
            self.changed.append(f"{name}: {value} is targets=all-linear in the method")
        elif key == "init_lora_weights" and value in ("pissa", "olora"):
            self._option_if(value, name, value)
        elif key == "init_lora_weights" and value == "loftq":
            self.options["start"] = value
            self.changed.append(f"{name}: {value} is start=loftq in the method")
        elif key == "prefix_projection":
            self.projected = bool(value)
        elif key in _OF_METHOD and value is not False:
            option = _OF_METHOD[key]
            self.options[option] = value.lower() if option == "encoder" else value
            self.changed.append(f"{name}: {_short(value)} is {option} in the method")
        elif key in ("quantization_bit", "load_in_bits") and str(value) in _BITS:
            self._set("model.quantize", _BITS[str(value)], name, value)
        elif key in _TEMPLATES and value not in _OWN_TEMPLATES and "{" not in value:
            self.left_out.append(f"{name}: {_short(value)} is left out: the base's own chat template is used")
        elif key == "init_lora_weights" or (value is False and known is not None and known.note):
            return  # how other tools say: as usual
        elif key in _PER_PART:
            self.rows_a_part = int(value)
        elif key in _COUNTS:
            self.warmup_count = int(value)
        elif key in _SHARES:
            self._share(name, value)
        elif known is not None and known.setting == "train.recompute" and isinstance(value, bool):
            if value:
                self._set("train.recompute", "blocks", name, value)
        elif key in ("bf16", "fp16"):
            if value and value != "auto":
                self._set("model.dtype", {"bf16": "bfloat16", "fp16": "float16"}[key], name, value)
        elif key in ("load_in_4bit", "load_in_8bit"):
            if value:
                self._set("model.quantize", "nf4" if "4" in key else "int8", name, value)
        elif key in ("optim", "optimizer"):
            chosen = _OPTIMIZERS.get(str(value).lower())
            if chosen:
                self._set("train.optimizer", chosen, name, value)
            else:
                self.left_out.append(f"{name}: {_short(value)} is left out: there is AdamW alone, in 32 or 8 bits")
        elif key in ("stage", "task_type") and str(value).lower() in _TASKS:
            self._set("task", _TASKS[str(value).lower()], name, value)
        elif known is not None and known.option:
            self.options[known.option] = _targets(value) if known.option == "targets" else value
            self.changed.append(f"{name}: {_short(value)} is {known.option} in the method")
        elif known is not None and not known.note and known.setting in SETTINGS:
            self._plain(known.setting, name, value)
        elif len(homes := [s for s in SETTINGS if s == key or s.rpartition(".")[2] == key]) == 1:
            self._plain(homes[0], name, value)
        else:
            why = "a fixed choice here" if key in NO_COUNTERPART else (known.note if known else "nothing here has it")
            self.left_out.append(f"{name}: {_short(value)} is left out: {why}")

    def given(self) -> dict[str, Any]:
        """The settings by dotted name."""
        parts = int(self.settings.get("train.accumulate", 1))
        if self.rows_a_part:
            self._set("train.batch", self.rows_a_part * parts, "rows a device", self.rows_a_part)
        if self.warmup_count:
            steps = self.settings.get("train.steps")
            if steps:
                self._set("train.warmup", round(self.warmup_count / steps, 4), "warmup_steps", self.warmup_count)
            else:
                self.left_out.append(
                    f"warmup_steps: {self.warmup_count} is left out: train.warmup is a share of the steps"
                )
        if self.settings.get("train.steps") and self.settings.get("train.epochs"):
            epochs = self.settings.pop("train.epochs")
            self.left_out.append(f"train.epochs: {epochs} is left out: train.steps says how long")
        if self.method or self.options:
            self.settings["method"] = self._text()
        return self.settings

    def _text(self) -> str:
        name = self.method or "lora"
        if not self.projected:
            self.options.pop("mlp", None)
        own = _OPTIONS.get(name, set())
        inner = ",".join(f"{key}={_option(value)}" for key, value in self.options.items() if key in own)
        if others := [key for key in self.options if key not in own]:
            ends = tuple(f" is {option} in the method" for option in others)
            self.changed = [line for line in self.changed if not line.endswith(ends)]
            self.left_out.append(f"{', '.join(others)}: left out: {name} has other options")
        return f"{name}({inner})" if inner else name

    def _option_if(self, value: Any, name: str, method: str) -> None:
        if value:
            self.method = method
            self.changed.append(f"{name}: {value} is method: {method}")

    def _plain(self, setting: str, name: str, value: Any) -> None:
        if setting == "train.schedule":
            value = _SCHEDULES.get(str(value), value)
        if setting in _DATA_PATHS:
            if isinstance(value, str) and "," in value and not Path(value).exists():
                value = [part.strip() for part in value.split(",")]
            several = value if isinstance(value, list) else [value]
            first = several[0]
            if len(several) > 1:
                self.left_out.append(f"{name}: {len(several) - 1} of {len(several)} are left out: one file a run")
            if isinstance(first, Mapping):
                rest = ", ".join(f"{key}: {_short(each)}" for key, each in first.items() if key != "path")
                if rest:
                    self.left_out.append(f"{name}: {rest} is left out: columns are recognised, or see data.map")
                first = first.get("path")
            value = first
            if isinstance(value, str) and not Path(value).suffix:
                self.left_out.append(f"{name}: {value} is a data set's name: here {setting} is a file with rows")
        if isinstance(value, str) and SETTINGS[setting].kind in ("a number", "a whole number"):
            value = float(value)  # 2e-4 without a dot is text in YAML 1.1
        if SETTINGS[setting].kind == "a whole number" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (Mapping, list)) or (SETTINGS[setting].kind == "text" and isinstance(value, bool)):
            self.left_out.append(f"{name}: {_short(value)} is left out: {setting} is {SETTINGS[setting].kind}")
            return
        if value in (-1, False) and SETTINGS[setting].default is None:
            return  # how other tools say: not given
        if setting == "train.steps" and value == -1:
            return
        if setting == "model.dtype":
            value = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}.get(str(value), value)
        self._set(setting, value, name, value)

    def _share(self, name: str, value: Any) -> None:
        if 0 < float(value) < 1:
            self._set("data.eval_share", float(value), name, value)
        else:
            self.left_out.append(f"{name}: {value} is left out: data.eval_share is a share of the rows, not a count")

    def _set(self, setting: str, value: Any, name: str, before: Any) -> None:
        self.settings[setting] = value
        if name != setting:
            self.changed.append(f"{name}: {_short(before)} is {setting}: {_short(value)}")


def _targets(value: Any) -> Any:
    if value == "all-linear" or value == "all":
        return "all-linear"
    return value.split(",") if isinstance(value, str) and "," in value else value


def _option(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_option(item) for item in value) + "]"
    if isinstance(value, str) and not value.replace("-", "").replace("_", "").isalnum():
        return repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"
