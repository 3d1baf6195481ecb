"""The plan of a training step: memory by term and by phase, trained parameters, operations; known before any run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftlm.core import Method
from graftlm.errors import Finding, GraftError, ModelError, PlanError
from graftlm.kernels import Recompute
from graftlm.methods import read_method
from graftlm.models import load_config, resolve_base
from graftlm.models.loading import generates
from graftlm.planning.memory import RUNTIME_BYTES, memory_bytes, said, workspace_bytes
from graftlm.planning.stacking import traced as traced_of
from graftlm.planning.step import Shape, Traced, like

if TYPE_CHECKING:
    from graftlm.planning.fitting import Fitting

__all__ = ["TERMS", "Asked", "Plan", "asked", "config_of", "most_bytes", "plan"]

TERMS = ("weights", "quantisation", "deltas", "gradients", "optimizer", "activations", "logits", "runtime")
"""What memory goes to, in the order in which it is shown."""

#: What an allocator holds between blocks on CUDA: a share of what a step allocates, a rule of thumb.
_HELD_SHARE = 0.05

#: Tasks of which a row has two answers.
_PAIRS = ("dpo", "reward")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What one training step takes; `print` shows it.

    `terms` are bytes by name and sum up to `total_bytes`, the most that the process holds at any moment. `activations`
    are what is needed on top of the rest at that moment: gradients take the place of activations as the backward pass
    goes on, so they are counted in full and not twice. `phases` are the peaks of forward, backward, optimizer and
    evaluation. `flops` are the floating-point operations of one optimizer step, all its parts together (a
    multiplication and an addition are two). `adapter_bytes` is the size of the adapter's file. `fitting` is what fits
    into the memory that was asked about, and None where none was.
    """

    base: str
    method: str
    task: str
    shape: Shape
    accumulate: int
    device: str
    terms: Mapping[str, int]
    phases: Mapping[str, int]
    parameters: int
    trainable: int
    trainable_by_role: Mapping[str, int]
    flops: int
    adapter_bytes: int
    traced: Traced
    fitting: Fitting | None = None
    #: Of the base's weights, what lies on disk or on another device (`max_memory`).
    elsewhere_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The most memory that the process holds."""
        return sum(self.terms.values())

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.shape.rows * self.shape.length * self.accumulate

    def fits(self, memory: str | float) -> bool:
        """Whether all of it fits into `memory`: bytes, or a text such as "24GB"."""
        return self.total_bytes <= memory_bytes(memory)

    def line(self, memory: str | float | None = None) -> str:
        """The memory in one line, small terms together."""
        rest = self.total_bytes - self.terms["weights"] - self.terms["activations"] - self.terms["optimizer"]
        parts = [(name, self.terms[name]) for name in ("weights", "activations", "optimizer")] + [("other", rest)]
        inner = ", ".join(f"{name} {said(size)}" for name, size in parts)
        return f"needs {said(self.total_bytes)} ({inner})" + (f" of {said(memory_bytes(memory))}" if memory else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "base": self.base,
            "method": self.method,
            "task": self.task,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "quantize": self.shape.quantize,
            "batch": self.shape.rows * self.accumulate,
            "accumulate": self.accumulate,
            "length": self.shape.length,
            "recompute": self.shape.recompute,
            "device": self.device,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "trainable_by_role": dict(self.trainable_by_role),
            "adapter_bytes": self.adapter_bytes,
            "total_bytes": self.total_bytes,
            "terms": dict(self.terms),
            "phases": dict(self.phases),
            "flops": self.flops,
            "elsewhere_bytes": self.elsewhere_bytes,
        } | (self.fitting.to_dict() if self.fitting else {})

    def _rows(self) -> list[tuple[str, str, str]]:
        total = max(self.total_bytes, 1)
        rows = [(name, said(size), f"{100 * size / total:.1f} %") for name, size in self.terms.items() if size]
        return [*rows, ("total", said(self.total_bytes), "")]

    def _head(self) -> list[str]:
        dtype = str(self.shape.dtype).removeprefix("torch.") + (
            f", {self.shape.quantize}" if self.shape.quantize else ""
        )
        rows = f"{self.shape.rows} rows" + (f" x {self.accumulate} parts" if self.accumulate > 1 else "")
        share = float(f"{100 * self.trainable / max(self.parameters, 1):.2g}")
        where = ", ".join(f"{role} {count:,}" for role, count in list(self.trainable_by_role.items())[:8])
        return [
            f"{self.base}  {self.parameters:,} parameters  {dtype}  {self.device}",
            f"{self.method}  {self.trainable:,} trainable ({share:g} %)  adapter file {said(self.adapter_bytes)}",
            f"  trained: {where}" if where else "",
            f"  {said(self.elsewhere_bytes)} of the base on disk or another device" if self.elsewhere_bytes else "",
            f"a step of {rows} x {self.shape.length:,} tokens: {self.flops / 1e12:,.3g} TFLOP"
            + (f"  {self.shape.recompute} recomputed" if self.shape.recompute != "none" else ""),
        ]

    def _tail(self) -> str:
        peaks = "peaks    " + "  ".join(f"{name} {said(size)}" for name, size in self.phases.items())
        return f"{peaks}\n{self.fitting}" if self.fitting else peaks

    def __str__(self) -> str:
        lines = [line for line in self._head() if line]
        lines += [f"  {name:<13}{size:>9}  {share:>7}".rstrip() for name, size, share in self._rows()]
        return "\n".join([*lines, self._tail()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column()
        table.add_column(justify="right")
        table.add_column(justify="right", style="dim")
        for name, size, share in self._rows():
            table.add_row(name, size, share, style="bold" if name == "total" else "")
        return Group(*(Text(line) for line in self._head() if line), table, Text(self._tail()))


def plan(
    base: Any = "bundled",
    method: str | Method = "lora(rank=16,targets=all-linear)",
    *,
    dtype: str | torch.dtype = "auto",
    batch: int = 1,
    accumulate: int = 1,
    length: int = 512,
    task: str = "auto",
    classes: int = 2,
    recompute: Recompute = "none",
    quantize: str | None = None,
    optimizer: str = "adamw",
    labelled: float = 1.0,
    evaluation_rows: int = 0,
    device: str = "cpu",
    memory: str | float | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What a training step takes, from the base's configuration alone: no weights are read, no memory is needed.

    `base` is a folder (config.json is enough), a config.json, a hub id, "bundled", a transformers configuration or a
    dict of one. `batch` rows of `length` tokens make an optimizer step, computed in `accumulate` parts; `labelled` is
    the share of the tokens that the loss reads; `recompute` says what is computed twice to hold less, as in training.
    `optimizer` is `adamw` or one of the others of a run (`train.optimizer`).
    `dtype` "auto" is float32 on a CPU, elsewhere the checkpoint's own. `device` is "cpu" or "cuda": one that is meant,
    not one that must be there. With `memory`, bytes or a text such as "24GB", the plan's `fitting` tells what of this
    and of its cheaper forms fits into so much, and the largest batch, length and rank; that takes some twenty plans.
    `max_memory` says how much of the base each device is to hold ("cpu", or the number of a GPU), as in training with a
    device map: the rest is elsewhere and fetched for a block at a time, where blocks are computed anew
    (`recompute="blocks"`); otherwise what a forward pass has fetched is kept for the backward, and nothing is saved.

    Raises ModelError, MethodError, SiteError and PlanError with everything that is wrong.

    Example:
        >>> from graftlm import plan
        >>> found = plan("bundled", "lora(rank=8)", batch=4, length=128)
        >>> found.trainable, found.fits("2GB")
        (71680, True)
        >>> found = plan("bundled", "lora(rank=8)", batch=4, length=128, memory="2GB")
        >>> found.fitting.fits, found.fitting.options[1].changes
        (True, '--set train.recompute=feedforward')
    """
    room = memory_bytes(memory) if memory is not None else None
    step = asked(
        base, method, dtype=dtype, batch=batch, accumulate=accumulate, length=length, task=task, classes=classes,
        recompute=recompute, quantize=quantize, optimizer=optimizer, labelled=labelled,
        evaluation_rows=evaluation_rows, device=device, max_memory=max_memory, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return step.plan() if room is None else step.plan_within(room)


def asked(
    base: Any,
    method: str | Method,
    *,
    dtype: str | torch.dtype = "auto",
    batch: int = 1,
    accumulate: int = 1,
    length: int = 512,
    task: str = "auto",
    classes: int = 2,
    recompute: Recompute = "none",
    quantize: str | None = None,
    optimizer: str = "adamw",
    labelled: float = 1.0,
    evaluation_rows: int = 0,
    device: str = "cpu",
    max_memory: Mapping[Any, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Asked:
    """What `plan` plans, checked. Raises ModelError, MethodError and PlanError."""
    wanted = read_method(method) if isinstance(method, str) else method
    config = config_of(base, revision=revision, trust_remote_code=trust_remote_code)
    _check(batch, accumulate, length, labelled, dtype, device)
    kind = dtype
    if kind == "auto":
        kind = torch.float32 if device == "cpu" else (getattr(config, "dtype", None) or torch.float32)
    shape = Shape(
        on_processor=device == "cpu",
        rows=batch // accumulate,
        length=length,
        dtype=_DTYPES[kind] if isinstance(kind, str) else kind,
        recompute=recompute,
        quantize=quantize,
        optimizer=optimizer,
        labelled=labelled,
        evaluation_rows=evaluation_rows,
    )
    if task == "auto":
        task = "lm" if generates(config) else "classify"
    if task in _PAIRS:
        shape = replace(shape, rows=2 * shape.rows)
    return Asked(
        config,
        wanted,
        like(task, config),
        shape,
        name=_name_of(base, config),
        accumulate=accumulate,
        device=device,
        classes=classes,
        most_bytes=most_bytes(max_memory, device),
    )


@dataclass(frozen=True)
class Asked:
    """What is planned: a step of `shape` on the model of `config`, computed `accumulate` times for an optimizer step.

    `method` None trains nothing; only the forward pass is planned. Of a run, `steps` is how many optimizer steps it
    takes (0: not told), and `mean_share` how large they are in the mean, as a share of this one, its largest.
    `most_bytes` is how much of the base the device is to hold (None: all of it).
    """

    config: Any
    method: Method | None
    task: str
    shape: Shape
    name: str = ""
    accumulate: int = 1
    device: str = "cpu"
    classes: int = 2
    steps: int = 0
    mean_share: float = 1.0
    most_bytes: int | None = None

    def plan(self) -> Plan:
        """The plan. Raises PlanError where the model's code does not run without values."""
        name, method, shape = self.name or type(self.config).__name__.removesuffix("Config"), self.method, self.shape
        try:
            traced = traced_of(self.config, method, self.task, shape, classes=self.classes)
        except GraftError:
            raise
        except Exception as error:  # any model code may refuse to run without values
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise PlanError(Finding("P102", f"a step of {name} ({self.task}) cannot be planned: {why}")) from error
        highest = max(peak.total() for phase, peak in traced.peaks.items() if phase != "rest")
        every = {one for found in traced.operations.values() for one in found}
        if self.device == "cpu":
            held = workspace_bytes(every, unpacked=shape.quantize is not None)
        else:
            held = int(_HELD_SHARE * (highest - traced.sizes["weights"]))
        runtime = RUNTIME_BYTES[self.device] + held
        phases = {phase: peak.total() for phase, peak in traced.peaks.items() if phase != "rest"}
        if self.accumulate > 1:  # from the second part on, the gradients of the first are there
            phases["forward"] += traced.sizes["gradients"]
        peak = max(phases, key=lambda phase: phases[phase])
        terms = dict.fromkeys(TERMS, 0) | dict(traced.sizes)
        if method is None:
            terms["gradients"] = 0
        room = phases[peak] - sum(terms.values())
        base_bytes = terms["weights"] + terms["quantisation"]
        # What is fetched for a forward is kept for the backward, unless blocks are computed anew.
        goes = method is None or shape.recompute == "blocks"
        held_bytes = self.most_bytes + traced.largest_bytes if self.most_bytes is not None and goes else base_bytes
        elsewhere = max(0, base_bytes - held_bytes)
        terms["weights"] = max(0, terms["weights"] - elsewhere)
        terms["logits"] = max(0, min(room, traced.peaks[peak]["logits"]))
        terms["activations"] = max(0, room - terms["logits"])
        return Plan(
            base=name,
            method=str(method) if method else "none",
            task=self.task,
            shape=shape,
            accumulate=self.accumulate,
            device=self.device,
            terms=terms | {"runtime": runtime},
            phases={phase: size + runtime - elsewhere for phase, size in phases.items()},
            parameters=traced.parameters,
            trainable=traced.trainable,
            trainable_by_role=traced.trained_by_role,
            flops=sum(traced.flops[phase] for phase in ("forward", "backward")) * self.accumulate,
            adapter_bytes=traced.adapter_bytes,
            traced=traced,
            elsewhere_bytes=elsewhere,
        )

    def plan_within(self, memory: str | float) -> Plan:
        """The plan with what fits into `memory` as its `fitting`. Raises as `plan`, and PlanError for no amount."""
        from graftlm.planning.fitting import fitting  # which is built on plans

        found = fitting(self, memory)
        return replace(found.asked, fitting=found)


def most_bytes(max_memory: Mapping[Any, Any] | None, device: str) -> int | None:
    """How much of a base `device` is to hold, by such sizes; None where they do not say.

    Example:
        >>> most_bytes({"cpu": "1GiB", "0": "2GB"}, "cuda"), most_bytes({}, "cpu")
        (2000000000, None)
    """
    names = ("cpu",) if device == "cpu" else ("0", 0, "cuda:0")
    sizes = [size for name, size in (max_memory or {}).items() if name in names]
    return memory_bytes(sizes[0]) if sizes else None


def config_of(base: Any, **options: Any) -> Any:
    """The configuration that `base` means; a folder needs its config.json only. Raises ModelError."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(base, PreTrainedConfig):
        return base
    if isinstance(base, Mapping):
        try:
            return AutoConfig.for_model(**base)
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(
                Finding("M116", f"cannot read the configuration: {error}", fix="model_type=...")
            ) from error
    path = Path(base).expanduser()
    if path.is_file() and path.suffix == ".json":
        try:
            return config_of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(Finding("M116", f"cannot read {path}: {error}")) from error
    where = str(path) if (path / "config.json").is_file() else resolve_base(str(base))
    if Path(where).is_dir():
        options["local_files_only"] = True
    return load_config(where, **options)


def _name_of(base: Any, config: Any) -> str:
    if isinstance(base, (str, Path)):
        return str(base)
    return str(getattr(config, "_name_or_path", "")) or type(config).__name__.removesuffix("Config")


def _check(batch: int, accumulate: int, length: int, labelled: float, dtype: Any, device: str) -> None:
    faults = [
        Finding("P104", f"{name} is {value}: want a whole number from 1", fix=f"{name}=1")
        for name, value in (("batch", batch), ("accumulate", accumulate), ("length", length))
        if not isinstance(value, int) or value < 1
    ]
    if not faults and batch % accumulate:
        faults.append(Finding("P104", f"batch {batch} cannot be cut into {accumulate} equal parts", fix="accumulate=1"))
    if not 0 < labelled <= 1:
        faults.append(Finding("P104", f"labelled is {labelled}: want a share above 0, at most 1", fix="labelled=1"))
    if isinstance(dtype, str) and dtype not in ("auto", *_DTYPES):
        faults.append(Finding("M108", f"dtype {dtype!r}: want auto, {', '.join(_DTYPES)}", fix="dtype=auto"))
    if device not in RUNTIME_BYTES:
        faults.append(Finding("P104", f"device {device!r}: want {' or '.join(RUNTIME_BYTES)}", fix="device=cpu"))
    if faults:
        raise PlanError(faults)
