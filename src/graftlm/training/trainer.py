"""The trainer: transformers' Trainer for adapters, with objectives that count what they average.

What differs from the Trainer it extends: only the adapter's parameters are optimised, clipped and saved; the loss of a
step is the summed loss over all its micro-batches divided by their joint count, so that accumulation changes nothing
(transformers issue 47688 multiplies it for most heads); checkpoints hold the adapter and never the base, are complete
or absent, and nothing in them is pickled; a step without a finite loss stops the run and names its rows, losses that
explode stop it with the last checkpoint's adapter; and a delta that gets no gradient in the first step stops it too.
Methods that take part in training do so here: their own learning rates, a penalty once a step (beside the loss that is
told), and a word after each step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard, SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from graftlm.core import Adapter, Method
from graftlm.errors import Finding, RunError
from graftlm.kernels import FrozenBottom, Recompute, fuse
from graftlm.objectives import Objective, Reference, settle
from graftlm.training import checkpoint
from graftlm.training.order import ByLength
from graftlm.training.processes import Part, Parts, gathered, rank, void_apart, wait
from graftlm.training.rollout import RepeatedPrompts, Rollout

__all__ = ["GraftTrainer"]

#: Losses explode where so many steps in a row are so many times the largest of the first steps, and one more.
_FIRST_STEPS, _EXPLODING_STEPS, _TIMES = 5, 3, 3.0
#: Scores of the held-out rows, by name; `eval_loss` among them.
Evaluate = Callable[[], dict[str, float]]


class GraftTrainer(Trainer):
    """Trains one adapter on one objective.

    `evaluate_with` gives the held-out scores when the Trainer asks for an evaluation. `learning_rate_of` gives each
    part of a sum of methods its own rate; without it all have that of the arguments. While it trains, the model is
    fused (`graftlm.kernels.fuse`), and `recompute` says what is computed twice to hold less; `bottom` keeps what frozen
    blocks make of rows. With `lengths`, in tokens, rows of like length share a batch.
    """

    #: `compute_loss` divides by the count of the whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        adapter: Adapter,
        objective: Objective,
        args: TrainingArguments,
        *,
        evaluate_with: Evaluate | None = None,
        reference: Reference | None = None,
        learning_rate_of: Callable[[Method], float] | None = None,
        recompute: Recompute = "none",
        rollout: Rollout | None = None,
        bottom: FrozenBottom | None = None,
        lengths: Sequence[int] | None = None,
        stops_explosions: bool = True,
        **options: Any,
    ) -> None:
        self.adapter: Adapter = adapter
        self.objective: Objective = objective
        self.rollout, self.bottom = rollout, bottom
        self.lengths = lengths
        self.evaluate_with, self.learning_rate_of = evaluate_with, learning_rate_of
        self.recompute: Recompute = recompute
        #: The model before training, for objectives that compare with it.
        self.reference = reference
        if reference is None and "reference" in objective.needs:
            self.reference = Reference(adapter)
        #: The method's penalty in the last step; None where it has none.
        self.penalty: float | None = None
        #: Losses counted since the start of this process (tokens or rows): the measure of speed.
        self.counted = 0
        #: Tokens that the step computes, padding too: the measure of its time.
        self.step_tokens = 0
        self._rows: list[int] = []
        #: The size of the loss of the step so far, of the first steps, and how many steps in a row were far above them.
        self._loss, self._first, self._above = 0.0, list[float](), 0
        self.stops_explosions = stops_explosions
        # With several devices in sight the Trainer would copy the model to each, and the copies would lose the adapter.
        if args.n_gpu > 1:
            args._n_gpu = 1
        with _known_to_have_adapters(adapter.model):
            super().__init__(model=adapter.model, args=args, **options)
        if (
            args.world_size > 1
        ):  # no wrapper: what it would sum are the frozen model's own gradients, and there are none
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as the Trainer does, on a fused model; it is as it was afterwards."""
        with fuse(self.adapter.model, recompute=self.recompute), self.bottom or nullcontext():
            return super().train(*args, **options)

    def get_train_dataloader(self) -> Any:
        """The batches; of a stream each process takes its own in turn."""
        rows: Any = self.train_dataset
        size, world, rank = self.args.per_device_train_batch_size, self.args.world_size, self.args.process_index
        if isinstance(rows, IterableDataset):
            if world > 1:
                rows = IterableDatasetShard(rows, batch_size=size, num_processes=world, process_index=rank)
            return DataLoader(rows, batch_size=size, collate_fn=self.data_collator)
        if world == 1:
            return super().get_train_dataloader()
        order = self._get_train_sampler()
        if isinstance(order, RandomSampler):  # as accelerate shuffles for one process
            order = SeedableRandomSampler(rows, data_seed=self.args.data_seed)
        part = Part(order, size * world, world, rank)
        return DataLoader(Parts(rows), batch_sampler=part, collate_fn=void_apart(self.data_collator))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is not None:
            return ByLength(self.lengths, self.get_total_train_batch_size(self.args), self.args.seed)
        if self.rollout is None or self.rollout.updates == 1:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return RepeatedPrompts(
            len(rows), self.get_total_train_batch_size(self.args), self.rollout.updates, self.args.seed
        )

    # --- loss ---

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        del device
        if self.rollout is None or self.rollout(batch_samples, self.state.global_step):
            settle(self.adapter.model, self.objective, batch_samples, self.reference, total=self._over_processes)
        count = sum(self.objective.count(batch) for batch in batch_samples if "void" not in batch)
        self.counted += count
        self.step_tokens = sum(batch["input_ids"].numel() for batch in batch_samples if "input_ids" in batch)
        self._rows = [int(row) for batch in batch_samples for row in batch.get("row", ())]
        return round(float(self._over_processes(torch.tensor(float(count), device=self.args.device))))

    def _over_processes(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        if self.args.world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's mean loss."""
        void = "void" in inputs
        inputs = {name: value for name, value in inputs.items() if name != "void"}
        outputs = self.objective.outputs(model, inputs)
        count = self.objective.count(inputs) if num_items_in_batch is None else int(num_items_in_batch)
        loss = self.objective.loss_sum(outputs, inputs) / max(count, 1)
        loss = loss * 0.0 if void else loss
        if self.args.world_size == 1 and not torch.isfinite(loss):  # several find it together, at the step's end
            rows = [int(row) for row in inputs["row"]] if "row" in inputs else self._rows
            raise _no_number("loss", loss, self.state.global_step + 1, rows)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's gradients; with those of the method's penalty after the step's last one.

        The loss that is returned, and so told, is the objective's alone.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._loss += float(loss)
        if self.accelerator.sync_gradients:
            self._loss = float(self._over_processes(torch.tensor(self._loss, device=self.args.device)))
            if not math.isfinite(self._loss):
                rows = sorted(row for each in gathered(self._rows) for row in each)
                raise _no_number("loss", torch.tensor(self._loss), self.state.global_step + 1, rows)
            self._watch(abs(self._loss))
            if self.state.global_step == 0:
                self._check_gradients()  # before the penalty's, which must not hide that the loss gives none
            # Deltas are outside the module tree, where no wrapper sees them: their gradients are summed here. The loss
            # was divided by the count of all processes already.
            if self.args.world_size > 1:
                for parameter in self.trained:
                    if parameter.grad is not None:
                        torch.distributed.all_reduce(parameter.grad)
            penalty = self.adapter.penalty()
            if penalty is not None:
                if not torch.isfinite(penalty):
                    raise _no_number("penalty", penalty, self.state.global_step + 1, self._rows)
                torch.autograd.backward(penalty)
                self.penalty = float(penalty.detach())
        # The Trainer tells the mean over processes; these are shares of one sum.
        told: Tensor = loss * self.args.world_size
        return told

    def _watch(self, size: float) -> None:
        """Raise RunError where losses of this `size` have been exploding for some steps; U115."""
        self._loss = 0.0
        if not self.stops_explosions:
            return
        if len(self._first) < _FIRST_STEPS:
            self._first.append(size)
            return
        limit = _TIMES * max(self._first) + 1
        self._above = self._above + 1 if size > limit else 0
        if self._above < _EXPLODING_STEPS:
            return
        good, _ = checkpoint.latest(Path(str(self.args.output_dir)))
        kept = "no checkpoint was written before"
        if good is not None:
            checkpoint.load_adapter_state(good, self.adapter)
            kept = f"the adapter of {good.name} is kept"
        raise RunError(
            Finding(
                "U115",
                f"the loss explodes: {size:.3g} at step {self.state.global_step + 1}, at most {max(self._first):.3g} "
                f"in the first {_FIRST_STEPS} steps; {kept}",
                fix=f"--lr {self.args.learning_rate / 4:.2g} and another -o; --from goes on with what is kept",
            )
        )

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As the Trainer logs, with the method's penalty beside the loss."""
        if self.penalty is not None and "loss" in logs:
            logs["penalty"] = self.penalty
        if "loss" in logs:
            logs |= getattr(self.rollout, "told", {})
        super().log(logs, *args, **options)

    # --- optimizer ---

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments (AdamW) over the adapter's parameters."""
        del model
        if self.optimizer is None:
            if not self.trained:
                raise RunError(Finding("U112", f"adapter {self.adapter.name!r} has nothing to train"))
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, None)
            groups = self.adapter.groups(
                self.learning_rate_of or self.args.learning_rate, weight_decay=self.args.weight_decay
            )
            self.optimizer = kind(groups, **options)
            self.optimizer.register_step_post_hook(self._after_step)
        return self.optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            self.adapter.after_step(self.state.global_step + 1, self.state.max_steps)
        optimizer.zero_grad()  # the Trainer zeroes the model's own parameters only

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        del model
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        if not torch.isfinite(norm):  # before the optimizer puts it into the weights
            raise _no_number("gradient's norm", norm, self.state.global_step + 1, self._rows)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        del model
        return grad_norm

    def _check_gradients(self) -> None:
        """Every trainable delta must have had a gradient in the first step: a skipped delta is the worst of bugs."""
        without = [
            name
            for name, parameter in self.adapter.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if without:
            raise RunError(
                Finding(
                    "U113",
                    f"{len(without)} of the adapter's tensors had no gradient in the first step, such as {without[0]}",
                    fix="leave these modules out: exclude=...",
                )
            )

    # --- evaluation ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out scores, logged like the Trainer's own."""
        metrics = self.evaluate_with() if self.evaluate_with else {}
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise RunError(
                Finding(
                    "U114",
                    f"the held-out loss is {metrics['eval_loss']} at step {self.state.global_step}",
                    fix="a smaller --lr",
                )
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints ---

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best: bool = super()._determine_best_metric(metrics, trial)
        # The best is loaded at the end, so it must have been written, whenever other checkpoints are.
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        del model, trial
        if self._above:  # nothing that may be exploding
            return
        randoms = gathered(checkpoint.random_state())
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        kept: Any = self.state.stateful_callbacks
        for keeper in (c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)):
            kept[type(keeper).__name__] = keeper.state()
        shared = self.rollout is not None and self.state.global_step % self.rollout.updates
        answers = gathered(self.rollout.kept) if self.rollout is not None and shared else ()
        if not self.args.should_save:  # one process writes
            return
        assert self.optimizer is not None
        checkpoint.write(
            folder, self.adapter, self.optimizer, self.lr_scheduler, dataclasses.asdict(self.state),
            answers=answers, randoms=randoms,
        )  # fmt: skip
        rotate_checkpoints(
            output_dir=str(self.args.output_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        done, skipped = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and (
                callback.early_stopping_patience_counter >= callback.early_stopping_patience
            ):
                return epochs, 0  # the checkpoint was written when the training stopped early: it is not to go on
        return done, skipped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        checkpoint.load_adapter_state(Path(resume_from_checkpoint), self.adapter)
        if self.rollout is not None:
            self.rollout.kept = checkpoint.load_answers(Path(resume_from_checkpoint), rank(), self.args.world_size)

    def _load_optimizer_and_scheduler(self, resume_checkpoint: str | None) -> None:
        if resume_checkpoint is not None:
            assert self.optimizer is not None
            checkpoint.load_optimizer(Path(resume_checkpoint), self.optimizer, self.lr_scheduler)
            # The run folder may have another path than when the state was written.
            best = Path(resume_checkpoint).with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_rng_state(self, resume_checkpoint: str | None) -> None:
        if resume_checkpoint is not None:
            checkpoint.load_random_state(Path(resume_checkpoint), self.args.process_index)

    def _load_scaler(self, resume_checkpoint: str | None) -> None:
        """There is no loss scaler: deltas train in float32."""

    def _load_best_model(self) -> None:
        wait()  # it may be on its way to the disk
        checkpoint.load_adapter_state(Path(str(self.state.best_model_checkpoint)), self.adapter)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, in PEFT's format; the base is never written."""
        self.adapter.save(output_dir or str(self.args.output_dir))


@contextmanager
def _known_to_have_adapters(model: Any) -> Iterator[None]:
    """The Trainer refuses a base that others have quantised unless it sees adapters; ours are outside its modules."""
    name = "_hf_peft_config_loaded"
    model.__dict__[name] = True
    try:
        yield
    finally:
        del model.__dict__[name]


def _no_number(what: str, value: Tensor, step: int, rows: list[int]) -> RunError:
    shown = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    return RunError(
        Finding(
            "U111",
            f"the {what} is {float(value.detach())} at step {step} (rows {shown or 'unknown'}); "
            "the adapter of the step before is kept",
            fix="a smaller --lr, or look at those rows",
        )
    )
