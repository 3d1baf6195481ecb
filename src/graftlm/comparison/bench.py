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

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from graftlm.comparison.settings import OF_DATA, ComparisonSettings
from graftlm.core import Adapter, Method, Samples, WholeParameterDelta, attach, use
from graftlm.core.kind import head_kind
from graftlm.data import Collator, MaskingCollator, Prepared, prepare
from graftlm.data.collating import length_of
from graftlm.data.splitting import split
from graftlm.errors import Finding, GraftError, RunError
from graftlm.evaluation import losses, probe_baseline
from graftlm.evaluation.losses import Collate
from graftlm.evaluation.spans import need_span_metrics
from graftlm.methods import Head
from graftlm.models import head_of, load_base, load_config, load_tokenizer, resolve_base
from graftlm.models.loading import generates
from graftlm.objectives import CausalLM, Objective, Reference, mean_loss
from graftlm.training import GraftTrainer
from graftlm.training.callbacks import OtherTokensEachEpoch
from graftlm.training.decisions import decide_epochs, decide_learning_rates, decide_length, with_head
from graftlm.training.early import context_of
from graftlm.training.measures import MEASURES, Scored, measure_of
from graftlm.training.ready import kind_of
from graftlm.training.tasks import Learnt

__all__ = ["Bench", "Cost", "flops_of", "open_bench"]

