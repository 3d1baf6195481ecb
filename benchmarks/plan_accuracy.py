"""How near plans come: planned against measured peak memory, each case in a process of its own.

    python -m benchmarks.plan_accuracy --keep cases.jsonl               # the whole grid, an hour on one core
    python -m benchmarks.plan_accuracy --keep cases.jsonl --first 60    # sixty cases, well spread

The grid is shuffled once, so that its first cases are spread over it; those that `--keep` holds are not run again.

The C library is told to give freed blocks of a quarter of a megabyte back at once (M_MMAP_THRESHOLD): left alone
it keeps holes, and the resident set of these small models is up to twice what they allocate. `--holes` leaves it alone.

A case is a child of a process that has imported everything. Its peak is the highest resident set of two training steps
(Linux: VmHWM), less what the process held before the model was made, so Python and the libraries do not flatter the
figure. Time is processor time of the second step. One thread.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers as tf

from graftlm.core import attach
from graftlm.kernels import RECOMPUTE, fuse
from graftlm.methods import read_method
from graftlm.planning import plan
from graftlm.planning.memory import RUNTIME_BYTES
from graftlm.planning.plan import Plan
from graftlm.planning.step import objective_of
from graftlm.quantisation import quantize

__all__ = ["Case", "Measured", "cases", "measure"]

CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096,
    ),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=256, n_layer=4, n_head=8, vocab_size=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "bert": lambda: tf.BertConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096,
    ),
}  # fmt: skip
METHODS = ("lora(rank=16,targets=all-linear)", "ia3", "prefix(length=20)", "series", "full")
SIZES = ((4, 256), (8, 256), (2, 512), (4, 512))


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    architecture: str
    method: str
    rows: int
    length: int
    recompute: str
    dtype: str
    quantize: str | None = None

    @property
    def task(self) -> str:
        """Classification for the encoder."""
        return "classify" if self.architecture == "bert" else "lm"


@dataclass(frozen=True)
class Measured:
    """What was planned and seen, in bytes; a step's processor time; `at_rest` is what the process held before."""

    case: Case
    planned_bytes: int
    peak_bytes: int
    at_rest_bytes: int
    step_s: float
    flops: int
    moved_bytes: int
    calls: int

    @property
    def error(self) -> float:
        """Planned over measured, less one: negative where the plan was too small."""
        return self.planned_bytes / self.peak_bytes - 1


def cases() -> list[Case]:
    """The whole grid, in an order that does not change."""
    kinds = (("float32", None), ("bfloat16", None), ("float32", "nf4"), ("bfloat16", "nf4"))
    grid = itertools.product(CONFIGS, METHODS, SIZES, RECOMPUTE, kinds)
    every = [
        Case(architecture, method, rows, length, recompute, dtype, quantize)
        for architecture, method, (rows, length), recompute, (dtype, quantize) in grid
        if not (method == "full" and quantize)
    ]
    random.Random(0).shuffle(every)
    return every


def planned(case: Case) -> Plan:
    """The plan of a case."""
    return plan(
        CONFIGS[case.architecture](), case.method, dtype=case.dtype, batch=case.rows, length=case.length,
        task=case.task, recompute=case.recompute, quantize=case.quantize,
    )  # fmt: skip


def measure(case: Case) -> tuple[int, int, float]:
    """Peak and rest in bytes, and the processor time of a step; run in a process of its own."""
    torch.manual_seed(0)
    warm = replace(case, rows=1, length=16)
    _steps(warm, 1)  # what a library makes when it is first used is no part of a step
    gc.collect()
    _trim()
    rest = _status("VmRSS")
    took_s = _steps(case, 2)
    return _status("VmHWM"), rest, took_s


