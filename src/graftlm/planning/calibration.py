"""How fast this device is: each operation of a planned step is made again here, once, and its time is kept.

    seconds of a step = sum over its operations of (how often x (what one takes + what a call from a model takes))
                        + the optimizer's seconds

A step of a model of any size has some dozens of different operations. Each is made with values of the same shapes,
types and layouts; long ones are measured with their dimensions halved until they take a few milliseconds, and scaled
by their work. What a call takes beside the operation (modules, hooks, autograd) comes from a step of a tiny Llama.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftlm.core import attach
from graftlm.kernels import fuse, given_back_bytes, giving_back
from graftlm.methods import read_method
from graftlm.planning.operations import Operation, again, forward_of, given_tensors, is_attention, output_bytes, smaller
from graftlm.planning.plan import Asked, Plan
from graftlm.planning.step import Shape, Traced, objective_of

__all__ = ["Speed", "said_time", "speed_of", "time_of"]

_METHOD = "lora(rank=8,targets=all-linear)"
_FEW = (1, 8)  # rows and tokens a row of the step that calls much and computes little
_VERSION = 4

#: An operation is made smaller until it has no more work than this, a thread: some milliseconds on a processor.
_MOST_FLOPS, _MOST_BYTES = {"cpu": 3e8, "cuda": 1e11}, {"cpu": 1.6e8, "cuda": 5e8}
_ATTENTION = 10  # as much more of attention, which takes rows together
#: An operation meets tensors that were not touched a moment ago: it is made on so many copies in turn, or on as many
#: as take so many bytes.
_COPIES, _COPIED_BYTES = 8, 1.6e7
_BATCHES, _BATCH_S, _CALLS = 5, 1e-3, 64
#: Operations kept of a device; those that were measured first go first.
_KEPT = 20_000


@dataclass
class Speed:
    """What a device takes for an operation, measured when it is first asked for and then known.

    `call_s` is what a call of an operation takes beside it, `update_s` and `tensor_s` what an optimizer's step with
    clipping takes a number and a tensor. `seconds` holds what is known of operations, by the size from which on the
    processor's memory is given back when it is freed, and has to be fetched anew. `clock` tells the seconds.
    """

    device: str
    call_s: float
    update_s: float
    tensor_s: float
    seconds: dict[tuple[int, Operation], float] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def measured(cls, device: str, *, clock: Callable[[], float] = time.perf_counter) -> Speed:
        """Measure calls and the optimizer now, by `clock`. Leaves random numbers as they were."""
        found = cls(device, 0.0, 0.0, 0.0, clock=clock)
        with _same_random_numbers():
            traced, took_s = _tiny_step(device, clock)
            computed_s = found._sum_s(traced, given_back_bytes("none"))
            calls = sum(each.total() for each in traced.operations.values())
            found.call_s = max(took_s - computed_s, 0.0) / calls
            found.update_s, found.tensor_s = _optimizer_s(device, clock)
        return found

    def step_s(self, plan: Plan) -> float:
        """The seconds of one optimizer step of `plan`, all its parts together.

        Example:
            >>> from graftlm import plan
            >>> speed = Speed("cpu", call_s=1e-5, update_s=1e-9, tensor_s=1e-6)
            >>> 0 < speed.step_s(plan("bundled", "lora(rank=8)", batch=2, length=16)) < 10
            True
        """
        traced = plan.traced
        update_s = self.update_s * traced.trainable + self.tensor_s * traced.trained_tensors
        return self._sum_s(traced, given_back_bytes(plan.shape.recompute)) * plan.accumulate + update_s

    def _sum_s(self, traced: Traced, given_back: int) -> float:
        with _same_random_numbers():
            return sum(
                count * (self.of(operation, given_back) + self.call_s)
                for phase in ("forward", "backward")
                for operation, count in traced.operations[phase].items()
            )

    def of(self, operation: Operation, given_back: int) -> float:
        """The seconds of one operation; none where it cannot be made again, as where values decide.

        Memory of `given_back` bytes and more goes back when it is freed, as in a training (`given_back_bytes`).
        """
        key = given_back, operation
        if key not in self.seconds:
            self.seconds[key] = self._measured(operation, given_back)
        return self.seconds[key]

    def _measured(self, operation: Operation, given_back: int) -> float:
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        try:
            most_flops = _MOST_FLOPS[self.device] * threads * (_ATTENTION if is_attention(operation.name) else 1)
            less, share = smaller(operation, most_flops, _MOST_BYTES[self.device])
            # What comes back of a smaller operation goes back where that of the whole one would.
            limit = given_back * output_bytes(less) // max(output_bytes(operation), 1) if share > 1 else given_back
            with giving_back(limit) if self.device == "cpu" else contextlib.nullcontext():
                took_s = _seconds(less, self.device, self.clock)
                if (forward := forward_of(less)) is not None:
                    took_s = max(took_s - _seconds(forward, self.device, self.clock), 0.0)
        except Exception:  # an operation of a model may want values that it is not given here
            return 0.0
        return took_s * share

    def to_dict(self) -> dict[str, Any]:
        """As plain values, to be kept."""
        kept = list(self.seconds.items())[-_KEPT:]
        known = {f"{given_back} {one.name} {one.given}": took_s for (given_back, one), took_s in kept}
        return {"call_s": self.call_s, "update_s": self.update_s, "tensor_s": self.tensor_s, "seconds": known}

    @classmethod
    def from_dict(cls, device: str, kept: dict[str, Any]) -> Speed:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        known = {}
        for text, took_s in kept["seconds"].items():
            given_back, name, given = text.split(" ", 2)
            known[int(given_back), Operation(name, given)] = float(took_s)
        call_s, update_s, tensor_s = (float(kept[name]) for name in ("call_s", "update_s", "tensor_s"))
        return cls(device, call_s, update_s, tensor_s, seconds=known)


def time_of(step: Asked, plan: Plan) -> tuple[float, float] | None:
    """The seconds of the largest step and of the whole run on this device; None where `step.device` is not here.

    What scores and checkpoints take is not in it.
    """
    if step.device == "cuda" and not torch.cuda.is_available():
        return None
    with speed_of(step.device) as speed:
        step_s = speed.step_s(plan)
    return step_s, step_s * step.mean_share * step.steps


def said_time(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> [said_time(s) for s in (0.034, 8.2, 640, 9000)]
        ['0.03 s', '8.2 s', '11 min', '2 h 30 min']
    """
    if seconds < 90:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def speed_of(device: str) -> Any:
    """The speed of this device, as it is kept in the user's cache; what is measured in the block is kept too.

    What is kept is of this processor (or CUDA device), number of threads and version of torch. The folder is that of
    XDG_CACHE_HOME, or ~/.cache; where it cannot be written, the figures are measured anew each time.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    key = f"{_VERSION} {device} {name} {torch.get_num_threads()} threads torch {torch.__version__}"
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftlm" / "speed.json"
    try:
        found = Speed.from_dict(device, _kept(place)[key])
        known = len(found.seconds)
    except (KeyError, ValueError, TypeError, AttributeError):
        found, known = Speed.measured(device), -1
    yield found
    if len(found.seconds) == known:
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump(_kept(place) | {key: found.to_dict()}, file)
        Path(file.name).replace(place)


def _kept(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _same_random_numbers() -> Any:
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def _seconds(operation: Operation, device: str, clock: Callable[[], float]) -> float:
    """The median of some batches of calls; a batch is short, so that other work on the machine spoils few of them."""
    copies = max(1, min(_COPIES, round(_COPIED_BYTES / max(sum(_storages(operation)), 1))))
    calls = [again(operation, device) for _ in range(copies)]
    _timed(calls[0], device, clock)  # what is made when it is first called is no part of it
    once_s = max(_timed(calls[-1], device, clock), 1e-7)
    many = max(1, min(round(_BATCH_S / once_s), _CALLS))
    times = []
    for batch in range(_BATCHES):
        if operation.name.split(".")[1:2] and operation.name.split(".")[1].endswith("_"):
            calls = [again(operation, device) for _ in calls]  # of ones; what is halved again and again gets slow
        turn = [calls[(batch * many + at) % len(calls)] for at in range(many)]
        times.append(_timed(lambda turn=turn: [call() for call in turn], device, clock) / many)  # type: ignore[misc]
    return statistics.median(times)


def _storages(operation: Operation) -> list[int]:
    """The bytes of each tensor that the operation is given."""
    spans = [
        (1 + sum((size - 1) * stride for size, stride in zip(spec["t"], spec["s"], strict=True)), spec["d"])
        for spec in given_tensors(operation)
    ]
    return [span * int(getattr(torch, kind).itemsize) for span, kind in spans]


def _tiny_step(device: str, clock: Callable[[], float]) -> tuple[Traced, float]:
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=2048, pad_token_id=0,
    )  # fmt: skip
    method = read_method(_METHOD)
    rows, length = _FEW
    shape = Shape(rows=rows, length=length, on_processor=device == "cpu")
    traced = Asked(config, method, "lm", shape, device=device).plan().traced
    kind: Any = tf.AutoModelForCausalLM
    model = kind.from_config(config).to(device)
    attach(model, method)
    objective = objective_of("lm", model)
    ids = torch.full((rows, length), 5, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        loss = objective.loss_sum(objective.outputs(model, batch), batch) / objective.count(batch)
        torch.autograd.backward(loss)

    with fuse(model.train()):
        step()
        return traced, statistics.median(_timed(step, device, clock) for _ in range(9))


def _optimizer_s(device: str, clock: Callable[[], float]) -> tuple[float, float]:
    """What AdamW with clipping takes a number and a tensor: from many small tensors and from few large ones."""
    found = []
    for count, size in ((64, 64), (8, 1 << 18)):
        trained = [torch.nn.Parameter(torch.zeros(size, device=device)) for _ in range(count)]
        optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)

        def update(trained: Any = trained, optimizer: Any = optimizer) -> None:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        update()
        found.append((count, count * size, statistics.median(_timed(update, device, clock) for _ in range(5))))
    (few, small, small_s), (some, large, large_s) = found
    update_s = max(large_s * few - small_s * some, 0.0) / (large * few - small * some)
    return update_s, max(small_s - small * update_s, 0.0) / few


def _timed(work: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    def settled() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return clock()

    began_s = settled()
    work()
    return settled() - began_s