_COUNTED = 4  # batches whose operations are counted


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
        prepared: Prepared,
        train: list[Any],
        validation: list[Any],
        *,
        test: list[Any],
        max_length: int,
        settings: ComparisonSettings,
        sha256: Mapping[str, str],
        lines: Sequence[str] = (),
        general: Sequence[Any] = (),
        writer: Any = None,
        other: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
    ) -> None:
        self.tokenizer, self.task, self.labels = tokenizer, prepared.task, prepared.labels
        self.train, self.validation, self.test, self.general = train, validation, test, list(general)
        self.writer, self.other, self.template = writer, other, prepared.template
        self.max_length, self.settings = max_length, settings
        self.sha256, self.lines = dict(sha256), tuple(lines)
        self.learnt = Learnt(
            prepared.task,
            model,
            tokenizer,
            labels=prepared.labels,
            scale=prepared.scale,
            template=prepared.template,
            longest=context_of(model.config),
        )
        self.model = model
        self.measure = measure_of(prepared.task, prepared.labels)
        self.collate = self.learnt.collator()  # hides the same tokens each time, where tokens are hidden
        self.objective: Objective = self.learnt.objective()
        self.width = int(model.get_input_embeddings().weight.shape[-1])
        per_epoch = -(-len(train) // settings.batch)
        epochs = settings.epochs or decide_epochs(len(train))
        self.steps = settings.steps or max(1, round(epochs * per_epoch))
        self._probed: dict[str, torch.Tensor] = {}
        #: Seconds of a step of the last training.
        self.last_step_seconds = 0.0

    @property
    def has_classes(self) -> bool:
        """Whether every row has one label of some."""
        return self.task == "classify" and self.labels is not None and not self.labels.several

    @property
    def has_new_head(self) -> bool:
        """Whether the task needs a head that the base does not bring."""
        return head_of(self.task, self.learnt.model.config) in ("sequence", "token")

    @property
    def base_parameters(self) -> int:
        """The parameters of the base."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def weights_sha256(self) -> str:
        """The hash of every parameter and buffer of the base, without its new head."""
        digest = hashlib.sha256()
        prefix = self.model.base_model_prefix + "."
        for name, tensor in sorted(self.model.state_dict().items()):
            if not self.has_new_head or name.startswith(prefix):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # --- training ---

    def whole(self, method: Method) -> Method:
        """`method` with the head that the task needs."""
        return with_head(method) if self.has_new_head else method

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
            if "reference" in self.objective.needs:
                self.learnt = replace(self.learnt, reference=Reference(adapter))
            try:
                memory, flops = self._step_cost(adapter) if counted else (0, 0)
                total = steps or self.steps
                self._train(adapter, method, seed, factor, total)
                seconds = time.perf_counter() - began_s
                yield adapter, self._cost(adapter, memory, flops * total, seconds) if counted else _NOTHING
            finally:
                self.learnt = replace(self.learnt, reference=None)
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
            collate = self.learnt.collator()
            trainer = GraftTrainer(
                adapter,
                self.objective,
                args,
                reference=self.learnt.reference,
                stops_explosions=False,  # a rate that is too high shall score as badly as it does
                learning_rate_of=lambda part: by_part[id(part)],
                train_dataset=self.train,
                data_collator=collate,
                callbacks=[OtherTokensEachEpoch(collate)] if isinstance(collate, MaskingCollator) else [],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            began_s = time.perf_counter()
            trainer.train()
            self.last_step_seconds = (time.perf_counter() - began_s) / steps
        self.model.eval()

    def _samples(self, method: Method, seed: int) -> Samples | None:
        return self.learnt.samples(method, self.train, size=self.settings.batch, seed=seed)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """The objective's mean loss of a batch; before anything is attached the model is its own reference."""
        return mean_loss(model, self.objective, cast(dict[str, Any], batch), self.learnt.reference)

    def batch(self, items: Sequence[Any]) -> dict[str, Any]:
        """`items` as the model is called with them, on its device."""
        return {k: v.to(self.model.device) for k, v in self.collate(items).items() if k != "row"}

    @contextlib.contextmanager
    def _fresh_head(self, seed: int) -> Iterator[None]:
        """New values in the head that the task adds to the base, a regression's or drawn; put back after the block."""
        if not self.has_new_head:
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
            if self.settings.head == "probe" and self.has_classes:
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
        by_length = sorted(range(len(self.train)), key=lambda at: -length_of(self.train[at]))
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
        bare = _unpadded(self.collate)  # the query is counted, not its padding

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
        return self.measure.score(self.learnt, items)

    def on_general(self) -> list[float] | None:
        """The loss in nats per token on the general texts, as what each text adds to it; None without any."""
        if not self.general:
            return None
        found = losses(self.writer, CausalLM.of(self.writer), self.general, self.collate)
        by_row: list[float] = MEASURES["lm"].by_row(found.sums, found.counts).tolist()
        return by_row

    def on_other(self) -> list[float] | None:
        """The score on the rows of another task, as what each row adds to it; None without any.

        With a new head the accuracy of a logistic regression on what the body makes of them: what it still knows of a
        task that has another head. Without one the score of this task.
        """
        known, asked = self.other
        if not asked:
            return None
        if not self.has_new_head:
            scored = self.scored(asked)
            by_row: list[float] = self.measure.by_row(scored.values, scored.counts).tolist()
            return by_row
        collate = Collator(self.tokenizer.pad_token_id, max_length=context_of(self.model.config))
        predicted = probe_baseline(self.model, known, asked, collate)
        return [float(int(item["labels"]) == at) for item, at in zip(asked, predicted, strict=True)]


_NOTHING = Cost(0, 0, 0, 0, 0, 0, 0.0)


def _unpadded(collate: Collate) -> Collate:
    """The collator without rounding widths up."""
    if isinstance(collate, Collator):
        return replace(collate, pad_to_multiple_of=1)
    found: Collate = replace(cast(Any, collate), inner=_unpadded(cast(Any, collate).inner))
    return found


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
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        # The graph is given nothing: with its own outputs it would be a circle that nobody frees.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: torch.empty(0)):
        loss = forward()
    model.eval()
    del loss
    return sum(storage.nbytes() for storage in seen.values())


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
        **{name: getattr(settings, name) for name in OF_DATA},
        **kind_of(config),
    )
    if prepared.task not in MEASURES:
        raise RunError(Finding("U150", f"a comparison is of {', '.join(MEASURES)}; these rows are for {prepared.task}"))
    if prepared.task == "tag":
        need_span_metrics()
    labels = prepared.labels
    examples = [item["example"] for item in prepared.train]
    by_label = prepared.task == "classify" and labels is not None and not labels.several
    names = [str(example.label) for example in examples] if by_label else None
    groups = [str(example.raw[settings.group]) for example in examples] if settings.group else None
    keys = [example.key for example in examples]
    inside, held = split(keys, names, share=settings.validation_share, seed=1, groups=groups)
    train, validation = ([prepared.train[at] for at in part] for part in (inside, held))
    test = prepared.eval
    if settings.test_rows and len(test) > settings.test_rows:
        chosen = sorted(random.Random(0).sample(range(len(test)), settings.test_rows))
        test = [test[at] for at in chosen]
    if min(len(train), len(validation), len(test)) < 2:
        message = f"{len(train)} rows to train on, {len(validation)} to validate, {len(test)} to test: wanted 2 of each"
        raise RunError(Finding("U157", message, fix="more rows"))
    torch.manual_seed(0)
    model, tokenizer = load_base(
        settings.base,
        task=prepared.task,
        labels=[labels.name(at) for at in range(len(labels))] if labels else None,
        dtype=settings.dtype,
    )
    general: list[Any] = []
    sha256, writer = dict(prepared.sha256), None
    if settings.general:
        writer = _writer(settings, model, config)
        with _told_of("general"):
            texts = prepare(
                data_of(settings.general), eval_share=0, mapping=settings.general_mapping, task="lm",
                tokenizer=tokenizer, max_length=max_length,
            )  # fmt: skip
        general = texts.train
        sha256 |= texts.sha256
    other: tuple[Sequence[Any], Sequence[Any]] = ((), ())
    if settings.other:
        asked = "classify" if head_of(prepared.task, config) in ("sequence", "token") else prepared.task
        other, hashes = _other_rows(settings, asked, tokenizer, max_length, config)
        sha256 |= hashes
    lines = (
        prepared.line,
        f"{len(train):,} rows to train on, {len(validation):,} to choose learning rates by, {len(test):,} to test once",
    )
    return Bench(
        model, tokenizer, prepared, train, validation, test=test, max_length=max_length, settings=settings,
        sha256=sha256, lines=lines, general=general, writer=writer, other=other,
    )  # fmt: skip


