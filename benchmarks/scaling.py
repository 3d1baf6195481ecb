"""How time and memory grow: with length, rows, rank, vocabulary, and with the adapters of one batch.

    python -m benchmarks.scaling                # measures what is not in the results yet, and draws
    python -m benchmarks.scaling --draw         # draws only
    python -m benchmarks.scaling --afresh       # forgets what was measured

A training step (forward, backward, AdamW) of LoRA on all linear maps, ours fused against peft on plain transformers, on
a random Llama (hidden size 256, 4 layers, float32) with 2 rows of 128 tokens, rank 8 and a vocabulary of 4,096 where
nothing else is said; and one decoded token of 16 rows that share some number of adapters. At each point each contender
is a process of its own, and they take turns: the median processor time of one thread over a few steps, and the peak of
the process's memory over what it held before the first. Small shapes: the curves say how something grows, not how large
models compare.
Results go to benchmarks/results/scaling.json, the plot to docs/figures/scaling.svg.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
FIGURE = ROOT / "docs" / "figures" / "scaling.svg"

USUAL = {"tokens": 128, "rows": 2, "rank": 8, "vocabulary": 4096}
#: What is varied, over which values, and what it is called.
AXES: dict[str, tuple[tuple[int, ...], str]] = {
    "tokens": ((64, 128, 256, 512, 1024), "tokens a row"),
    "rows": ((1, 2, 4, 8, 16), "rows of 128 tokens"),
    "rank": ((2, 8, 32, 128), "rank"),
    "vocabulary": ((1024, 4096, 16384, 65536), "vocabulary"),
    "adapters": ((1, 2, 4, 8, 16), "adapters in a batch of 16 rows, one decoded token"),
}
CONTENDERS = {"training": ("graftlm", "peft"), "adapters": ("bare base", "graftlm", "peft")}
DECODED_ROWS, FILLED = 16, 32
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(vocabulary: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=vocabulary, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(contender: str, shape: dict[str, int]) -> Callable[[], None]:
    """A training step."""
    import torch

    model: Any = model_of(shape["vocabulary"]).train()
    ids = torch.randint(3, shape["vocabulary"], (shape["rows"], shape["tokens"]))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    rank = shape["rank"]
    if contender == "graftlm":
        import graftlm
        from graftlm.kernels import fuse
        from graftlm.objectives import CausalLM

        adapter = graftlm.attach(model, graftlm.LoRA(rank=rank, targets="all-linear"))
        objective, parameters = CausalLM.of(model), list(adapter.parameters())
        count = objective.count(batch)
        fuse(model)

        def loss() -> Any:
            return objective.loss_sum(objective.outputs(model, batch), batch) / count
    else:
        import peft

        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=MAPS)
        theirs = peft.get_peft_model(model, config).train()
        theirs.enable_input_require_grads()
        parameters = [p for p in theirs.parameters() if p.requires_grad]

        def loss() -> Any:
            return theirs(**batch, use_cache=False).loss

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoded(contender: str, adapters: int) -> Callable[[], None]:
    """One token for each row behind a filled cache; the rows take the adapters in turn."""
    import torch

    model: Any = model_of(USUAL["vocabulary"]).eval()
    names = [f"a{number}" for number in range(adapters)]
    rows = [names[row % adapters] for row in range(DECODED_ROWS)]
    options: dict[str, Any] = {}
    if contender == "graftlm":
        import graftlm

        for name in names:
            graftlm.attach(model, graftlm.LoRA(rank=USUAL["rank"], targets="all-linear"), name=name)
        graftlm.use(model, rows)
    elif contender == "peft":
        import peft

        config = peft.LoraConfig(task_type="CAUSAL_LM", r=USUAL["rank"], target_modules=MAPS)
        model = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        model.eval()
        options = {"adapter_names": rows}
    with torch.no_grad():
        ids = torch.randint(3, USUAL["vocabulary"], (DECODED_ROWS, FILLED))
        cache = model(input_ids=ids, use_cache=True, **options).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **options)
            cache.crop(-1)

    return step


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Contender:
    """One contender at one point, in the process that it is made in."""

    step: Callable[[], None]
    rest_bytes = 0

    @classmethod
    def start(cls, axis: str, value: int, contender: str) -> None:
        """Make what is measured."""
        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(1)
        step = decoded(contender, value) if axis == "adapters" else trained(contender, USUAL | {axis: value})
        cls.step = staticmethod(step)
        gc.collect()
        cls.rest_bytes = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    @classmethod
    def take(cls) -> tuple[float, int]:
        """Processor seconds of a step, and the peak so far."""
        began = time.process_time()
        cls.step()
        return time.process_time() - began, resident_bytes("VmHWM") - cls.rest_bytes


def measure(axis: str, value: int, repeats: int) -> dict[str, dict[str, float]]:
    """All contenders at one point."""
    names = CONTENDERS.get(axis, CONTENDERS["training"])
    context = multiprocessing.get_context("fork")
    pools = {name: context.Pool(1) for name in names}
    turns: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    try:
        for name, pool in pools.items():
            pool.apply(Contender.start, (axis, value, name))
        for _ in range(repeats + 1):  # the first warms up
            for name, pool in pools.items():
                turns[name].append(pool.apply(Contender.take))
    finally:
        for pool in pools.values():
            pool.terminate()
            pool.join()
    return {
        name: {
            "cpu_ms": round(1e3 * statistics.median(seconds for seconds, _ in taken[1:]), 3),
            "peak_over_rest_mib": round(taken[-1][1] / 2**20, 1),
        }
        for name, taken in turns.items()
    }


def draw(found: dict[str, Any]) -> None:
    """A row of plots for time, one for memory."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graftlm"
    from matplotlib import pyplot as plt

    colours = {"graftlm": "#0f9d8a", "peft": "#c2571a", "bare base": "#7b8490"}
    figure, axes = plt.subplots(2, len(AXES), figsize=(3.1 * len(AXES), 5.6), layout="constrained")
    for column, (axis, (values, title)) in enumerate(AXES.items()):
        for row, (what, unit) in enumerate((("cpu_ms", "processor ms"), ("peak_over_rest_mib", "peak over rest, MiB"))):
            plot = axes[row][column]
            if row and axis == "adapters":  # too little to be told by what a process holds
                plot.set_visible(False)
                axes[0][column].set_xlabel(title, fontsize=8, color="#7b8490", wrap=True)
                continue
            for contender in CONTENDERS.get(axis, CONTENDERS["training"]):
                there = [v for v in values if f"{axis} {v}" in found]
                heights = [found[f"{axis} {v}"][contender][what] for v in there]
                plot.plot(there, heights, marker="o", markersize=3.5, color=colours[contender], label=contender)
            plot.set_xscale("log", base=2)
            plot.set_xticks(values, [f"{v:,}" for v in values], fontsize=8)
            plot.set_ylim(bottom=0)
            plot.tick_params(colors="#7b8490")
            plot.grid(alpha=0.25)
            for spine in plot.spines.values():
                spine.set_color("#9aa3ad")
            if row:
                plot.set_xlabel(title, fontsize=8, color="#7b8490", wrap=True)
            if not column or axis == "adapters":
                plot.set_ylabel(unit, fontsize=8, color="#7b8490")
            if not row and (not column or axis == "adapters"):
                plot.legend(frameon=False, fontsize=8, labelcolor="#7b8490")
    figure.savefig(FIGURE, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--afresh", action="store_true", help="measure everything again")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.afresh else {}
    points = [(axis, value) for axis, (values, _) in AXES.items() for value in values]
    left = [] if options.draw else [(axis, value) for axis, value in points if f"{axis} {value}" not in found]
    if left:
        # Imported once: a point is a fork of this process, which has no threads and no model.
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401

        import graftlm.kernels  # noqa: F401

        torch.set_num_threads(1)
    for axis, value in left:
        point = measure(axis, value, options.repeats * (5 if axis == "adapters" else 1))
        found[f"{axis} {value}"] = point
        print(f"{axis} {value}: {json.dumps(point)}", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)


if __name__ == "__main__":
    main()
