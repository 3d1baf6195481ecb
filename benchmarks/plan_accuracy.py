"""How near plans come: planned against measured memory and time, each case in processes of its own.

    taskset -c 1 python -m benchmarks.plan_accuracy --keep cases.jsonl --first 57    # half an hour of a shared core
    taskset -c 1 python -m benchmarks.plan_accuracy --keep cases.jsonl               # 144 cases
    taskset -c 1 python -m benchmarks.plan_accuracy --keep cases.jsonl --first 648   # the whole grid

Results go to benchmarks/results/plan_accuracy.json, the plot to docs/figures/plan.svg. `--keep` holds what was measured
and is not measured again; memory is planned anew. The grid is 3 architectures, 5 methods, 4 sizes, 3 levels of
recomputing and 4 kinds of numbers; it is in an order whose first part has every pair of these many times.

A case is measured by two children of a process that has imported everything. One takes two training steps: its peak is
its highest resident set (Linux: VmHWM), less what it held before the model was made, so Python and the libraries do not
flatter the figure. There the C library is told to give freed blocks of a quarter of a megabyte back at once
(M_MMAP_THRESHOLD): left alone it keeps holes, and the resident set of these small models is up to twice what they
allocate; `--holes` leaves it alone. The other child takes three steps with the allocator as a run has it, then measures
the device's speed and plans, then takes three more: time is the median processor time of the last two of each, set
against what was planned between them, since machines get faster and slower by a fifth within minutes. One thread.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers as tf

from graftlm.core import attach
from graftlm.kernels import RECOMPUTE, fuse
from graftlm.methods import read_method
from graftlm.planning import Plan, Speed, plan
from graftlm.planning.memory import RUNTIME_BYTES
from graftlm.planning.step import objective_of
from graftlm.quantisation import quantize

__all__ = ["Case", "Measured", "Planned", "cases"]

ROOT = Path(__file__).parents[1]
RESULT, FIGURE = ROOT / "benchmarks" / "results" / "plan_accuracy.json", ROOT / "docs" / "figures" / "plan.svg"

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
    """What was seen of a case: bytes over those `at_rest`, which the process held before, and seconds of a step.

    `planned_s` is what was planned in the same minute.
    """

    case: Case
    peak_bytes: int
    at_rest_bytes: int
    step_s: float
    planned_s: float


@dataclass(frozen=True)
class Planned:
    """What was planned for a case, beside what was seen."""

    seen: Measured
    planned_bytes: int

    @property
    def memory_error(self) -> float:
        """Planned over measured memory, less one: negative where the plan was too small."""
        return self.planned_bytes / self.seen.peak_bytes - 1

    @property
    def time_error(self) -> float:
        """Planned over measured time, less one."""
        return self.seen.planned_s / self.seen.step_s - 1


def cases() -> list[Case]:
    """The whole grid, in an order that does not change: any first part of it covers as many pairs of levels as it can.

    The first 25 have every pair of levels, the first 144 (the default) every pair many times and 99 % of all triples.
    """
    kinds = (("float32", None), ("bfloat16", None), ("float32", "nf4"), ("bfloat16", "nf4"))
    grid = itertools.product(CONFIGS, METHODS, SIZES, RECOMPUTE, kinds)
    left = [each for each in grid if not (each[1] == "full" and each[4][1])]
    random.Random(0).shuffle(left)
    seen: Counter[Any] = Counter()
    found = []
    while left:
        # The case whose pairs, then triples, were seen least; the first of equals.
        best = min(left, key=lambda each: [sum(seen[group] for group in _groups(each, size)) for size in (2, 3)])
        left.remove(best)
        seen.update(group for size in (2, 3) for group in _groups(best, size))
        architecture, method, (rows, length), recompute, (dtype, quantize) = best
        found.append(Case(architecture, method, rows, length, recompute, dtype, quantize))
    return found


def _groups(levels: tuple[Any, ...], size: int) -> Iterator[Any]:
    return itertools.combinations(enumerate(levels), size)


def planned(case: Case) -> Plan:
    """The plan of a case."""
    return plan(
        CONFIGS[case.architecture](), case.method, dtype=case.dtype, batch=case.rows, length=case.length,
        task=case.task, recompute=case.recompute, quantize=case.quantize,
    )  # fmt: skip


def measured_bytes(case: Case, *, holes: bool = False) -> tuple[int, int]:
    """Peak and rest; run in a process of its own."""
    torch.manual_seed(0)
    _steps(
        replace(case, rows=1, length=16), 1, holes=holes
    )  # what a library makes when it is first used is no part of a step
    gc.collect()
    _trim()
    rest = _status("VmRSS")
    _steps(case, 2, holes=holes)
    return _status("VmHWM"), rest


def measured_s(case: Case) -> tuple[float, float]:
    """The processor time of a step, and what is planned between; run in a process of its own."""
    torch.manual_seed(0)
    times = _steps(case, 3)[1:]
    planned_s = Speed.measured("cpu", clock=time.process_time).step_s(planned(case))
    return statistics.median(times + _steps(case, 3)[1:]), planned_s


def _steps(case: Case, count: int, *, holes: bool = True) -> list[float]:
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
    if not holes:  # after fusing, which sets a threshold of its own
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**18)  # M_MMAP_THRESHOLD
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
    return times


def in_child(work: Callable[[Case], Any], case: Case) -> Any:
    """`work(case)` in a child of this process; None where it failed."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, json.dumps(work(case)).encode())
            os._exit(0)
        except BaseException as error:
            print(case, repr(error)[:300], file=sys.stderr)
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}: this benchmark needs Linux")


