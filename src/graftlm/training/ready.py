"""What a run works with, before any weight is read: rows as tokens, method, tokenizer and configuration of the base.

Every fault of these is told at once. It takes torch and transformers, but nothing that trains or scores.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftlm.core import Method
from graftlm.data import Prepared, prepare
from graftlm.data.prepare import ONLINE
from graftlm.data.reading import read_rows
from graftlm.data.streaming import Source, prepare_streamed
from graftlm.data.tokenising import IGNORED
from graftlm.errors import EnvironmentFault, Finding, GraftError, MethodError, PlanError, SettingsError
from graftlm.evaluation.spans import need_span_metrics
from graftlm.methods import Value, read_method
from graftlm.models import head_of, is_encoder, load_config, load_tokenizer, resolve_base
from graftlm.models.placing import Placing
from graftlm.planning import Asked, Plan
from graftlm.planning.memory import available_bytes
from graftlm.planning.step import meta_model
from graftlm.settings import Resolved, RunSettings
from graftlm.training.decisions import decide_length, positions_taken, with_head, with_value
from graftlm.training.early import context_of, folder_of, length_faults, prompt_of, sources_of, test_of, waived
from graftlm.training.foresight import does_not_fit, foreseen
from graftlm.training.keeping import check_bottom
from graftlm.training.named_rewards import look_at_reward
from graftlm.training.optimizers import check_optimizer
from graftlm.training.starting import Start, on_its_base, start_of
from graftlm.training.tracking import need_tracker

__all__ = ["Ready", "asked_resolved", "check_resolved", "make_ready", "read_with"]

#: Bases whose attention tells packed texts apart by their positions.
_PACKS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma", "gemma2", "phi", "phi3", "olmo", "smollm3")
#: Architectures of which a checkpoint brings the head.
_HEADED = ("ForSequenceClassification", "ForTokenClassification")
#: The share of rows with another label than the commonest from which a regression is worth its while.
_RARE = 0.02
_NEEDS_MASK = ("prefix", "prompt", "ptuning", "attempt")


@dataclass(frozen=True)
class Ready:
    """What was read for a run of `settings`, all of it sound."""

    settings: RunSettings
    prepared: Prepared
    #: With a head where the task needs one.
    method: Method
    #: As it was written: a recipe is known by its own name and rate, without a head beside it.
    asked: Method
    config: Any
    tokenizer: Any
    #: The adapter that the run starts from; `method` begins with its parts.
    start: Start | None = None

    def step(self) -> Asked:
        """The run's largest step, to be planned. Raises PlanError where that cannot be told."""
        return foreseen(self.settings, self.config, self.prepared, self.method)

    def plan(self, step: Asked) -> Plan:
        """The plan of the step. Raises AdapterError (U149) where a method cannot go on top of the adapter."""
        try:
            return step.plan()
        except MethodError as error:
            if self.start is None or not self.start.kept or error.findings[0].code != "T105":
                raise
            raise self.start.alike(self.asked, error.findings[0].message.partition(": ")[2]) from None


def asked_resolved(resolved: Resolved) -> Asked:
    """The largest step of the run that `resolved` says, to be planned; nothing is trained or written.

    Raises as `make_ready` does.
    """
    return make_ready(resolved.settings, resolved.origin).step()


def check_resolved(resolved: Resolved) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """What is worth knowing and what must be mended before the run that `resolved` says; nothing is trained or written.

    Settings, data, method, base, memory, and the folder of the run.
    """
    notes: list[Finding] = []
    faults: list[Finding] = []
    try:
        folder_of(resolved.settings).check(resolved.settings, resume=False)
    except GraftError as error:
        faults += error.findings
    try:
        ready = make_ready(resolved.settings, resolved.origin)
        notes += ready.prepared.notes
        plan = ready.plan(ready.step())
        room = available_bytes(plan.device)
        if room and not plan.fits(room) and resolved.settings.model.device_map is None:
            raise EnvironmentFault(does_not_fit(plan, room))
    except PlanError as error:  # a base whose code does not run without values can be trained all the same
        notes += error.findings
    except GraftError as error:
        faults += error.findings
    return tuple(notes), tuple(faults)


