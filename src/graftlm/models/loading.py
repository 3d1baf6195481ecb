"""Loading base models: a folder, a hub id or the bundled base, ready for a task, with every fault named.

Local paths never touch the network. Weights are read from safetensors only, and no code from the model's folder runs
unless `trust_remote_code` says so.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftlm.errors import EnvironmentFault, Finding, ModelError
from graftlm.models.places import BUNDLED, resolve_base
from graftlm.models.placing import Placing
from graftlm.quantisation import Format, as_format

__all__ = [
    "HEADS", "generates", "head_of", "is_encoder", "load_base", "load_config", "load_tokenizer", "quiet",
]  # fmt: skip

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(
    name: str | Path = BUNDLED,
    *,
    task: str = "lm",
    labels: Sequence[str] | None = None,
    several: bool = False,
    dtype: str | torch.dtype = "auto",
    quantize: str | Format | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The base model and its tokenizer for `task` (see `head_of`), in evaluation mode.

    `name` is a folder, a hub id or "bundled". For `classify` and `tag`, `labels` names the classes (`several` of which
    a row may have); a new head is drawn from torch's global generator, so set the seed before. `dtype` "auto" is
    float32 on a CPU and the checkpoint's own type elsewhere. `quantize` (`nf4`, `fp4`, `int4`, `int8`, `int8-dynamic`,
    or a `Format`) packs the linear maps of the blocks one by one while they are read, so that the peak is the packed
    model and one weight; embeddings, norms and heads stay as they are. `device_map`, `max_memory` and `offload_folder`
    lay it out over devices and disk (see `Placing`), packed or not. Raises ModelError with what is wrong and the
    nearest right thing.

    Example:
        >>> model, tokenizer = load_base("bundled")                                # doctest: +SKIP
        >>> model, tokenizer = load_base("meta-llama/Llama-2-7b-hf", quantize="nf4")             # doctest: +SKIP
        >>> model, tokenizer = load_base("roberta-base", task="classify", labels=["no", "yes"])  # doctest: +SKIP
    """
    format = as_format(quantize) if quantize is not None else None
    if isinstance(dtype, str) and dtype not in ("auto", *_DTYPES):
        raise ModelError(Finding("M108", f"dtype {dtype!r}: want auto, {', '.join(_DTYPES)}", fix="dtype=auto"))
    if task in ("classify", "tag") and not labels:
        raise ModelError(Finding("M109", f"task {task} needs the names of its classes", fix="labels=[...]"))
    placing = Placing(device_map, max_memory, offload_folder, device=device)
    where = resolve_base(str(name))
    place = torch.device(device) if device is not None else _best_device()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if Path(where).is_dir():
        options["local_files_only"] = True

    import transformers

    from graftlm.quantisation.loading import load_quantized, settle  # with it transformers knows our storage

    config = load_config(where, **options)
    tokenizer = load_tokenizer(where, **options)
    if format is not None and (already := _how_quantised(config)):
        raise ModelError(
            Finding("M107", f"{name} is quantised already ({already}), and {format} is asked for", fix="quantize=null")
        )
    _check_package(str(name), config)
    head = head_of(task, config)
    kind: Any = getattr(transformers, HEADS[head])
    if head in _NEW:
        names = list(labels or ["score"])
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        kinds = {"classify": "multi_label_classification" if several else "single_label_classification"}
        config.problem_type = kinds.get(task, "regression" if head == "sequence" else None)
    if type(config) not in kind._model_mapping and not (trust_remote_code and hasattr(config, "auto_map")):
        raise ModelError(_no_such_head(str(name), config, task, head))
    if head == "seq2seq" and task not in _WRITTEN_APART:
        kind_ = type(config).__name__.removesuffix("Config")
        message = f"{name} ({kind_}) is an encoder-decoder; task {task} needs a causal base"
        raise ModelError(Finding("M113", message, fix="-m A_CAUSAL_BASE, or --task seq2seq"))
    if head == "causal" and is_encoder(config):
        raise ModelError(_no_such_head(str(name), config, task, head))

    if dtype == "auto":
        wanted = torch.float32 if place.type == "cpu" else (config.dtype or torch.float32)
    else:
        wanted = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    with quiet(), _explained(str(name)), placing:
        if format is not None:
            model, report = load_quantized(kind, where, config, format, dtype=wanted, **options, **placing.options)
        else:
            model, report = kind.from_pretrained(
                where,
                config=config,
                dtype=wanted,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and judged below
                **options,
                **placing.options,
            )
            settle(model)
        placing.settle(model, str(name))
    _check_loaded(str(name), model, report, head)
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere; only its embedding row must exist.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(Finding("M110", f"the tokenizer of {name} has no padding, end or unknown token"))
    if head == "masked" and tokenizer.mask_token_id is None:
        raise ModelError(Finding("M118", f"the tokenizer of {name} has no mask token", fix="an encoder such as BERT"))
    model.config.pad_token_id = tokenizer.pad_token_id
    if (vocabulary := len(tokenizer)) > model.get_input_embeddings().weight.shape[0]:
        rows = model.get_input_embeddings().weight.shape[0]
        raise ModelError(
            Finding("M111", f"the tokenizer of {name} has {vocabulary} tokens, the model's table {rows} rows")
        )
    model.eval()
    return (model if placing.options else model.to(place)), tokenizer


#: Encoders that transformers also lists as causal models; without being trained as such they cannot generate.
_ENCODERS = ("BertConfig", "RobertaConfig", "XLMRobertaConfig", "ElectraConfig", "CamembertConfig", "ModernBertConfig")


