"""One run from settings to a finished folder: read, check, decide, train, evaluate, write down.

Everything that can be wrong is looked for before anything expensive starts: data, method, base, folder and disk.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

import graftlm
from graftlm.core import Adapter, Method, attach, parameter_count, summary, use
from graftlm.data import MaskingCollator, Prepared
from graftlm.data.collating import length_of
from graftlm.data.prepare import ONLINE
from graftlm.data.reading import Rejected
from graftlm.data.tokenising import Cut, histogram
from graftlm.errors import EnvironmentFault, Finding, GraftError, PlanError, RunError, SettingsError
from graftlm.evaluation import losses
from graftlm.formats import load_adapter
from graftlm.kernels import FrozenBottom, bottom_of
from graftlm.models import (
    BUNDLED,
    fingerprint,
    load_base,
)
from graftlm.objectives import OBJECTIVES, Reference
from graftlm.planning import said_time, time_of
from graftlm.planning.memory import available_bytes
from graftlm.report import write_card, write_report
from graftlm.settings import Resolved, RunSettings, dump, recorded, resolve
from graftlm.settings.calls import call_as_text
from graftlm.training import checkpoint, processes
from graftlm.training.callbacks import Interrupt, OtherTokensEachEpoch
from graftlm.training.decisions import (
    decide_epochs,
    decide_learning_rate,
    decide_learning_rates,
    decide_length,
    decide_updates,
    learning_rate_range_of,
    positions_taken,
    title_of,
)
from graftlm.training.early import context_of, folder_of, sources_of
from graftlm.training.environment import environment, peak_memory_bytes
from graftlm.training.folder import RunFolder, free_folder, lines_of, resolved_of, standing
from graftlm.training.foresight import does_not_fit
from graftlm.training.keeping import kept_bytes
from graftlm.training.opening import Opened
from graftlm.training.optimizers import named_for_trainer
from graftlm.training.order import Streamed
from graftlm.training.progress import Progress, Voice, clock
from graftlm.training.ready import Ready, make_ready, read_with
from graftlm.training.remaining import Remaining, tokens_of_steps
from graftlm.training.rewards import Reward as RewardFunction
from graftlm.training.rewards import read_reward
from graftlm.training.scoring import write_samples
from graftlm.training.starting import attach_start
from graftlm.training.tasks import Learnt, score_line, written_to
from graftlm.training.tracking import tensorboard_callback
from graftlm.training.trainer import GraftTrainer

__all__ = ["Run", "held_out_of", "train", "train_resolved"]

_EVAL_ROWS_WHILE_TRAINING = 200
_REWARDED_WHILE_TRAINING = 64
_ROWS, _REJECTED = "data/rows.jsonl", "data/rejected.jsonl"
_CUT = "data/cut.jsonl"
#: Operations from which on it is worth a few seconds to learn how fast the device is.
_WORTH_A_CLOCK = 20e12
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class Run:
    """A finished (or stopped) run: its folder, its scores, and the model as it was left."""

    folder: Path
    record: Mapping[str, Any]
    model: Any
    tokenizer: Any
    adapter: Adapter

    @property
    def metrics(self) -> dict[str, Any]:
        """The adapter's scores on the held-out rows."""
        scores = self.record["results"].get("scores", [])
        return {k: v for k, v in scores[0].items() if k not in ("name", "title")} if scores else {}

    @property
    def task(self) -> str:
        """What was learnt, one of `graftlm.training.tasks.TASKS`."""
        return str(self.record["task"])

    @property
    def report(self) -> Path:
        """The page that tells the run."""
        return self.folder / "report.html"