def make_ready(settings: RunSettings, origin: Mapping[str, str]) -> Ready:
    """Data, method and base as `settings` say. Raises SettingsError with every fault of all three.

    `origin` says which settings were asked for; see `Resolved`.
    """
    faults: list[Finding] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except GraftError as error:
            faults.extend(error.findings)
            return None

    settings = attempt(lambda: on_its_base(settings, origin)) or settings
    model, data, train = settings.model, settings.data, settings.train
    method = attempt(lambda: read_method(settings.method))
    where = attempt(lambda: resolve_base(model.name))
    tokenizer = attempt(lambda: _tokenizer(settings, where)) if where else None
    path = attempt(lambda: sources_of(data))
    if tokenizer is None or path is None:
        if path is not None:
            for one in path if isinstance(path, dict) else (path,):  # faults that need no tokenizer
                if isinstance(one, Source):
                    attempt(one.head)
                else:
                    attempt(functools.partial(read_rows, one, data.format, data.max_rows))
        raise SettingsError(faults)
    config, tokenizer = tokenizer
    start: Start | None = None
    if settings.start is not None and not faults:
        start = attempt(lambda: start_of(settings, origin, lambda: _twin(settings, config)))
    asked = start.method if start is not None and not start.kept else method
    method = start.method + method if start is not None and start.kept and method else asked
    taken = positions_taken(method) if method else 0
    context = context_of(config)
    faults += length_faults(train.max_length, context, taken, settings.method)
    if context <= taken:
        raise SettingsError(faults)
    prepared: Prepared | None = attempt(
        lambda: read_with(
            settings,
            path,
            tokenizer,
            train.max_length or decide_length(config, method),
            config,
            eval_path=data.eval_path,
            **(start.known(settings) if start is not None else {}),
        )
    )
    if prepared is not None and prepared.task in ONLINE:
        known = prepared.reading.known
        attempt(lambda: look_at_reward(settings.reinforcement.reward, known))
        faults += [
            Finding(
                "T122",
                f"{part} looks at answers before training, and rows of {prepared.task} have none yet",
                fix=f"--method {'sparse(score=magnitude)' if part.name == 'sparse' else 'lora'}",
            )
            for part in (method.parts if method is not None else ())
            if part.needs_samples
        ]
    if prepared is not None and prepared.task == "tag":
        attempt(need_span_metrics)
    attempt(lambda: waived(data.waive))
    attempt(lambda: Placing(model.device_map, model.max_memory or None, model.offload_folder))
    attempt(lambda: check_optimizer(train.optimizer))
    if faults or prepared is None or method is None:
        raise SettingsError(faults)
    need_tracker(train.track)
    if not prepared.eval:
        raise SettingsError(Finding("U133", "no rows are left for evaluation", fix="--set data.eval_share=0.2"))
    if prepared.task == "tfew" and start is None and origin.get("method", "default") == "default":
        asked = method = read_method("ia3")  # as in the paper
    _check_packing(settings, prepared, method, config)
    headed = method
    if head_of(prepared.task, config) in ("sequence", "token"):
        headed = with_head(method, "base" if start is not None else _start_of_head(prepared, config))
    if prepared.task == "ppo":
        headed = with_value(method)
    elif any(isinstance(part, Value) for part in method.parts):
        message = f"a value head is trained by ppo alone, and the task is {prepared.task}"
        raise SettingsError(Finding("U146", message, fix="--task ppo, or leave +value out of --method"))
    if train.cache_bottom:
        check_bottom(settings, prepared, headed, config, folder_of(settings).path)
    return Ready(settings, prepared, headed, asked, config, tokenizer, start)