def _steps(case: Case, count: int) -> float:
    config = CONFIGS[case.architecture]()
    kind: Any = tf.AutoModelForSequenceClassification if case.task == "classify" else tf.AutoModelForCausalLM
    config.pad_token_id = 0
    model = kind.from_config(config, dtype=getattr(torch, case.dtype))
    if case.quantize:
        quantize(model, case.quantize)
    adapter = attach(model, read_method(case.method))
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    objective = objective_of(case.task, model)
    model.train()
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts anew
    times = []
    fused = fuse(model, recompute=case.recompute)
    for _ in range(count):
        began_s = time.process_time()
        ids = torch.randint(5, config.vocab_size, (case.rows, case.length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["labels"] = torch.zeros(case.rows, dtype=torch.long) if case.task == "classify" else ids
        loss = objective.loss_sum(objective.outputs(model, batch), batch) / objective.count(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began_s)
    fused.undo()
    return min(times[1:] or times)


def in_child(case: Case) -> tuple[int, int, float] | None:
    """`measure` in a child of this process; None where it failed."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, json.dumps(measure(case)).encode())
            os._exit(0)
        except BaseException as error:
            print(case, repr(error)[:300], file=sys.stderr)
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return None
    peak, rest, took_s = json.loads(said)
    return peak, rest, took_s


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}: this benchmark needs Linux")


def _trim() -> None:
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    """Run the grid, print each case and the distribution."""
    reader = argparse.ArgumentParser()
    reader.add_argument("--first", type=int, help="take so many cases of the shuffled grid")
    reader.add_argument("--dtype", help="take cases of this type only: bfloat16 is slow on many processors")
    reader.add_argument("--holes", action="store_true", help="leave the allocator as it is")
    reader.add_argument("--keep", type=Path, help="file with a line for each case; what it holds is not run again")
    reader.add_argument("--minutes", type=float, default=1e9, help="begin no case after so many minutes")
    reader.add_argument("--again", action="store_true", help="plan the cases of --keep anew beside what was measured")
    given = reader.parse_args()
    torch.set_num_threads(1)
    if not given.holes:
        import ctypes

        ctypes.CDLL("libc.so.6").mallopt(-3, 2**18)  # M_MMAP_THRESHOLD
    known = {one.case: one for one in kept(given.keep)}
    found: list[Measured] = []
    began_s = time.monotonic()
    chosen = [case for case in cases() if given.dtype in (None, case.dtype)]
    for case in chosen[: given.first]:
        if case in known and not given.again:
            found.append(known[case])
            continue
        if time.monotonic() - began_s > 60 * given.minutes or (given.again and case not in known):
            continue
        told = planned(case)
        seen = (known[case].peak_bytes + known[case].at_rest_bytes, known[case].at_rest_bytes, known[case].step_s) if (
            given.again
        ) else in_child(case)  # fmt: skip
        if seen is None:
            print("FAILED", case)
            continue
        peak, rest, took_s = seen
        work = [sum(each.values()) for each in (told.traced.flops, told.traced.moved_bytes, told.traced.calls)]
        one = Measured(case, told.total_bytes - RUNTIME_BYTES["cpu"], peak - rest, rest, took_s, *work)
        found.append(one)
        print(
            f"{case.architecture:6} {case.method:34} {case.rows:3}x{case.length:<4} {case.dtype:9} "
            f"{case.quantize or '-':4} {case.recompute:11} planned {one.planned_bytes / 1e6:7.1f} MB  "
            f"measured {one.peak_bytes / 1e6:7.1f} MB  {100 * one.error:+6.1f} %   {took_s:.2f} s",
            flush=True,
        )
        if given.keep and not given.again:
            with given.keep.open("a") as file:
                file.write(json.dumps(asdict(one)) + "\n")
    if given.keep and given.again:
        given.keep.write_text("".join(json.dumps(asdict(one)) + "\n" for one in found))
    print(table(found))
    print(distribution(found))


def kept(place: Path | None) -> list[Measured]:
    """The cases of a file of an earlier run."""
    lines = place.read_text().splitlines() if place and place.exists() else []
    return [Measured(**{**fields, "case": Case(**fields["case"])}) for fields in map(json.loads, lines)]


def table(found: list[Measured]) -> str:
    """The cases as a table of Markdown."""
    head = ["model", "method", "rows x tokens", "type", "computed twice", "planned", "measured", "error"]
    lines = [" | ".join(head), " | ".join(["---"] * 5 + ["---:"] * 3)]
    for one in sorted(found, key=lambda one: (one.case.architecture, one.case.method, one.case.dtype)):
        case = one.case
        lines.append(
            f"{case.architecture} | {case.method.partition('(')[0]} | {case.rows} x {case.length} | "
            f"{case.dtype}{', ' + case.quantize if case.quantize else ''} | {case.recompute} | "
            f"{one.planned_bytes / 1e6:.1f} | {one.peak_bytes / 1e6:.1f} | {100 * one.error:+.1f} %"
        )
    return "\n".join(f"| {line} |" for line in lines)


def distribution(found: list[Measured]) -> str:
    """The errors, a mark for each case, and in a line."""
    errors = sorted(one.error for one in found)
    mean = statistics.fmean(abs(error) for error in errors)
    bars = []
    for low in range(5 * math.floor(20 * errors[0]), 5 * math.floor(20 * errors[-1]) + 5, 5):
        bars.append(f"{low:+4d} to {low + 5:+4d} %  " + "#" * sum(low <= 100 * error < low + 5 for error in errors))
    return "\n".join(bars) + (
        f"\n{len(errors)} cases: mean absolute error {100 * mean:.1f} %, from {100 * errors[0]:+.1f} % to "
        f"{100 * errors[-1]:+.1f} %, {sum(error < -0.05 for error in errors)} under by more than 5 %"
    )


if __name__ == "__main__":
    main()