def _writer(settings: ComparisonSettings, model: Any, config: Any) -> Any:
    """The model by whose loss on texts it is told what is forgotten: a classifier's body with the base's own head.

    Raises RunError for bases that are no language models that write.
    """
    if not generates(config) or getattr(config, "is_encoder_decoder", False):
        kind = type(config).__name__.removesuffix("Config")
        message = f"forgetting of texts is measured by what a causal base makes of them, and {kind} is none"
        raise RunError(Finding("U156", message, fix="--other FILE, rows of another task"))
    if head_kind(type(model).__name__) == "causal":
        return model
    writer, _ = load_base(settings.base, task="lm", dtype=settings.dtype)
    setattr(writer, writer.base_model_prefix, model.base_model)
    return writer


@contextlib.contextmanager
def _told_of(option: str) -> Iterator[None]:
    """In what is said of a file beside DATA, `--map` is that file's own flag."""
    try:
        yield
    except GraftError as error:
        own = f"--{option}-map "
        raise type(error)([replace(each, fix=each.fix.replace("--map ", own)) for each in error.findings]) from None


def _other_rows(
    settings: ComparisonSettings, task: str, tokenizer: Any, max_length: int, config: Any
) -> tuple[tuple[Sequence[Any], Sequence[Any]], dict[str, str]]:
    """Rows of another task, with labels halved into those to learn from and those to ask; with the files' hashes."""
    from graftlm.training.early import data_of

    with _told_of("other"):
        found = prepare(
            data_of(str(settings.other)),
            eval_share=0.5 if task == "classify" else 0,
            mapping=settings.other_mapping,
            max_rows=settings.max_rows,
            tokenizer=tokenizer,
            max_length=max_length,
            waived=settings.waive,
            **kind_of(config),
        )
    if found.task != task:
        message = f"{settings.other} is read as rows for {found.task}, and what is asked of it is {task}"
        raise RunError(Finding("U156", message, fix=f"--other with a file for {task}"))
    return ((found.train, found.eval) if task == "classify" else ((), found.train)), dict(found.sha256)