def _start_of_head(prepared: Prepared, config: Any) -> str:
    """How a new head starts: by a regression on training rows where they have classes, and the base brings no head.

    From a head drawn anew some methods tell one class for all rows: on 800 rows of WNUT-17 LoRA finds no span (F1 0),
    and from a regression 0.49, where full fine-tuning has 0.35. Of several labels a row LoRA has a micro-F1 of 0.76
    from a regression and 0.69 without (640 rows of E2E, 100 steps, three seeds); numbers (SICK) gain nothing by it.
    """
    brought = any(str(name).endswith(_HEADED) for name in getattr(config, "architectures", None) or ())
    if brought or prepared.labels is None or prepared.task not in ("classify", "tag"):
        return "base"
    if prepared.labels.several:
        return "probe" if len({tuple(item["labels"]) for item in prepared.train}) > 1 else "base"
    seen = [set(item["labels"]) - {IGNORED} if prepared.task == "tag" else {item["labels"]} for item in prepared.train]
    commonest, _ = Counter(label for labels in seen for label in labels).most_common(1)[0]
    others = sum(bool(labels - {commonest}) for labels in seen)
    # As many that those which are looked at hold some, however they are drawn.
    return "probe" if others >= max(2, _RARE * len(seen)) else "base"


def _check_packing(settings: RunSettings, prepared: Prepared, method: Method, config: Any) -> None:
    """Raise SettingsError where texts in one row would see one another, or packing would do nothing."""
    if not settings.train.packing:
        return
    faults = []
    if prepared.task not in ("lm", "sft"):
        faults.append(f"rows of task {prepared.task} cannot be packed, only texts and answers")
    if any(part.context_taken or part.name in _NEEDS_MASK for part in method.parts):
        faults.append(f"{method} adds virtual tokens, which need a mask of their own")
    if getattr(config, "model_type", "") not in _PACKS:
        faults.append(f"in a {config.model_type} base packed texts could see one another")
    if faults:
        raise SettingsError([Finding("U136", fault, fix="--set train.packing=false") for fault in faults])


def _twin(settings: RunSettings, config: Any) -> Any:
    """The base without values, for the task that was asked for."""
    task = settings.task
    if task == "auto":
        task = "classify" if is_encoder(config) else "seq2seq" if getattr(config, "is_encoder_decoder", False) else "lm"
    return meta_model(config, task, torch.float32)


def _tokenizer(settings: RunSettings, where: str) -> tuple[Any, Any]:
    options: dict[str, Any] = {
        "revision": settings.model.revision,
        "trust_remote_code": settings.model.trust_remote_code,
    }
    if Path(where).is_dir():
        options["local_files_only"] = True
    config = load_config(where, **options)
    return config, load_tokenizer(where, **options)


def read_with(
    settings: RunSettings,
    path: Path | Mapping[str | Path, float] | Source,
    tokenizer: Any,
    max_length: int | None,
    config: Any,
    *,
    eval_path: Any,
    **known: Any,
) -> Prepared:
    """The rows as the settings say, for a base of this configuration; `known` is what a finished run has decided."""
    data = settings.data
    options: dict[str, Any] = {"task": settings.task, "template": data.template, "packing": settings.train.packing}
    options["prompt"] = prompt_of(settings)
    options |= known
    if options["task"] in ONLINE and max_length is not None:
        room = max_length - settings.generate.max_new_tokens
        if room < 2:
            message = f"answers of {settings.generate.max_new_tokens} tokens leave no room in {max_length} for a prompt"
            raise SettingsError(Finding("U143", message, fix=f"--set generate.max_new_tokens={max_length // 2}"))
        max_length = room
    options |= {
        "eval_path": eval_path,
        "format": data.format,
        "mapping": data.map,
        "test": test_of(data),
        "drop_bad_rows": data.drop_bad_rows,
        "tokenizer": tokenizer,
        "max_length": max_length,
        "seed": settings.train.seed,
        "waived": {code.strip() for code in (data.waive or "").split(",")},
        **kind_of(config),
    }
    if isinstance(path, Source):
        return prepare_streamed(path, buffer=data.buffer, **options)
    return prepare(
        path,
        eval_share=data.eval_share,
        group=data.group,
        max_rows=data.max_rows,
        merge_labels=data.merge_labels,
        **options,
    )


def kind_of(config: Any) -> dict[str, Any]:
    """What `prepare` must know of the base: which tasks it does in place of others, and how it reads questions."""
    encoder, apart = is_encoder(config), bool(getattr(config, "is_encoder_decoder", False))
    # With `auto`, what this kind of base can do with such rows.
    does = {"lm": "mlm"} if encoder else {"sft": "seq2seq"} if apart else {}
    return {"instead": does, "by_head": encoder, "apart": apart}
