"""Exports: an adapter as a merged model, a PEFT folder or ready for vLLM, read back and proven equal before it counts.

Whatever is written is loaded again from its files, and its logits on given rows are set against those of the adapter.
Where they differ by more than rounding the export is refused and nothing is left behind.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from graftlm.core import Adapter, in_eval_mode, use
from graftlm.core.kind import head_kind, is_encoder_decoder
from graftlm.errors import AdapterError, Finding, GraftError
from graftlm.formats.atomic import atomic_folder
from graftlm.formats.peft import load_adapter
from graftlm.models import load_base
from graftlm.models.loading import quiet
from graftlm.quantisation import merged_copy, quantized

__all__ = ["Exported", "Kind", "export_adapter"]

Kind = Literal["merged", "peft", "vllm"]

#: The largest ranks that vLLM can be started with (`--max-lora-rank`).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: What rounding may do to logits, as a share of their spread, by the base's number type.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Exported:
    """What was written where, and how it was proven: `difference` is the largest of any logit, over `rows` rows.

    `agreement` is the share of positions whose likeliest class or token is the same, `command` how to use it.
    """

    folder: Path
    kind: Kind
    difference: float
    agreement: float
    rows: int
    command: str


def export_adapter(
    adapter: Adapter,
    tokenizer: Any,
    folder: str | Path,
    *,
    to: Kind,
    rows: Sequence[Sequence[int]],
    base: str = "",
    labels: Sequence[str] | None = None,
    template: str | None = None,
    facts: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write the adapter that is attached to a model into `folder`, whole and proven, or not at all.

    Args:
        adapter: attached; its model is as it was afterwards.
        tokenizer: written beside a merged model.
        folder: must not be there yet.
        to: `merged` (one model without adapters), `peft` (PEFT's layout), `vllm` (the same, within vLLM's limits).
        rows: token ids of held-out rows, on which logits are compared.
        base: the name of the base, for the command.
        labels: the classes, for a classifier.
        template: a chat template that is written into a merged model's tokenizer.
        facts: kept beside a PEFT folder, as by `save_adapter`.
        tolerance: the largest difference allowed, as a share of the logits' standard deviation; by the number type.

    Raises AdapterError (A240 to A245) where it cannot be exported that way or what was written is another model,
    NotMergeable where the method has no merged form.

    Example:
        >>> export_adapter(adapter, tokenizer, "exports/support", to="merged", rows=rows)       # doctest: +SKIP
    """
    folder = Path(folder)
    if to not in get_args(Kind):
        raise AdapterError(Finding("A240", f"cannot export to {to!r}: there are {', '.join(get_args(Kind))}"))
    if folder.exists():
        raise AdapterError(Finding("A241", f"{folder} is there already", fix="another folder"))
    if not rows:
        raise AdapterError(Finding("A242", "no rows to prove the export on", fix="give some prompts"))
    model: Any = adapter.model
    wanted = _logits(model, rows, adapter.name)
    with atomic_folder(folder) as fresh:
        if to == "merged":
            _write_merged(adapter, tokenizer, fresh, template)
            found = _logits(_read_merged(fresh, model, labels), rows)
            writes = head_kind(type(model).__name__) in ("causal", "conditional")
            command = f"graftlm generate {shlex.quote(str(folder))} 'a prompt'" if writes else ""
        else:
            used, command = adapter.without_readers(), ""
            start = _vllm_start(used, folder, base) if to == "vllm" else ""
            used.save(fresh, facts=facts or {})
            _must_be_pefts(used, fresh)
            found = _read_adapter(fresh, model, rows)
            if to == "vllm":
                command = start + shlex.quote(str(folder))
                here = '"$(cd "$(dirname "$0")" && pwd)"'  # wherever it is called from, and moved to
                (fresh / "serve.sh").write_text(f"#!/bin/sh\nexec {start}{here}\n", encoding="utf-8")
        difference, agreement = _compared(wanted, found, model.dtype, tolerance, to)
    if to == "peft":
        command = f'PeftModel.from_pretrained(base, "{folder}")'
    return Exported(folder, to, difference, agreement, len(rows), command)


# --- writing ---


def _write_merged(adapter: Adapter, tokenizer: Any, fresh: Path, template: str | None) -> None:
    model: Any = adapter.model
    if any(quantized(model)):
        # In place the other maps would stay packed, and only graftlm could read the file.
        _save(merged_copy(model, [adapter.name]), fresh)
    else:
        adapter.merge()
        try:
            _save(model, fresh)
        finally:
            adapter.unmerge()
    written = copy.copy(tokenizer)
    if template is not None and not tokenizer.chat_template:
        written.chat_template = template
    written.save_pretrained(fresh)


def _save(model: Any, fresh: Path) -> None:
    """Write the model, with the switches of its class on that give a place to the biases that it has by now."""
    flags, zeros = _switches(model)
    before = {flag: getattr(model.config, flag) for flag in flags}
    try:
        for flag in flags:
            setattr(model.config, flag, True)
        with quiet():
            model.save_pretrained(fresh, **({"state_dict": {**model.state_dict(), **zeros}} if zeros else {}))
    finally:
        for flag, value in before.items():
            setattr(model.config, flag, value)


def _switches(model: Any) -> tuple[list[str], dict[str, Tensor]]:
    """The configuration's switches (`attention_bias`) under which the class has the model's biases.

    Beside them zeros for the biases that come with a switch and that the model has not.
    """
    flags: list[str] = []
    zeros: dict[str, Tensor] = {}
    switches = [key for key, value in model.config.to_dict().items() if key.endswith("bias") and value is False]
    held = set(model.state_dict())
    biases = {name for name in held if name.endswith(".bias")}
    if not switches or not biases:  # most exports: the class need not be asked
        return flags, zeros
    plain = _shapes(model, None)
    lacking = biases - set(plain)
    for flag in switches if lacking else ():
        new = {name: shape for name, shape in _shapes(model, flag).items() if name not in plain}
        if lacking & set(new):
            flags.append(flag)
            zeros |= {name: torch.zeros(shape, dtype=model.dtype) for name, shape in new.items() if name not in held}
    return flags, zeros