def train(
    data: str | Path | Iterable[Mapping[str, Any]] | None = None,
    *,
    base: str | Path | None = None,
    method: str | Method | None = None,
    task: str | None = None,
    output: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train an adapter on `data` and leave a run folder with adapter, scores and report.

    `data` is a file, or an iterable of rows (dicts), or None for the bundled messages; `base` a folder, a hub id or
    "bundled". `settings` are those of the run file's sections by their own names: `epochs=3`, `learning_rate=2e-4`,
    `max_length=512`, `eval_share=0.1`, or by dotted name in a dict: `**{"data.map": {...}}`. `reward` may be a function
    of prompt, answer and row.
    Raises GraftError with everything that is wrong, before training starts.

    Example:
        >>> run = train("tickets.csv", method="lora(rank=8)", epochs=3)     # doctest: +SKIP
        >>> run.metrics["macro_f1"], run.folder                             # doctest: +SKIP
    """
    from graftlm.settings import SETTINGS

    called = {"data": data, "base": base, "method": method, "task": task, "output": output, "config": config}
    command = call_as_text("graftlm.train", called | settings)
    given: dict[str, Any] = {}
    function = None
    if callable(settings.get("reward")):
        function = settings.pop("reward")
        settings["reward"] = f"python:{getattr(function, '__qualname__', type(function).__name__)}"
    for name, value in settings.items():
        found = [full for full, setting in SETTINGS.items() if name in (full, setting.key)]
        given[found[0] if len(found) == 1 else name] = value
    rows = None
    if data is not None and not isinstance(data, (str, Path)):
        rows, data = list(data), None
    for name, value in (("data.path", data), ("model.name", base), ("task", task), ("output", output)):
        if value is not None:
            given[name] = str(value)
    if method is not None:
        given["method"] = str(method)
    resolved = resolve(file=Path(config) if config else None, python=given)
    return train_resolved(resolved, resume=resume, command=command, quiet=quiet, rows=rows, reward=function)


def train_resolved(
    resolved: Resolved,
    *,
    resume: bool = False,
    command: str = "",
    quiet: bool = False,
    rows: list[Mapping[str, Any]] | None = None,
    reward: RewardFunction | None = None,
) -> Run:
    """Train as `resolved` says; see `train`."""
    settings = resolved.settings
    processes.begin()
    if resume and settings.output is None:
        raise SettingsError(Finding("U131", "--resume needs the run's folder", fix="--resume -o runs/NAME"))
    if resume and all(origin == "default" for name, origin in resolved.origin.items() if name != "output"):
        # `graftlm train --resume -o FOLDER`: the settings are those of the run itself.
        resolved = resolved_of(RunFolder(str(settings.output)).record)
        settings = resolved.settings.model_copy(update={"output": settings.output})
    voice = Voice(quiet=quiet or not processes.is_main())
    folder = folder_of(settings) if settings.output or rows is None else RunFolder(free_folder("rows"))
    folder = RunFolder(processes.agreed(folder.path), writes=processes.is_main())
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    try:
        if rows is not None:
            settings = _with_rows(settings, folder, rows)
        return _Work(settings, resolved.origin, folder, voice, command, resume, reward).run()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EnvironmentFault(
            Finding(
                "E101",
                "memory ran out while training",
                fix=f"--set train.accumulate={settings.train.accumulate * 2} or --max-length "
                f"{(settings.train.max_length or 512) // 2}",
            )
        ) from error
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        fix = f"free some space, then --resume -o {folder.path}"
        raise EnvironmentFault(Finding("E104", f"cannot write to {folder.path}: {error.strerror}", fix=fix)) from error
    finally:
        if rows is not None and folder.writes and not folder.record_path.exists():  # no run came of it
            (folder.path / _ROWS).unlink(missing_ok=True)
            for empty in (folder.path / "data", folder.path):
                with contextlib.suppress(OSError):
                    empty.rmdir()


def _with_rows(settings: RunSettings, folder: RunFolder, rows: list[Mapping[str, Any]]) -> RunSettings:
    """The rows given from Python become a file of the run, so that the run can be told and repeated."""
    place = folder.path / _ROWS
    if not folder.record_path.exists():
        folder.path.joinpath("data").mkdir(parents=True, exist_ok=True)
        folder.write_lines(_ROWS, rows)
        processes.wait()
    elif not place.exists() or place.read_text(encoding="utf-8") != lines_of(rows):
        fresh = free_folder(folder.path.name, parent=folder.path.parent)
        raise RunError(Finding("U103", f"{folder.path} holds a run of other rows", fix=f"output={str(fresh)!r}"))
    data = settings.data.model_copy(update={"path": str(place)})
    return settings.model_copy(update={"data": data, "output": str(folder.path)})


def _check_processes(settings: RunSettings) -> None:
    """Raise SettingsError (U110) for what several processes cannot do together."""
    several, train = processes.count(), settings.train
    micro = train.batch // train.accumulate
    faults = []
    if micro % several:
        batch = -(-micro // several) * several * train.accumulate
        message = f"{micro} rows at once cannot be divided among {several} processes"
        faults.append(Finding("U110", message, fix=f"--batch {batch}"))
    if faults:
        raise SettingsError(faults)


class _Work:
    """The steps of one run, in order, with what they hand to one another."""

    def __init__(
        self,
        settings: RunSettings,
        origin: Mapping[str, str],
        folder: RunFolder,
        voice: Voice,
        command: str,
        resume: bool,
        reward: RewardFunction | None = None,
    ) -> None:
        self.settings, self.origin, self.folder, self.voice = settings, origin, folder, voice
        self.reward = reward
        self.resume = resume
        self.record: dict[str, Any] = {
            "graftlm": graftlm.__version__,
            "status": "running",
            "started": _now(),
            "command": command,
            "directory": os.getcwd(),
            "processes": processes.count(),
            "settings": dump(settings),
            "origin": dict(origin),
        }

    def run(self) -> Run:
        began_s = time.monotonic()
        self.folder.check(self.settings, resume=self.resume)
        _check_processes(self.settings)
        processes.wait()  # before anything is written, which another process would find
        before = self.folder.record if self.resume else {}
        ready = make_ready(self.settings, self.origin)
        prepared, method, self.asked = ready.prepared, ready.method, ready.asked
        self.settings, self.start = ready.settings, ready.start
        if prepared.task in ONLINE and self.reward is None:
            self.reward = read_reward(self.settings.reinforcement.reward, prepared.reading.known)
        # Running texts go on in the next row: nothing of them is cut away.
        length = self.settings.train.max_length or decide_length(ready.config, self.asked)
        self._say_data(prepared, None if prepared.task == "lm" else length)
        self._foresee(ready)
        torch.manual_seed(self.settings.train.seed)
        model, tokenizer = self._load(prepared)
        self.record |= {"task": prepared.task, "base": self._base(model)}
        if self.start is not None:
            self.record["start"] = {
                "folder": str(self.start.folder),
                "method": str(self.start.method),
                "kept": self.start.kept,
                "sha256": self.start.digest(),
            }
        if before:
            self._check_unchanged(before)
        longest = context_of(model.config) - positions_taken(method)
        self.learnt = Learnt(
            prepared.task,
            model,
            tokenizer,
            labels=prepared.labels,
            scale=prepared.scale,
            template=prepared.template,
            longest=longest,
            seed=self.settings.train.seed,
            preferences=self.settings.preferences.model_dump(),
            reinforcement=self.reinforcement(),
            reward=self.reward,
            title=title_of(self.asked),
        )
        self.collate = self.learnt.collator()
        adapter = self._attach(prepared, model, method)
        self._describe(model, adapter)
        self.facts = {
            "task": prepared.task,
            "base": _lasting(self.settings.model.name),
            "revision": self.settings.model.revision,
            "quantize": self.settings.model.quantize,
            "labels": prepared.labels.to_dict() if prepared.labels else None,
            "scale": prepared.scale.to_dict() if prepared.scale else None,
            "preferences": dict(self.learnt.preferences) if prepared.task in ("dpo", "kto") else None,
            "reinforcement": self.reinforcement() if prepared.task in ONLINE else None,
            "template": prepared.template.to_dict() if prepared.template else None,
            "prompt": prepared.prompt.to_dict() if prepared.prompt else None,
            "texts": sum(role in prepared.reading.columns for role in ("text", "text2")) or None,
            "max_length": self.settings.train.max_length or decide_length(model.config, method),
        }
        self.folder.make()
        trainer, progress = self._trainer(prepared, model, adapter)
        self.folder.write_record(self.record)  # first of all files: from here on the run can be resumed
        if self.folder.writes:
            self.voice.keep_in(self.folder.log)
        self.folder.write_lines(_REJECTED, [{"place": r.place, "reason": r.reason} for r in prepared.rejected])
        self.folder.write_lines(_CUT, [{"place": c.place, "tokens": c.tokens} for c in prepared.cut])
        if prepared.stream is not None:
            prepared.stream.tell = self._left_out
        stopped = self._train(trainer, progress, adapter)
        return self._finish(prepared, model, tokenizer, adapter, trainer, began_s, stopped)

    def reinforcement(self) -> dict[str, Any]:
        """The settings that learning from rewards goes by."""
        told = self.settings.reinforcement.model_dump()
        return told | {"max_new_tokens": self.settings.generate.max_new_tokens}

    # --- before training ---

    def _foresee(self, ready: Ready) -> None:
        """Say what the run will take. Raises EnvironmentFault where it is more than there is."""
        try:
            step = ready.step()
            plan = ready.plan(step)
        except PlanError as error:  # a base whose code does not run without values can be trained all the same
            self.voice.say("memory", error.findings[0].message)
            return
        room = available_bytes(plan.device)
        self.voice.say("memory", plan.line(room or None))
        self.record["plan"] = plan.to_dict()
        if room and not plan.fits(room) and self.settings.model.device_map is None:  # else parts may lie elsewhere
            raise EnvironmentFault(does_not_fit(plan, room))
        if plan.flops * step.mean_share * step.steps < _WORTH_A_CLOCK:
            return
        told = time_of(step, plan)
        if told is not None:
            self.voice.say("time", f"{step.steps:,} steps, about {said_time(told[1])}")
            self.record["plan"] |= {"steps": step.steps, "seconds": round(told[1], 1)}

    def _load(self, prepared: Prepared) -> tuple[Any, Any]:
        wanted = self.settings.model
        labels = prepared.labels
        return load_base(
            wanted.name,
            task=prepared.task,
            labels=[labels.name(at) for at in range(len(labels))] if labels else None,
            several=labels is not None and labels.several,
            dtype=wanted.dtype,
            quantize=wanted.quantize,
            device_map=wanted.device_map,
            max_memory=wanted.max_memory or None,
            offload_folder=wanted.offload_folder,
            revision=wanted.revision,
            trust_remote_code=wanted.trust_remote_code,
        )

    def _say_data(self, prepared: Prepared, limit: int | None) -> None:
        self.voice.say("data", prepared.line)
        count = f"{len(prepared.train):,} rows" if prepared.stream is None else "rows as they come"
        self.voice.say("", f"{count} to train on, {prepared.eval_line} never trained on")
        for finding in prepared.notes:
            self.voice.say("note", str(finding))
        self.voice.say("loss on", prepared.supervision.line.removeprefix("loss on "))
        for at in range(min(2, len(prepared.supervision.examples))):
            self.voice.say("", "  " + prepared.supervision.marked(at, width=140).replace("\n", "\\n"))
        self.record["data"] = {
            "line": prepared.line,
            "columns": prepared.reading.columns,
            "loss_line": prepared.supervision.line,
            "eval_line": prepared.eval_line,
            "train_rows": len(prepared.train) if prepared.stream is None else None,
            "eval_rows": len(prepared.eval),
            "test_rows": len(prepared.test),
            "sha256": prepared.sha256,
            "notes": [str(finding) for finding in prepared.notes],
            "lengths": {**histogram(prepared.supervision.lengths, limit), "limit": limit},
        }

    def _base(self, model: Any) -> dict[str, Any]:
        return {
            "name": self.settings.model.name,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
            "parameters": parameter_count(model),
        }

    def _attach(self, prepared: Prepared, model: Any, method: Method) -> Adapter:
        """The adapter, ready to train; where it depends on data, as the run's checkpoint has it."""
        if self.start is not None:
            how = "stays as it is, under" if self.start.kept else "is trained on:"
            self.voice.say("from", f"{self.start.folder} {how} {self.asked}")
            return attach_start(model, self.start, method, lambda new: self._attach_new(prepared, model, new))
        return self._attach_new(prepared, model, method)

    def _attach_new(self, prepared: Prepared, model: Any, method: Method) -> Adapter:
        if not any(part.needs_samples for part in method.parts):
            return attach(model, method, name="default")
        start, _ = checkpoint.latest(self.folder.checkpoints) if self.resume else (None, [])
        if start is not None:
            return attach(model, method, name="default", state=checkpoint.adapter_state(start))
        train = self.settings.train
        looked = min(max(part.sample_rows for part in method.parts), len(prepared.train))
        self.voice.say("", f"{method} looks at {looked} rows first")
        micro = train.batch // train.accumulate
        samples = self.learnt.samples(method, prepared.train, size=micro, seed=train.seed)
        return attach(model, method, name="default", samples=samples)

    def _describe(self, model: Any, adapter: Adapter) -> None:
        train = self.settings.train
        counts = summary(model)
        kinds, width = adapter.method.parts, _width(model)
        rate = train.learning_rate or decide_learning_rate(self.asked, width)
        rates = decide_learning_rates(self.asked, width)
        if self.start is not None and self.start.kept:  # what is not trained has no rate
            rates = [rate for _ in self.start.method.parts] + rates
        if len(rates) < len(kinds):  # the head that was added
            rates.append(min(rate, decide_learning_rate(kinds[-1], width)))
        rates = [rate for _ in kinds] if train.learning_rate else rates
        others = "".join(f", {p.title} {r:g}" for p, r in zip(kinds, rates, strict=True) if r != rate)
        low, high = learning_rate_range_of(self.asked)
        usual = "" if low <= rate <= high else f" (usual: {low:g} to {high:g})"
        share = 100 * counts.trainable_parameters / counts.base_parameters
        where = f"{self.settings.model.name}  {type(model).__name__}  {counts.base_parameters:,} parameters"
        self.voice.say("base", f"{where}  {str(model.dtype).removeprefix('torch.')}  {_places(model)}")
        self.voice.say(
            "method",
            f"{adapter.method}  {counts.trainable_parameters:,} trainable ({share:.1f} %)  lr {rate:g}{others}{usual}  "
            f"seed {train.seed}",
        )
        self.record |= {
            "method": str(adapter.method),
            "trainable_parameters": counts.trainable_parameters,
            "trained_at": _trained_at(adapter),
            "environment": environment(model),
        }
        self.learning_rate = rate
        self.learning_rates = rates

    def _check_unchanged(self, before: Mapping[str, Any]) -> None:
        """Raise RunError where the run that is taken up saw other data, another base or another start."""
        changed = []
        if list(before["data"]["sha256"].values()) != list(self.record["data"]["sha256"].values()):
            changed.append(f"the data ({', '.join(before['data']['sha256'])})")
        if before["base"]["fingerprint"] != self.record["base"]["fingerprint"]:
            changed.append(f"the base ({before['base']['name']})")
        known, now = (found.get("start", {}).get("sha256") for found in (before, self.record))
        if known is not None and known != now:
            changed.append(f"the adapter to start from ({before['start']['folder']})")
        if changed:
            message = (
                f"{' and '.join(changed)} changed since the run in {self.folder.path} began: --resume is impossible"
            )
            raise RunError(Finding("U109", message, fix="put them back, or leave out --resume and give another -o"))
        self.record |= {"started": before["started"], "resumed": self.record["started"]}

    def _left_out(self, row: Rejected | Cut) -> None:
        """Note a row that a stream could not use, or cut; taken up again, a run meets it again."""
        if isinstance(row, Cut):
            self.folder.add_line(_CUT, {"place": row.place, "tokens": row.tokens})
            return
        self.folder.add_line(_REJECTED, {"place": row.place, "reason": row.reason})

    # --- training ---

    def _trainer(self, prepared: Prepared, model: Any, adapter: Adapter) -> tuple[GraftTrainer, Progress]:
        train = self.settings.train
        epochs = train.epochs or decide_epochs(len(prepared.train))
        objective = self.learnt.objective()
        online = prepared.task in ONLINE
        reference = None
        if "reference" in objective.needs:
            reference = Reference(adapter, trained_before=self.start is not None)
        if reference is not None and reference.by_values and self.folder.writes:  # what scores are told against
            adapter.save(self.folder.start)
        judge = self.learnt.collator()  # hides the same tokens each time, where tokens are hidden
        held = prepared.eval[:_EVAL_ROWS_WHILE_TRAINING]
        micro = train.batch // train.accumulate
        # An epoch in steps: what is due at its end is then done before the checkpoint of that step is written.
        epoch_steps = -(-len(prepared.train) // (micro * train.accumulate))
        updates = decide_updates(prepared.task, self.settings.reinforcement.updates)
        epoch_steps *= updates
        if prepared.stream is not None:  # how many steps a pass has is not known
            epoch_steps = -(-(train.steps or 1) // 10)
        eval_steps = train.eval_every or epoch_steps
        self.record["decided"] = {"learning_rate": self.learning_rate, "epochs": None if train.steps else epochs}
        if online:
            self.record["decided"]["updates"] = updates
        args = TrainingArguments(
            output_dir=str(self.folder.checkpoints),
            num_train_epochs=epochs,
            max_steps=train.steps or -1,
            per_device_train_batch_size=micro // processes.count(),
            gradient_accumulation_steps=train.accumulate,
            learning_rate=self.learning_rate,
            **named_for_trainer(train.optimizer),
            lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
            warmup_steps=train.warmup,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            seed=train.seed,
            data_seed=train.seed,
            logging_strategy="steps",
            logging_steps=1 if (train.steps or 1000) <= 100 else 5,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=eval_steps,
            save_strategy="steps",
            save_steps=train.save_every or eval_steps,
            save_total_limit=train.keep_checkpoints,
            metric_for_best_model=None if train.early_stopping is None else "eval_loss",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=True,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            report_to=train.track if train.track and train.track != "tensorboard" else "none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        # Set afterwards, because the arguments allow it only where every evaluation saves; ours saves each new best.
        if online:
            args.metric_for_best_model = None if train.early_stopping is None else "eval_reward"
            args.greater_is_better = True
        args.load_best_model_at_end = train.early_stopping is not None
        progress = Progress(self.voice, self.folder.metrics, objective.unit, self._remaining(prepared, held, online))
        progress.measure = str(self.learnt.measures()["measure"]["key"])
        callbacks: list[TrainerCallback] = [Interrupt(self.voice)]
        if self.folder.writes:
            callbacks.insert(0, progress)
        if train.track == "tensorboard" and self.folder.writes:
            callbacks.append(tensorboard_callback(self.folder.path / "tensorboard"))
        if isinstance(self.collate, MaskingCollator):
            callbacks.append(OtherTokensEachEpoch(self.collate))
        if train.early_stopping is not None:
            from transformers import EarlyStoppingCallback

            callbacks.append(EarlyStoppingCallback(train.early_stopping))
        rollout = None
        if online:
            rollout = self.learnt.rollout({item["row"]: item["example"] for item in prepared.train})

        bottom = self._bottom(prepared, model) if train.cache_bottom else None

        def evaluate() -> dict[str, float]:
            if online:
                written = written_to(self.learnt, held[:_REWARDED_WHILE_TRAINING])
                return {"eval_reward": sum(written.rewards) / len(written.rewards)}
            own = replace(self.learnt, reference=reference).measured(held)
            told = {f"eval_{name}": value for name, value in own.items()}
            return {"eval_loss": losses(model, objective, held, judge, reference=reference).mean, **told}

        trainer = GraftTrainer(
            adapter,
            objective,
            args,
            evaluate_with=evaluate,
            reference=reference,
            learning_rate_of=lambda kind: next(
                rate for part, rate in zip(adapter.method.parts, self.learning_rates, strict=True) if part is kind
            ),
            recompute=train.recompute,
            rollout=rollout,
            bottom=bottom,
            lengths=[length_of(item) for item in prepared.train] if train.group_by_length else None,
            train_dataset=prepared.train if prepared.stream is None else Streamed(prepared.stream),
            eval_dataset=held,
            data_collator=self.collate,
            callbacks=callbacks,
        )
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        progress.trainer = trainer
        return trainer, progress

    def _bottom(self, prepared: Prepared, model: Any) -> FrozenBottom:
        """What keeps the results of the blocks below the lowest change; RunError (U171) where that cannot be."""
        paths = bottom_of(model)
        size = kept_bytes(prepared, model.config) * model.dtype.itemsize / 4
        self.voice.say("keeping", f"what {len(paths)} frozen blocks make of each row: {size / 1e6:.3g} MB on disk")
        self.record["decided"]["cached_blocks"] = len(paths)
        return FrozenBottom(model, paths, self.folder.path)

    def _remaining(self, prepared: Prepared, held: Any, online: bool) -> Remaining:
        """What tells the time left, by the lengths of the rows; those of a stream and answers yet to come have none."""
        train = self.settings.train
        if online or train.group_by_length or processes.count() > 1 or not prepared.train:  # other draws
            return Remaining()
        if prepared.stream is not None:
            return Remaining(evaluation_tokens=sum(map(length_of, held)))
        several = len(prepared.train[0].get("sequences", [None]))
        lengths = [length_of(item) for item in prepared.train]
        tokens = several * tokens_of_steps(lengths, train.batch // train.accumulate, train.accumulate)
        return Remaining(tokens, several * sum(map(length_of, held)))

    def _train(self, trainer: GraftTrainer, progress: Progress, adapter: Adapter) -> bool:
        start, damaged = checkpoint.latest(self.folder.checkpoints) if self.resume else (None, [])
        for path in damaged:
            self.voice.say("damaged", f"{path.name} is passed over")
        self.folder.cut_metrics(checkpoint.step_of(start) if start else 0)
        if self.resume:
            self.voice.say("resume", f"from {start.name}" if start else "from the start: no checkpoint was written yet")
        interrupt = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Interrupt))
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=str(start) if start else None)
        except (GraftError, OSError):
            self.record |= {"status": "failed", "finished": _now()}
            with contextlib.suppress(GraftError, OSError):  # on a full disk; the first error is the one to tell
                self.folder.write_record(self.record)
                if self.folder.writes:
                    adapter.save(self.folder.adapter, facts=self.facts)
            raise
        finally:
            progress.close()
        self._say_kept(trainer, interrupt.asked)
        return interrupt.asked and trainer.state.global_step < trainer.state.max_steps

    def _say_kept(self, trainer: GraftTrainer, asked: bool) -> None:
        """Where the best step's adapter is kept and not the last one's: which that is, and whether it came early."""
        state = trainer.state
        if not trainer.args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        kept = f"step {state.best_global_step:,} is kept"
        if state.best_metric is not None:
            name = str(trainer.args.metric_for_best_model).replace("_", " ")
            kept += f", the best of those evaluated ({name} {state.best_metric:.4g})"
        if state.global_step < state.max_steps and not asked:
            patience = self.settings.train.early_stopping
            gains = f"no gain in {patience} evaluations" if patience != 1 else "no gain in one evaluation"
            kept = f"stopped early, after {state.global_step:,} of {state.max_steps:,} steps: {gains}; {kept}"
        self.record["kept"] = {"step": state.best_global_step, "of_steps": state.max_steps, "line": kept}
        self.voice.say("kept", kept)

    # --- after training ---

    def _finish(
        self,
        prepared: Prepared,
        model: Any,
        tokenizer: Any,
        adapter: Adapter,
        trainer: GraftTrainer,
        began_s: float,
        stopped: bool,
    ) -> Run:
        generate = self.settings.generate
        if not self.folder.writes:  # the main process scores and writes
            return Run(self.folder.path, self.record | {"results": {}}, model, tokenizer, adapter)
        adapter.save(self.folder.adapter, facts=self.facts)
        # What is scored is what was written.
        use(model, None)
        adapter.detach()
        adapter = load_adapter(model, self.folder.adapter, name="default")
        reference = None
        if "reference" in OBJECTIVES[prepared.task].needs:
            rest = None
            if self.folder.start.is_dir():
                rest = load_adapter(model, self.folder.start, name="start").name
                use(model, adapter.name)
            reference = Reference(adapter, rest=rest)
        learnt = replace(self.learnt, reference=reference)
        results, lines = learnt.score(prepared.eval, prepared.train)
        if prepared.test:
            tested, its_lines = learnt.score(prepared.test)
            told = score_line(tested["scores"][0], tested)
            results["test"] = {"rows": len(prepared.test), "scores": tested["scores"], "line": told}
            self.folder.write_lines("eval/test.jsonl", its_lines)
        if lines:
            self.folder.write_lines("eval/predictions.jsonl", lines)
            for at, line in enumerate(lines[:3]):
                self.voice.say("" if at else "sample", _told(line))
        if prepared.task in ("lm", "sft"):
            samples = write_samples(
                model,
                tokenizer,
                prepared.template,
                prepared.eval,
                generate.samples,
                max_new_tokens=generate.max_new_tokens,
                temperature=generate.temperature,
                top_p=generate.top_p,
                seed=self.settings.train.seed,
            )
            self.folder.write_lines("eval/samples.jsonl", samples)
            for sample in samples[:2]:
                for part in ("prompt", "base", "tuned"):
                    self.voice.say("sample" if part == "prompt" else "", f"{part:<7}{_clip(sample[part])}")
        if prepared.stream is not None:
            counts = prepared.stream.counts
            self.record["data"] |= {"train_rows": counts.used, "stream": counts.to_dict(), "stream_line": counts.line}
        self.record |= {
            "status": "stopped" if stopped else "done",
            "finished": _now(),
            "steps": trainer.state.global_step,
            "seconds": round(time.monotonic() - began_s, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "adapter_bytes": sum(p.stat().st_size for p in self.folder.adapter.iterdir()),
            "results": results,
        }
        self.folder.write_record(self.record)
        self._say_results(results, stopped)
        write_report(self.folder.path)
        write_card(self.folder.path)
        self.voice.say("report", str(self.folder.path / "report.html"))
        return Run(self.folder.path, self.record, model, tokenizer, adapter)

    def _say_results(self, results: Mapping[str, Any], stopped: bool) -> None:
        steps, seconds = self.record["steps"], self.record["seconds"]
        how = "stopped" if stopped else "done"
        self.voice.say(how, f"{steps} steps in {clock(seconds)}, scores on {results['eval_rows']:,} held-out rows:")
        for score in results["scores"]:
            self.voice.say("", f"  {score['title']:<30} {score_line(score, results)}")
        if "stream_line" in self.record["data"]:
            self.voice.say("rows", self.record["data"]["stream_line"])
        if "test" in results:
            self.voice.say("test", f"{results['test']['rows']:,} rows, looked at once: {results['test']['line']}")


def held_out_of(path: Path, opened: Opened) -> Prepared:
    """The rows that the run in `path` held out, read again.

    Raises RunError where `path` is an adapter without a run, and where the data are no longer those of the run: rows
    that it was trained on could be among the held-out rows of another file.
    """
    folder = RunFolder(path if (path / "run.json").is_file() else path.parent)
    record = folder.record
    settings = standing(recorded(record["settings"]), record.get("directory", "."))
    prepared = read_with(
        settings,
        sources_of(settings.data),
        opened.tokenizer,
        opened.max_length,
        opened.model.config,
        eval_path=settings.data.eval_path,
        task=record["task"],
        template=opened.template,
        prompt=opened.prompt,
        packing=False,
    )
    if list(prepared.sha256.values()) != list(record["data"]["sha256"].values()):
        message = f"{', '.join(prepared.sha256)} changed since {folder.path} was trained on it"
        raise RunError(Finding("U122", message, fix="give a file with rows that the run has not seen"))
    return prepared


def _lasting(name: str) -> str:
    """The base's name as it holds from every directory."""
    return str(Path(name).expanduser().resolve()) if name != BUNDLED and Path(name).expanduser().is_dir() else name


def _told(line: Mapping[str, Any]) -> str:
    """One prediction in one line."""
    if "reward" in line:
        return f"{_clip(line['text'], 60)}  ->  {_clip(line['answer'], 40)}: {line['reward']:+.3f} ({line['label']})"
    sure = f" ({line['probability']:.2f})" if "probability" in line else ""
    wanted = "" if line["predicted"] == line["label"] else f", wanted {_clip(str(line['label']), 76)}"
    return f"{_clip(line['text'], 76)}  ->  {_clip(str(line['predicted']), 76)}{sure}{wanted}"


def _trained_at(adapter: Adapter) -> list[dict[str, Any]]:
    """How many numbers are trained in each layer, by what their site does in it; the order is the model's."""
    found: dict[tuple[int | None, str], int] = {}
    for part in adapter.parts:
        place = (part.site.layer, part.site.role or part.site.kind)
        trained = sum(p.numel() for p in part.delta.parameters() if p.requires_grad)
        found[place] = found.get(place, 0) + trained
    return [{"layer": layer, "role": role, "parameters": n} for (layer, role), n in found.items() if n]


def _places(model: Any) -> str:
    """Where the base lies: one device, or how much of it lies where."""
    places = getattr(model, "hf_device_map", {})
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters() if places else ():
        path = next(path for path in places if not path or f"{name}.".startswith(f"{path}."))
        sizes[str(places[path])] += parameter.numel() * parameter.element_size()
    whole = sum(sizes.values())
    told = [f"{place} {100 * size / whole:.0f} %" for place, size in sizes.most_common() if size]
    return ", ".join(told) if len(told) > 1 else str(model.device)


def _width(model: Any) -> int:
    embedding = model.get_input_embeddings()
    return int(embedding.weight.shape[-1])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _clip(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