def generates(config: Any) -> bool:
    """Whether transformers has a language model for `config` that writes text token by token."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping and type(config).__name__ not in _ENCODERS


def _how_quantised(config: Any) -> str:
    """How the model's own configuration says that it is stored in fewer bits; empty where it is not."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return ""
    said = said if isinstance(said, dict) else said.to_dict()
    return str(said.get("format") or said.get("quant_method") or "some way")


#: How others call their storage, the package that reads it, and what installs that.
_READERS = {
    "bitsandbytes": ("bitsandbytes", "'graftlm[quantised]'"),
    "torchao": ("torchao", "'graftlm[quantised]'"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "aqlm": ("aqlm", "aqlm"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "auto-round": ("auto_round", "auto-round"),
}


def _check_package(name: str, config: Any) -> None:
    """Raise EnvironmentFault where the package that reads the model's storage is not installed."""
    said = getattr(config, "quantization_config", None)
    how = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    package, install = _READERS.get(str(getattr(how, "value", how)), ("", ""))
    try:
        missing = bool(package) and importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # the package around it
        missing = True
    if missing:
        message = f"{name} is stored as {_how_quantised(config)}, and {package}, which reads that, is not installed"
        raise EnvironmentFault(Finding("E110", message, fix=f"pip install {install}"))


#: Head to the class of transformers that has it.
HEADS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
}
#: Tasks whose answers an encoder-decoder can write, or find likely, after questions that it has read.
_WRITTEN_APART = ("choice", "dpo", "kto", "seq2seq", "tfew")
_NEW = ("sequence", "token")  # heads that no checkpoint of a base has: they are learnt with the adapter


def is_encoder(config: Any) -> bool:
    """Whether the model reads in both directions and writes nothing: BERT and its like."""
    return type(config).__name__ in _ENCODERS


def head_of(task: str, config: Any) -> str:
    """The head (a key of `HEADS`) that a model of this kind needs for the task.

    Encoders tell choices by a head that gives each answer one number; transformers' multiple-choice heads are the same
    map on the same vector.

    Example:
        >>> from types import SimpleNamespace
        >>> head_of("dpo", SimpleNamespace(is_encoder_decoder=False)), head_of("tag", None)
        ('causal', 'token')
    """
    if task in ("classify", "regress", "reward"):
        return "sequence"
    if task == "tag":
        return "token"
    if task == "mlm":
        return "masked"
    if task == "choice" and is_encoder(config):
        return "sequence"
    writes_from_encoder = getattr(config, "is_encoder_decoder", False) and task not in ("lm", "sft")
    return "seq2seq" if task == "seq2seq" or writes_from_encoder else "causal"


def load_config(where: str, **options: Any) -> Any:
    """The configuration of the model at `where`. Raises ModelError where it cannot be read or its kind is unknown."""
    from transformers import AutoConfig

    with quiet(), _explained(where):
        return AutoConfig.from_pretrained(where, **options)


def load_tokenizer(where: str, **options: Any) -> Any:
    """The tokenizer of the model at `where`. Raises ModelError where it has none."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        raise ModelError(Finding("M112", f"no tokenizer in {where}: {_first_line(error)}")) from error


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _no_such_head(name: str, config: Any, task: str, head: str) -> Finding:
    kind = type(config).__name__.removesuffix("Config")
    if head == "causal":
        can = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "mlm" if task == "lm" else "classify"
        message = f"{name} ({kind}) cannot generate text: it is not a causal language model"
        return Finding("M113", message, fix=f"--task {can}, or a causal base")
    wanted = {
        "masked": "masked language model",
        "seq2seq": "encoder-decoder",
        "sequence": "classification head",
        "token": "head for tokens",
    }[head]
    fixes = {"masked": "--task lm, or an encoder such as BERT", "seq2seq": "--task sft, or a base such as T5"}
    message = f"{name} ({kind}) has no {wanted} in transformers, as task {task} needs"
    return Finding("M113", message, fix=fixes.get(head, ""))


def _check_loaded(name: str, model: Any, report: dict[str, Any], head: str) -> None:
    """Only a new head may be missing; anything else missing or misshapen is not this model's checkpoint."""
    prefix = model.base_model_prefix + "."

    def needed(key: str) -> bool:
        return head not in _NEW or (key.startswith(prefix) and "pooler" not in key)

    missing = [key for key in report["missing_keys"] if needed(key)]
    misshapen = [entry[0] if isinstance(entry, tuple) else entry for entry in report.get("mismatched_keys") or []]
    faults = []
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        own = not any(key.startswith(prefix) for key in missing)
        fix = "a checkpoint that was trained with this head, or another --task" if own else ""
        faults.append(Finding("M114", f"{name}: the checkpoint lacks {shown}", fix=fix))
    faults += [Finding("M115", f"{name}: {key} has the wrong shape") for key in misshapen if needed(key)][:8]
    if faults:
        raise ModelError(faults)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EnvironmentFault(
            Finding("E101", f"{name} does not fit in memory", fix="a smaller model, or dtype bfloat16")
        ) from error
    except OSError as error:
        if Path(name).is_dir():
            raise ModelError(Finding("M116", f"cannot load {name}: {_first_line(error)}")) from error
        raise ModelError(
            Finding(
                "M117",
                f"{name!r} is no folder here, and the hub did not give it: {_first_line(error)}",
                fix="-m FOLDER",
            )
        ) from error
    except Exception as error:  # damaged files surface as many kinds of error
        if type(error).__name__ in ("SafetensorError", "JSONDecodeError", "ValueError", "KeyError", "RuntimeError"):
            raise ModelError(Finding("M116", f"cannot load {name}: {_first_line(error)}")) from error
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about new heads off the terminal; what matters is checked and said here."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    # A name that is on no hub is told once, not at every retry; that weights are on disk was asked for.
    others = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    levels = [each.level for each in others]
    for each in others:
        each.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        for each, level in zip(others, levels, strict=True):
            each.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