def _trim() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    """Measure what is not known yet, plan all of it, print each case and the distributions."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--first", type=int, default=144, help="take so many cases of the grid, all of its 648 at most")
    reader.add_argument("--holes", action="store_true", help="leave the allocator as it is")
    reader.add_argument("--keep", type=Path, help="file with a line for each case; what it holds is not measured again")
    reader.add_argument("--minutes", type=float, default=1e9, help="begin no case after so many minutes")
    given = reader.parse_args()
    torch.set_num_threads(1)
    began_s = time.monotonic()
    known = {one.case: one for one in kept(given.keep)}
    seen: list[Measured] = []
    for case in cases()[: given.first]:
        if case not in known:
            if time.monotonic() - began_s > 60 * given.minutes:
                continue
            memory = in_child(functools.partial(measured_bytes, holes=given.holes), case)
            times = in_child(measured_s, case)
            if memory is None or times is None:
                print("FAILED", case)
                continue
            known[case] = Measured(case, memory[0] - memory[1], memory[1], *times)
            if given.keep:
                with given.keep.open("a") as file:
                    file.write(json.dumps(asdict(known[case])) + "\n")
        seen.append(known[case])
    found = [Planned(one, planned(one.case).total_bytes - RUNTIME_BYTES["cpu"]) for one in seen]
    print(table(found))
    errors = {"memory": [one.memory_error for one in found], "time": [one.time_error for one in found]}
    for what, values in errors.items():
        print(distribution(what, values))
    RESULT.write_text(
        json.dumps(
            {
                "machine": machine(),
                "cases": [
                    asdict(one.seen.case)
                    | {
                        "peak_mb": round(one.seen.peak_bytes / 1e6, 2),
                        "planned_mb": round(one.planned_bytes / 1e6, 2),
                        "step_s": round(one.seen.step_s, 4),
                        "planned_s": round(one.seen.planned_s, 4),
                    }
                    for one in found
                ],
            },
            indent=0,
        )
        + "\n"
    )
    draw(errors)


def machine() -> str:
    """The processor and the libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    amx = " with AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{name}{amx}, torch {torch.__version__}, transformers {tf.__version__}"


def kept(place: Path | None) -> list[Measured]:
    """The cases of a file of an earlier run."""
    lines = place.read_text().splitlines() if place and place.exists() else []
    return [Measured(**{**fields, "case": Case(**fields["case"])}) for fields in map(json.loads, lines)]


def table(found: list[Planned]) -> str:
    """The cases as a table of Markdown."""
    head = ["model", "method", "rows x tokens", "type", "computed twice", "MB planned", "measured", "error"]
    head += ["s planned", "measured", "error"]
    lines = [" | ".join(head), " | ".join(["---"] * 5 + ["---:"] * 6)]
    for one in sorted(found, key=lambda one: (one.seen.case.architecture, one.seen.case.method, one.seen.case.dtype)):
        case = one.seen.case
        lines.append(
            f"{case.architecture} | {case.method.partition('(')[0]} | {case.rows} x {case.length} | "
            f"{case.dtype}{', ' + case.quantize if case.quantize else ''} | {case.recompute} | "
            f"{one.planned_bytes / 1e6:.1f} | {one.seen.peak_bytes / 1e6:.1f} | {100 * one.memory_error:+.1f} % | "
            f"{one.seen.planned_s:.3f} | {one.seen.step_s:.3f} | {100 * one.time_error:+.1f} %"
        )
    return "\n".join(f"| {line} |" for line in lines)


def distribution(what: str, values: list[float]) -> str:
    """The errors, a mark for each case, and in a line."""
    errors = sorted(values)
    mean = statistics.fmean(abs(error) for error in errors)
    within = sum(abs(error) <= 0.25 for error in errors)
    bars = []
    for low in range(5 * math.floor(20 * errors[0]), 5 * math.floor(20 * errors[-1]) + 5, 5):
        bars.append(f"{low:+4d} to {low + 5:+4d} %  " + "#" * sum(low <= 100 * error < low + 5 for error in errors))
    return "\n".join(bars) + (
        f"\n{what}, {len(errors)} cases: mean absolute error {100 * mean:.1f} %, from {100 * errors[0]:+.1f} % to "
        f"{100 * errors[-1]:+.1f} %, {sum(error < -0.05 for error in errors)} under by more than 5 %, "
        f"{within} ({100 * within / len(errors):.0f} %) within 25 %"
    )


def draw(errors: dict[str, list[float]]) -> None:
    """A histogram of the errors of memory, and one of those of time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graftlm"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained")
    limits = {"memory": ((-5, 10), 1), "time": ((-25, 25), 5)}
    for plot, (what, values) in zip(axes, errors.items(), strict=True):
        (low, high), width = limits[what]
        percent = [100 * value for value in values]
        first = width * math.floor(min([low, *percent]) / width)
        last = width * math.ceil(max([high, *percent]) / width)
        plot.hist(percent, bins=range(first, last + width, width), color="#0f9d8a", edgecolor="#ffffff", linewidth=0.5)
        for limit in (low, high):
            plot.axvline(limit, color="#c2571a", linewidth=1, linestyle="--")
        plot.set_xlabel(f"{what}: planned over measured, less one, %", fontsize=8, color="#7b8490")
        plot.tick_params(colors="#7b8490", labelsize=8)
        for spine in plot.spines.values():
            spine.set_color("#9aa3ad")
    axes[0].set_ylabel("cases", fontsize=8, color="#7b8490")
    figure.savefig(FIGURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