def _shapes(model: Any, flag: str | None) -> dict[str, torch.Size]:
    """The tensors that a model of this class and configuration has, with one of its switches on."""
    config = copy.deepcopy(model.config)
    if flag:
        setattr(config, flag, True)
    with torch.device("meta"), quiet():
        return {name: tensor.shape for name, tensor in type(model)(config).state_dict().items()}


def _must_be_pefts(adapter: Adapter, fresh: Path) -> None:
    kind = json.loads((fresh / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    if kind == "GRAFTLM":
        message = f"PEFT has no words for {adapter.method}: only graftlm reads such a folder"
        raise AdapterError(Finding("A243", message, fix="--to merged, or keep the run as it is"))


def _vllm_start(adapter: Adapter, folder: Path, base: str) -> str:
    """How vLLM is started with it, up to the folder. Raises AdapterError naming all that vLLM does not take."""
    faults = []
    ranks = []
    for part in adapter.method.parts:
        if part.name not in ("lora", "rslora", "loraplus"):
            faults.append(f"{part.name} (it reads LoRA alone)")
            continue
        ranks += [part.rank, *part.rank_pattern.values()]  # type: ignore[attr-defined]
        if part.bias:  # type: ignore[attr-defined]
            faults.append("biases of a LoRA")
    if ranks and max(ranks) > _VLLM_RANKS[-1]:
        faults.append(f"rank {max(ranks)} (at most {_VLLM_RANKS[-1]})")
    if faults:
        raise AdapterError(Finding("A244", f"vLLM does not take {', '.join(faults)}", fix="--to merged"))
    most = next(rank for rank in _VLLM_RANKS if rank >= max(ranks))
    name = "".join(c if c.isalnum() else "-" for c in folder.name)
    where = str(Path(base).resolve()) if base and Path(base).is_dir() else base or "BASE"
    start = ["vllm", "serve", where, "--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"{name}="]
    return shlex.join(start)


# --- reading back ---


#: The task for which `load_base` gives a model with this kind of head.
_TASKS = {"sequence": "regress", "token": "tag", "masked": "mlm", "conditional": "seq2seq"}


def _read_merged(fresh: Path, model: Any, labels: Sequence[str] | None) -> Any:
    task = _TASKS.get(head_kind(type(model).__name__) or "", "lm")
    if task == "regress" and labels:
        task = "classify"
    try:
        found, _ = load_base(fresh, task=task, labels=labels, dtype=model.dtype, device=model.device)
    except GraftError as error:
        raise _another("merged", f"it cannot be loaded: {error.findings[0].message}") from error
    return found


def _read_adapter(fresh: Path, model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    name = "graftlm-export-check"
    try:
        with use(model, None), _loaded(model, fresh, name):
            return _logits(model, rows, name)
    except AdapterError as error:
        raise _another("adapter", f"it cannot be loaded: {error.findings[0].message}") from error


@contextmanager
def _loaded(model: Any, folder: Path, name: str) -> Any:
    adapter = load_adapter(model, folder, name=name)
    try:
        yield
    finally:
        use(model, None)
        adapter.detach()


def _logits(model: Any, rows: Sequence[Sequence[int]], name: str | None = None) -> list[Tensor]:
    """The logits of each row by itself, in float32, with adapter `name` alone acting."""
    found = []
    call: Callable[..., Any] = model
    with in_eval_mode(model), torch.inference_mode():
        for row in rows:
            ids = torch.tensor([list(row)], device=model.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if is_encoder_decoder(model):
                inputs["decoder_input_ids"] = ids
            if name is None:
                outputs = call(**inputs)
            else:
                with use(model, name):
                    outputs = call(**inputs)
            found.append(outputs.logits[0].float().cpu())
    return found


def _compared(
    wanted: Sequence[Tensor], found: Sequence[Tensor], dtype: torch.dtype, tolerance: float | None, to: Kind
) -> tuple[float, float]:
    """The largest difference and the share of equal choices. Raises AdapterError where it is another model."""
    if any(one.shape != other.shape for one, other in zip(wanted, found, strict=True)):
        shapes = [tuple(tensors[0].shape) for tensors in (wanted, found)]
        raise _another(to, f"its logits have shape {shapes[1]}, the adapter's {shapes[0]}")
    difference = max(float((one - other).abs().max()) for one, other in zip(wanted, found, strict=True))
    spread = float(torch.cat([one.flatten() for one in wanted]).std())
    allowed = (tolerance if tolerance is not None else _TOLERANCE.get(dtype, 1e-3)) * max(spread, 1e-6)
    if not difference <= allowed:  # NaN is no agreement
        raise _another(
            to,
            f"its logits differ by up to {difference:.3g} on {len(wanted)} rows, and rounding explains {allowed:.3g}",
        )
    same = torch.cat([(one.argmax(-1) == other.argmax(-1)).flatten() for one, other in zip(wanted, found, strict=True)])
    return difference, float(same.float().mean())


def _another(what: str, why: str) -> AdapterError:
    fix = "keep the run as it is: graftlm reads it" if what == "merged" else "try again; if it stays, it is a defect"
    return AdapterError(Finding("A245", f"the export ({what}) is not the model that was trained: {why}", fix=fix))
