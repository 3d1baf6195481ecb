"""The bench: one base in memory with its rows, on which contestants are trained and scored one after the other.

Whatever is attached is taken off again, so that the base is the same for all; `weights_sha256` proves it. Contestants
with the same seed start from the same new head and see the same rows in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from graftlm.comparison.settings import ComparisonSettings
from graftlm.core import Adapter, Method, Samples, WholeParameterDelta, attach, use
from graftlm.data import Collator, Labels, Template, prepare
from graftlm.data.splitting import split
from graftlm.errors import Finding, RunError
from graftlm.evaluation import losses, probe_baseline
from graftlm.evaluation.classes import class_probabilities
from graftlm.methods import Head
from graftlm.models import load_base, load_config, load_tokenizer, resolve_base
from graftlm.objectives import OBJECTIVES, CausalLM, Objective
from graftlm.training import GraftTrainer
from graftlm.training.decisions import decide_epochs, decide_learning_rates, decide_length, with_head
from graftlm.training.early import context_of

__all__ = ["Bench", "Cost", "Scored", "flops_of", "open_bench"]

TASKS = ("classify", "sft", "lm")
_COUNTED = 4  # batches whose operations are counted


@dataclass(frozen=True)
class Scored:
    """Scores of one model on some rows, row by row.

    `values` [rows] are 1 for right and 0 for wrong, or summed losses in nats over `counts` tokens; `predicted` are
    class ids, None for texts.
    """

    values: np.ndarray
    counts: np.ndarray
    nats: np.ndarray
    predicted: list[int] | None

    @property
    def mean(self) -> float:
        """Accuracy, or loss in nats per token."""
        return float(self.values.sum() / self.counts.sum())

    @property
    def mean_nats(self) -> float:
        """Loss in nats per row or token."""
        return float(self.nats.sum() / self.counts.sum())


@dataclass(frozen=True)
class Cost:
    """What one contestant takes: counts, bytes, floating-point operations, seconds.

    `memory_bytes` is counted, not sampled: the base, the adapter with its gradient and two moments, and what a step on
    the longest rows keeps for its backward pass. `train_flops` are those of the whole training.
    """

    parameters: int
    beside_head: int
    adapter_bytes: int
    memory_bytes: int
    train_flops: int
    query_flops: int
    seconds: float


class Bench:
    """The base, the rows of a comparison, and what is done with them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: str,
        train: list[Any],
        validation: list[Any],
        test: list[Any],
        *,
        labels: Labels | None,
        template: Template | None,
        max_length: int,
        settings: ComparisonSettings,
        sha256: Mapping[str, str],
        lines: Sequence[str] = (),
        general: Sequence[Any] = (),
        other: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.train, self.validation, self.test, self.general = train, validation, test, list(general)
        self.other = other
        self.labels, self.template, self.max_length, self.settings = labels, template, max_length, settings
        self.sha256, self.lines = dict(sha256), tuple(lines)
        self.collate = Collator(tokenizer.pad_token_id, max_length=context_of(model.config))
        self.objective: Objective = CausalLM.of(model) if OBJECTIVES[task] is CausalLM else OBJECTIVES[task]()
        self.width = int(model.get_input_embeddings().weight.shape[-1])
        per_epoch = -(-len(train) // settings.batch)
        epochs = settings.epochs or decide_epochs(len(train))
        self.steps = settings.steps or max(1, round(epochs * per_epoch))
        self._probed: dict[str, torch.Tensor] = {}
        #: Seconds of a step of the last training.
        self.last_step_seconds = 0.0

    @property
    def is_classification(self) -> bool:
        """Whether rows have labels."""
        return self.task == "classify"

    @property
    def base_parameters(self) -> int:
        """The parameters of the base."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def weights_sha256(self) -> str:
        """The hash of every parameter and buffer of the base, without its new head."""
        digest = hashlib.sha256()
        prefix = self.model.base_model_prefix + "."
        for name, tensor in sorted(self.model.state_dict().items()):
            if not self.is_classification or name.startswith(prefix):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # --- training ---

    def whole(self, method: Method) -> Method:
        """`method` with the head that a classifier needs."""
        return with_head(method) if self.is_classification else method

    @contextlib.contextmanager
    def fitted(
        self, method: Method, *, seed: int, factor: float = 1.0, steps: int | None = None, counted: bool = False
    ) -> Iterator[tuple[Adapter, Cost]]:
        """`method` trained on the training rows, attached for the block and taken off after it.

        `factor` multiplies the method's own learning rates. Costs are counted where `counted` is true (a second or so).
        """
        began_s = time.perf_counter()
        method = self.whole(method)
        torch.manual_seed(seed)
        with self._fresh_head(seed):
            adapter = attach(self.model, method, name="contestant", samples=self._samples(method, seed))
            try:
                memory, flops = self._step_cost(adapter) if counted else (0, 0)
                total = steps or self.steps
                self._train(adapter, method, seed, factor, total)
                seconds = time.perf_counter() - began_s
                yield adapter, self._cost(adapter, memory, flops * total, seconds) if counted else _NOTHING
            finally:
                use(self.model, None)
                adapter.detach()

    def rates(self, method: Method, factor: float) -> list[float]:
        """The learning rate of each of the method's parts."""
        method = self.whole(method)
        return [rate * factor for rate in decide_learning_rates(method, self.width)]

    def _train(self, adapter: Adapter, method: Method, seed: int, factor: float, steps: int) -> None:
        rates = self.rates(method, factor)
        by_part = dict(zip(map(id, method.parts), rates, strict=True))
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self.settings.batch,
                learning_rate=rates[0],
                warmup_steps=0.06,
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=seed,
                data_seed=seed,
                logging_strategy="no",
                eval_strategy="no",
                save_strategy="no",
                use_cpu=self.model.device.type == "cpu",
                disable_tqdm=True,
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            trainer = GraftTrainer(
                adapter,
                self.objective,
                args,
                learning_rate_of=lambda part: by_part[id(part)],
                train_dataset=self.train,
                data_collator=self.collate,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            began_s = time.perf_counter()
            trainer.train()
            self.last_step_seconds = (time.perf_counter() - began_s) / steps
        self.model.eval()

    def _samples(self, method: Method, seed: int) -> Samples | None:
        if not any(part.needs_samples for part in method.parts):
            return None
        most = max(part.sample_rows for part in method.parts)
        chosen = random.Random(seed).sample(range(len(self.train)), min(most, len(self.train)))
        size = self.settings.batch
        parts = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        return Samples([self.batch([self.train[at] for at in part]) for part in parts], self.loss)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """The objective's mean loss of a batch."""
        found = self.objective.loss_sum(self.objective.outputs(model, batch), batch)
        return found / max(self.objective.count(batch), 1)

    def batch(self, items: Sequence[Any]) -> dict[str, Any]:
        """`items` as the model is called with them, on its device."""
        return {k: v.to(self.model.device) for k, v in self.collate(items).items() if k != "row"}

    @contextlib.contextmanager
    def _fresh_head(self, seed: int) -> Iterator[None]:
        """New values in what a classifier adds to the base, a regression's or drawn; put back after the block."""
        if not self.is_classification:
            yield
            return
        prefix = self.model.base_model_prefix + "."
        fresh = {name: p for name, p in self.model.named_parameters() if not name.startswith(prefix)}
        before = {name: p.detach().clone() for name, p in fresh.items()}
        generator = torch.Generator().manual_seed(seed)
        deviation = getattr(self.model.config, "initializer_range", 0.02)
        with torch.no_grad():
            for p in fresh.values():
                drawn = torch.randn(p.shape, generator=generator) * (deviation if p.dim() > 1 else 0.0)
                p.copy_(drawn)
            if self.settings.head == "probe":
                for name, value in self._probed_head().items():
                    fresh[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in fresh.items():
                    p.copy_(before[name])

    def _probed_head(self) -> dict[str, torch.Tensor]:
        """The values of a head that is a regression on the training rows, by name; found once."""
        if not self._probed:
            method = Head(start="probe")
            found = attach(self.model, method, name="contestant", samples=self._samples(method, 0))
            self._probed = {
                part.site.key: cast(WholeParameterDelta, part.delta).value.detach().clone() for part in found.parts
            }
            use(self.model, None)
            found.detach()
        return self._probed

    # --- what it takes ---

    def memory_bytes(self, method: Method) -> int:
        """What a training step of `method` holds at most; see `Cost`. Nothing is trained."""
        method = self.whole(method)
        adapter = attach(self.model, method, name="contestant", samples=self._samples(method, 0))
        try:
            return self._held_bytes(adapter)
        finally:
            use(self.model, None)
            adapter.detach()

    def _held_bytes(self, adapter: Adapter) -> int:
        by_length = sorted(range(len(self.train)), key=lambda at: -len(self.train[at]["input_ids"]))
        longest = self.batch([self.train[at] for at in by_length[: self.settings.batch]])
        kept = _kept_bytes(self.model, lambda: self.loss(self.model, longest))
        trained = sum(p.numel() * p.element_size() for p in adapter.parameters())
        base: int = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        return base + 4 * trained + kept

    def _step_cost(self, adapter: Adapter) -> tuple[int, int]:
        """Bytes that a training step holds at most, and its floating-point operations, counted on some batches."""
        size = self.settings.batch
        spread = [self.train[at :: max(len(self.train) // size, 1)][:size] for at in range(_COUNTED)]
        spread = [items for items in spread if items]

        def steps() -> None:
            for items in spread:
                torch.autograd.backward(self.loss(self.model, self.batch(items)))

        self.model.train()
        flops = flops_of(steps) // len(spread)
        self.model.eval()
        for parameter in adapter.parameters():
            parameter.grad = None
        return self._held_bytes(adapter), flops

    def _cost(self, adapter: Adapter, memory: int, train_flops: int, seconds: float) -> Cost:
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(folder)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        heads = sum(p.numel() for part in adapter.parts if part.method.name == "head" for p in part.delta.parameters())
        some = self.test[: 4 * _COUNTED]
        bare = replace(self.collate, pad_to_multiple_of=1)  # the query is counted, not its padding

        def queries() -> None:
            with torch.inference_mode():
                for item in some:
                    exact = {k: v.to(self.model.device) for k, v in bare([item]).items() if k != "row"}
                    self.objective.outputs(self.model, exact)

        flops = flops_of(queries) // max(len(some), 1)
        return Cost(
            parameters=adapter.parameter_count,
            beside_head=adapter.parameter_count - heads,
            adapter_bytes=size,
            memory_bytes=memory,
            train_flops=train_flops,
            query_flops=flops,
            seconds=seconds,
        )

    # --- scores ---

    def scored(self, items: Sequence[Any]) -> Scored:
        """The model as it stands on `items`."""
        if self.is_classification:
            chances = class_probabilities(self.model, items, self.collate)
            truth = np.array([int(item["labels"]) for item in items])
            return scored_classes(chances, truth)
        found = losses(self.model, self.objective, items, self.collate)
        return Scored(found.sums, found.counts, found.sums, None)

    def on_general(self) -> float | None:
        """The loss in nats per token on the general texts; None without any."""
        if not self.general:
            return None
        return losses(self.model, CausalLM.of(self.model), self.general, self.collate).mean

    def on_other(self) -> float | None:
        """The score on the rows of another task; None without any.

        For a classifier the accuracy of a logistic regression on what its body makes of them: what the body still knows
        of a task that has another head. For language models the loss in nats per token.
        """
        known, asked = self.other
        if not asked:
            return None
        if not self.is_classification:
            return self.scored(asked).mean
        predicted = probe_baseline(self.model, known, asked, self.collate)
        return float(np.mean([int(item["labels"]) == at for item, at in zip(asked, predicted, strict=True)]))


_NOTHING = Cost(0, 0, 0, 0, 0, 0, 0.0)


def scored_classes(chances: np.ndarray, truth: np.ndarray) -> Scored:
    """Scores out of probabilities [rows, classes]."""
    predicted = chances.argmax(1)
    nats = -np.log(np.maximum(chances[np.arange(len(truth)), truth], 1e-12))
    right = (predicted == truth).astype(float)
    return Scored(right, np.ones(len(truth), dtype=int), nats, [int(at) for at in predicted])


def flops_of(work: Callable[[], Any]) -> int:
    """The floating-point operations of `work()`, counted by torch as it runs (a multiply and an add are two)."""
    from torch.utils import flop_counter

    counting: Any = flop_counter  # without annotations

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(counting.sdpa_flop_count(query, key, value))

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(counting.sdpa_backward_flop_count(grad, query, key, value))

    aten = torch.ops.aten
    # torch 2.13 counts the fused attention of GPUs, not that of CPUs.
    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return int(counter.get_total_flops())


def _kept_bytes(model: nn.Module, forward: Any) -> int:
    """The bytes of what a forward in training mode keeps for the backward, weights aside."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    model.eval()
    del loss
    return sum(seen.values())


def open_bench(settings: ComparisonSettings) -> Bench:
    """The base and the rows that `settings` ask for, divided into training, validation and test.

    Raises GraftError with what is wrong with the data, the base or the settings.
    """
    from graftlm.training.early import data_of

    where = resolve_base(settings.base)
    local = {"local_files_only": True} if Path(where).is_dir() else {}
    config, tokenizer = load_config(where, **local), load_tokenizer(where, **local)
    max_length = settings.max_length or decide_length(config)
    prepared = prepare(
        data_of(settings.data),
        eval_path=data_of(settings.test) if settings.test else None,
        eval_share=None if settings.test else settings.test_share,
        mapping=settings.mapping,
        max_rows=settings.max_rows,
        task=settings.task,
        tokenizer=tokenizer,
        max_length=max_length,
        waived=settings.waive,
    )
    if prepared.task not in TASKS:
        raise RunError(Finding("U150", f"a comparison is of {', '.join(TASKS)}; these rows are for {prepared.task}"))
    examples = [item["example"] for item in prepared.train]
    names = [str(example.label) for example in examples] if prepared.task == "classify" else None
    inside, held = split([example.key for example in examples], names, share=settings.validation_share, seed=1)
    train, validation = ([prepared.train[at] for at in part] for part in (inside, held))
    test = prepared.eval
    if settings.test_rows and len(test) > settings.test_rows:
        chosen = sorted(random.Random(0).sample(range(len(test)), settings.test_rows))
        test = [test[at] for at in chosen]
    if min(len(train), len(validation), len(test)) < 2:
        message = f"{len(train)} rows to train on, {len(validation)} to validate, {len(test)} to test: wanted 2 of each"
        raise RunError(Finding("U157", message, fix="more rows"))
    torch.manual_seed(0)
    labels = prepared.labels
    model, tokenizer = load_base(
        settings.base,
        task=prepared.task,
        labels=[labels.name(at) for at in range(len(labels))] if labels else None,
        dtype=settings.dtype,
    )
    general: list[Any] = []
    sha256 = dict(prepared.sha256)
    if settings.general:
        if prepared.task == "classify":
            message = "forgetting is measured by a language model's loss on texts, and a classifier has none"
            raise RunError(Finding("U156", message, fix="--other FILE, rows of another task with labels"))
        texts = prepare(data_of(settings.general), eval_share=0, task="lm", tokenizer=tokenizer, max_length=max_length)
        general = texts.train
        sha256 |= texts.sha256
    other: tuple[Sequence[Any], Sequence[Any]] = ((), ())
    if settings.other:
        other, hashes = _other_rows(settings, prepared.task, tokenizer, max_length)
        sha256 |= hashes
    lines = (
        prepared.line,
        f"{len(train):,} rows to train on, {len(validation):,} to choose learning rates by, {len(test):,} to test once",
    )
    return Bench(
        model, tokenizer, prepared.task, train, validation, test,
        labels=labels, template=prepared.template, max_length=max_length, settings=settings, sha256=sha256, lines=lines,
        general=general, other=other,
    )  # fmt: skip


def _other_rows(
    settings: ComparisonSettings, task: str, tokenizer: Any, max_length: int
) -> tuple[tuple[Sequence[Any], Sequence[Any]], dict[str, str]]:
    """Rows of another task, with labels halved into those to learn from and those to ask; with the files' hashes."""
    from graftlm.training.early import data_of

    found = prepare(
        data_of(str(settings.other)),
        eval_share=0.5 if task == "classify" else 0,
        max_rows=settings.max_rows,
        tokenizer=tokenizer,
        max_length=max_length,
        waived=settings.waive,
    )
    if found.task != task:
        message = f"{settings.other} is read as rows for {found.task}, and what is compared is {task}"
        raise RunError(Finding("U156", message, fix=f"--other with a file for {task}"))
    return ((found.train, found.eval) if task == "classify" else ((), found.train)), dict(found.sha256)
