"""How fast this device is: a small model's real steps, measured once and kept, tell the time of any planned step.

    seconds = products / their rate + bytes of all else / the memory's rate + random numbers x what one takes
              + operations x the cost of calling one

The memory's rate is that of sums of two large tensors; random numbers are those of dropout, dear on a processor. The
other two figures come from two steps of a small Llama with LoRA, one of many tokens and one of few: what these
operations really cost, in the arrangement in which training calls them, is thereby in the figures.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graftlm.core import attach
from graftlm.kernels import fuse
from graftlm.methods import read_method
from graftlm.planning.plan import Asked, Plan
from graftlm.planning.step import Shape, Traced, objective_of

__all__ = ["Speed", "calibrate", "said_time", "speed_of", "time_of"]

_METHOD = "lora(rank=8,targets=all-linear)"
_MANY, _FEW = (4, 128), (1, 8)  # rows and tokens a row
_REPEATS = 3
_MOVED_NUMBERS = 1 << 22  # of each tensor: more than the caches next to a core hold
_VERSION = 2


@dataclass(frozen=True)
class Speed:
    """What a device does in a second: operations of products, bytes of all else, random numbers; seconds a call."""

    flops_per_s: float
    bytes_per_s: float
    numbers_per_s: float
    call_s: float

    def step_s(self, plan: Plan) -> float:
        """The seconds of one optimizer step of `plan`, all its parts together.

        Example:
            >>> from graftlm import plan
            >>> Speed(1e11, 1e10, 1e8, 1e-5).step_s(plan("bundled", "lora(rank=8)", batch=4, length=128)) < 1
            True
        """
        found = plan.traced
        once = sum(self._seconds(found, phase) for phase in ("forward", "backward"))
        # AdamW reads the gradient, reads and writes the number and its moments; clipping reads and writes the gradient.
        return once * plan.accumulate + 4 * 9 * plan.trainable / self.bytes_per_s

    def _seconds(self, found: Traced, phase: str) -> float:
        products = found.flops[phase] / self.flops_per_s
        rest = found.moved_bytes[phase] / self.bytes_per_s + found.drawn[phase] / self.numbers_per_s
        return products + rest + found.calls[phase] * self.call_s


def time_of(step: Asked, plan: Plan) -> tuple[float, float] | None:
    """The seconds of the largest step and of the whole run on this device; None where `step.device` is not here.

    What scores and checkpoints take is not in it.
    """
    if step.device == "cuda" and not torch.cuda.is_available():
        return None
    step_s = speed_of(step.device, step.shape.dtype).step_s(plan)
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


def speed_of(device: str, dtype: torch.dtype) -> Speed:
    """The speed of this device with numbers of that type: measured in a few seconds, then kept in the user's cache.

    What is kept is of this processor (or CUDA device), number of threads and version of torch. The folder is that of
    XDG_CACHE_HOME, or ~/.cache; where it cannot be written, the figures are measured anew each time.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    kind = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    key = f"{_VERSION} {device} {name} {kind} {threads} threads torch {torch.__version__}"
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftlm" / "speed.json"
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        return Speed(**kept[key])
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    found = calibrate(device, dtype)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError, OSError):
            kept = dict(json.loads(place.read_text(encoding="utf-8")))
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump(kept | {key: asdict(found)}, file, indent=1)
        Path(file.name).replace(place)
    return found


def calibrate(device: str, dtype: torch.dtype, *, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Measure now: the median of a few steps of two sizes, by `clock`. Leaves random numbers as they were."""
    state = torch.random.get_rng_state()
    try:
        bytes_per_s = _memory_rate(device, clock)
        x = torch.empty(_MOVED_NUMBERS // 4, device=device)
        drawn_s = statistics.median(_timed(x.bernoulli_, device, clock) for _ in range(_REPEATS))
        steps = [_measured(device, dtype, *size, clock) for size in (_MANY, _FEW)]
    finally:
        torch.random.set_rng_state(state)
    rest = []
    for found, took_s in steps:
        flops, moved, calls = (found.flops.total(), found.moved_bytes.total(), found.calls.total())
        rest.append((flops, calls, max(took_s - moved / bytes_per_s, took_s / 4)))
    (many, calls, many_s), (few, few_calls, few_s) = rest
    # Two equations: seconds = flops / rate + calls x cost.
    whole = many * few_calls - few * calls
    second = max((many_s * few_calls - few_s * calls) / whole, many_s / many / 4)
    return Speed(
        1 / second, bytes_per_s, x.numel() / max(drawn_s, 1e-9), max(few_s - few * second, few_s / 4) / few_calls
    )


def _memory_rate(device: str, clock: Callable[[], float]) -> float:
    x, y = (torch.ones(_MOVED_NUMBERS, device=device) for _ in range(2))
    z = torch.empty_like(x)
    times = [_timed(lambda: torch.add(x, y, out=z), device, clock) for _ in range(5)]
    return 3 * x.numel() * x.element_size() / max(statistics.median(times), 1e-9)


def _measured(
    device: str, dtype: torch.dtype, rows: int, length: int, clock: Callable[[], float]
) -> tuple[Traced, float]:
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=2048, pad_token_id=0,
    )  # fmt: skip
    method = read_method(_METHOD)
    shape = Shape(rows=rows, length=length, dtype=dtype, on_processor=device == "cpu")
    traced = Asked(config, method, "lm", shape, device=device).plan().traced
    kind: Any = tf.AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype).to(device)
    attach(model, method)
    objective = objective_of("lm", model)
    ids = torch.full((rows, length), 5, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        loss = objective.loss_sum(objective.outputs(model, batch), batch) / objective.count(batch)
        torch.autograd.backward(loss)

    with fuse(model.train()):
        step()  # what is made when it is first called is no part of a step
        return traced, statistics.median(_timed(step, device, clock) for _ in range(_REPEATS))


def _timed(work: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    def settled() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return clock()

    began_s = settled()
    work()
    return settled() - began_s
