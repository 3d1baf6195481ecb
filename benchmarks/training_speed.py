"""What a training step costs: graftlm against peft on plain transformers, and against the bare matrix products.

    python benchmarks/training_speed.py --dtype bf16,f32 --case lora --repeats 7

A random model of Llama's shape (hidden 768, 12 layers, feed-forward 2048, vocabulary 32,000: 134 M parameters). Each
contender lives in a process of its own with the same weights and batch, on one thread; their steps take turns, so that
what else the machine does meets all alike. Told are medians: processor time and wall time of a step (forward, backward,
AdamW), the ratio to peft of the same turn, the peak of memory over what the process held before its first step, and the
share of the step that its large matrix products alone take (`products`). The losses of all steps are compared first:
a contender whose losses are others' has not done the same work. `--quick` is a tiny size that only shows that it runs.
Results go to benchmarks/results/training_speed.json, one entry a case and type, written when it is measured; `--resume`
goes on where a run was cut off. `GRAFTLM_NATIVE=0` in the environment measures without the loops of native.c.
`ours-cached`, of the case `top-quarter`, passes over the frozen blocks below, whose results it has on disk (as
`train.cache_bottom` does from the second pass on). The case `nf4` has the base packed, ours by graftlm and peft's by
bitsandbytes. With `--device cuda` all run on a GPU: times are wall times of steps that are waited for, peaks those of
its allocator, and the shape may be given (`--hidden`, `--layers`, ...), as weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """The shape of model and batch."""

    hidden: int = 768
    layers: int = 12
    feed_forward: int = 2048
    heads: int = 12
    vocabulary: int = 32_000
    rows: int = 4
    tokens: int = 512


SHAPE = ("hidden", "layers", "feed_forward", "heads", "vocabulary")
QUICK = Size(hidden=64, layers=2, feed_forward=96, heads=4, vocabulary=512, rows=2, tokens=32)


@dataclass(frozen=True)
class Case:
    """What is trained: our method's text, peft's settings, and which positions have a label."""

    method: str
    peft: dict[str, Any]
    #: The base's weights in this format; peft's by bitsandbytes.
    quantize: str | None = None
    #: Share of each row that is padding (by row, cycled), and of the rest that has no label.
    padded: tuple[float, ...] = (0.0,)
    unlabelled: float = 0.0


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"kind": "LoraConfig", "r": 16, "lora_alpha": 32, "target_modules": LINEAR}
CASES = {
    "lora": Case("lora(rank=16,alpha=32,targets=all-linear)", LORA),
    "lora-dropout": Case("lora(rank=16,alpha=32,targets=all-linear,dropout=0.1)", LORA | {"lora_dropout": 0.1}),
    "dora": Case("dora(rank=16,alpha=32,targets=all-linear)", LORA | {"use_dora": True}),
    "ia3": Case(
        "ia3",
        {"kind": "IA3Config", "target_modules": ["k_proj", "v_proj", "down_proj"],
         "feedforward_modules": ["down_proj"]},
    ),
    "prefix": Case("prefix(length=20)", {"kind": "PrefixTuningConfig", "num_virtual_tokens": 20}),
    "prompt": Case("prompt(length=20)", {"kind": "PromptTuningConfig", "num_virtual_tokens": 20}),
    "top-quarter": Case(
        "lora(rank=16,alpha=32,targets=all-linear,layers='-3:')",
        LORA | {"layers_to_transform": [9, 10, 11], "layers_pattern": "layers"},
    ),
    "nf4": Case("lora(rank=16,alpha=32,targets=all-linear)", LORA, quantize="nf4"),
    # Rows of 512, 384, 256 and 128 tokens; as in instruction data a quarter of them is the answer. Ours packs them.
    "answers": Case(
        "lora(rank=16,alpha=32,targets=all-linear)", LORA, padded=(0.0, 0.25, 0.5, 0.75), unlabelled=0.75
    ),
}  # fmt: skip
CONTENDERS = (
    "ours",
    "ours-cached",
    "ours-feedforward",
    "ours-blocks",
    "peft",
    "peft-checkpointing",
    "frozen",
    "products",
)


# --- one contender, in its own process ------------------------------------------------------------------------------


def build(size: Size, dtype: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.feed_forward, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=size.vocabulary,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return model.to({"bf16": torch.bfloat16, "f32": torch.float32}[dtype]).train()


def packed_by_bitsandbytes(model: Any) -> Any:
    """The maps of the blocks in NF4, twice quantised, computing in the type that the model has."""
    from bitsandbytes import nn
    from torch.nn import Linear

    for name, module in list(model.model.named_modules()):
        if isinstance(module, Linear):
            made = nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=module.weight.dtype,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            made.weight = nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            model.model.set_submodule(name, made)
    return model


def batch_of(size: Size, case: Case) -> dict[str, Any]:
    import torch

    ids = torch.randint(3, size.vocabulary, (size.rows, size.tokens), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(size.rows):
        length = size.tokens - int(size.tokens * case.padded[row % len(case.padded)])
        mask[row, length:] = 0
        labels[row, length:] = -100
        labels[row, : int(length * case.unlabelled)] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def packed(batch: dict[str, Any], size: Size) -> dict[str, Any]:
    """The same texts as `packing: true` lays them: one behind the other, in as many rows as they fill."""
    from graftlm.data.collating import Collator
    from graftlm.data.tokenising import pack

    real = batch["attention_mask"].bool()
    items = [
        {"input_ids": ids[own].tolist(), "labels": labels[own].tolist(), "row": row, "example": None}
        for row, (ids, labels, own) in enumerate(zip(batch["input_ids"], batch["labels"], real, strict=True))
    ]
    found = Collator(pad_id=0)(pack(items, size.tokens))
    found.pop("row")
    return found


def ours(size: Size, case: Case, dtype: str, recompute: str, device: str) -> tuple[Callable[[], Any], list[Any]]:
    import graftlm
    from graftlm.kernels import FrozenBottom, bottom_of, fuse
    from graftlm.objectives import CausalLM

    model, batch = build(size, dtype), batch_of(size, case)
    if case.quantize:
        graftlm.quantize(model, case.quantize)
    if any(case.padded):
        batch = packed(batch, size)
    model, batch = model.to(device), {name: tensor.to(device) for name, tensor in batch.items()}
    adapter = graftlm.attach(model, graftlm.method(case.method))
    cached, recompute = recompute == "cached", "none" if recompute == "cached" else recompute
    objective = CausalLM.of(model)
    count = objective.count(batch)
    fuse(model, recompute=recompute)  # type: ignore[arg-type]
    if cached:  # a third pass and later ones: the first keeps, the second compares
        FrozenBottom(model, bottom_of(model), Path(tempfile.gettempdir())).__enter__()
        for _ in range(2):
            objective.outputs(model, batch)

    def loss() -> Any:
        return objective.loss_sum(objective.outputs(model, batch), batch) / count

    return loss, list(adapter.parameters())


def peft(size: Size, case: Case, dtype: str, checkpointing: bool, device: str) -> tuple[Callable[[], Any], list[Any]]:
    import peft as library

    settings = dict(case.peft)
    kind = getattr(library, settings.pop("kind"))
    base = build(size, dtype)
    base = (packed_by_bitsandbytes(base) if case.quantize else base).to(device)  # moving packs
    model: Any = library.get_peft_model(base, kind(task_type="CAUSAL_LM", **settings))
    batch = {name: tensor.to(device) for name, tensor in batch_of(size, case).items()}
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return lambda: model(**batch, use_cache=False).loss, [p for p in model.parameters() if p.requires_grad]


def frozen(size: Size, case: Case, dtype: str, device: str) -> tuple[Callable[[], Any], list[Any]]:
    model = build(size, dtype).to(device)
    batch = {name: tensor.to(device) for name, tensor in batch_of(size, case).items()}
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return lambda: model(**batch, use_cache=False).loss, []


def products(size: Size, dtype: str, device: str) -> Callable[[], None]:
    """The large products of one step, forward and backward, and nothing else."""
    import torch

    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    count = size.rows * size.tokens
    h, f, v = size.hidden, size.feed_forward, size.vocabulary
    shapes = [(h, h)] * 4 * size.layers + [(h, f), (h, f), (f, h)] * size.layers + [(h, v)]
    weights = {shape: torch.randn(shape[1], shape[0]).to(device, kind) for shape in set(shapes)}
    chunk = 256  # the head's, whose output would not fit

    def step() -> None:
        for width_in, width_out in shapes:
            x, w = torch.zeros(count, width_in, dtype=kind, device=device), weights[width_in, width_out]
            for start in range(0, count, chunk if width_out == v else count):
                part = x[start : start + (chunk if width_out == v else count)]
                (part @ w.T) @ w

    return step


def serve(name: str, size: Size, case: Case, dtype: str, device: str) -> None:
    """Answer each line of the input with one step's figures."""
    import torch

    torch.set_num_threads(1)
    # peft imports it, and it tells of a kernel of its own that is not installed and that nothing here would call.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parameters: list[Any] = []
    if name == "products":
        bare = products(size, dtype, device)
    else:
        if name.startswith("ours"):
            loss_of, parameters = ours(size, case, dtype, name.partition("-")[2] or "none", device)
        elif name.startswith("peft"):
            loss_of, parameters = peft(size, case, dtype, name.endswith("checkpointing"), device)
        else:
            loss_of, parameters = frozen(size, case, dtype, device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3) if parameters else None
    gc.collect()
    rest = held_bytes(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = None
        if name == "products":
            bare()
        else:
            value = loss_of()
            value.backward()
            loss = float(value.detach())
            del value
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        found = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "loss": loss}
        print(json.dumps(found | {"peak_bytes": peak_bytes(device) - rest}), flush=True)


def held_bytes(device: str) -> int:
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else resident_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# --- all of them, in turn -------------------------------------------------------------------------------------------


def start(name: str, arguments: argparse.Namespace, case: str, dtype: str) -> subprocess.Popen[str]:
    words = ["--worker", name, "--case", case, "--dtype", dtype, "--tokens", str(arguments.tokens or 0)]
    words += ["--rows", str(arguments.rows or 0), "--device", arguments.device]
    words += [word for name in SHAPE for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name) or 0))]
    words += ["--quick"] if arguments.quick else []
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{name} did not start")
    return process


def measure(arguments: argparse.Namespace, case: str, dtype: str) -> dict[str, Any]:
    """Every contender's figures for one case and type."""
    names = [name for name in CONTENDERS if name in arguments.contenders.split(",")]
    if case != "top-quarter":  # something acts in the first block of the others
        names = [name for name in names if name != "ours-cached"]
    running = {name: start(name, arguments, case, dtype) for name in names}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for _ in range(arguments.repeats + 1):  # the first is for warming up
            for name, process in running.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                turns[name].append(json.loads(process.stdout.readline()))
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    yardstick = "peft" if "peft" in names else names[0]
    size = size_of(arguments)
    # A GPU works while the processor waits.
    clock = "wall_s" if arguments.device == "cuda" else "cpu_s"
    found: dict[str, Any] = {}
    for name, steps in turns.items():
        timed = steps[1:]
        against = [a[clock] / b[clock] for a, b in zip(timed, turns[yardstick][1:], strict=True)]
        found[name] = {
            "cpu_s": statistics.median(step["cpu_s"] for step in timed),
            "wall_s": statistics.median(step["wall_s"] for step in timed),
            "time_against": statistics.median(against),
            "peak_over_rest_mib": round(steps[-1]["peak_bytes"] / 2**20, 1),
            "losses": [step["loss"] for step in steps],
        }
    for entry in found.values():
        entry["memory_against"] = entry["peak_over_rest_mib"] / max(found[yardstick]["peak_over_rest_mib"], 1e-9)
        entry["tokens_per_s"] = round(size.rows * size.tokens / entry[clock])
        if "products" in found:
            entry["products_share"] = found["products"][clock] / entry[clock]
    return {
        "case": case,
        "dtype": dtype,
        "device": arguments.device,
        "clock": clock,
        "size": dataclasses.asdict(size),
        "contenders": found,
    }


def misfits(found: dict[str, Any]) -> list[str]:
    """Contenders that train something and whose losses are not those of the yardstick."""
    contenders = {n: e["losses"] for n, e in found["contenders"].items() if n.startswith(("ours", "peft"))}
    if not contenders:
        return []
    wanted = contenders.get("peft") or next(iter(contenders.values()))
    # Random starts (A, prompts, dropout) differ; the first loss is the base's, unless virtual tokens come first.
    close = 0.02 if found["dtype"] == "bf16" else 0.005
    if found["case"] in ("prefix", "prompt", "lora-dropout"):
        close = 0.5
    return [
        f"{name}: losses {losses[0]:.4f} to {losses[-1]:.4f}, wanted {wanted[0]:.4f} to {wanted[-1]:.4f}"
        for name, losses in contenders.items()
        if abs(losses[0] - wanted[0]) > close or abs(losses[-1] - wanted[-1]) > max(close, 0.05 * wanted[-1])
    ]


def table(found: dict[str, Any]) -> str:
    size, clock = found["size"], found.get("clock", "cpu_s")
    lines = [
        f"{found['case']}, {found['dtype']}, {size['rows']} x {size['tokens']} tokens",
        "",
        f"| contender | {'wall' if clock == 'wall_s' else 'CPU'} time | against peft | peak over rest | against peft "
        "| tokens/s | products' share | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in found["contenders"].items():
        losses = f"{entry['losses'][0]:.4f} to {entry['losses'][-1]:.4f}" if entry["losses"][0] is not None else ""
        cells = [
            name,
            f"{entry[clock]:.3f} s",
            f"{entry['time_against']:.2f}",
            f"{entry['peak_over_rest_mib']:.0f} MiB",
            f"{entry['memory_against']:.2f}",
            f"{entry.get('tokens_per_s', entry.get('tokens_per_cpu_s'))}",
            f"{entry['products_share']:.2f}" if "products_share" in entry else "",
            losses,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def kept_in(place: Path) -> dict[str, Any]:
    return dict(json.loads(place.read_text())) if place.exists() else {}


def torch_device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def size_of(arguments: argparse.Namespace) -> Size:
    size = QUICK if arguments.quick else Size()
    given = {name: getattr(arguments, name) for name in ("tokens", "rows", *SHAPE)}
    return dataclasses.replace(size, **{name: value for name, value in given.items() if value})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="lora", help=f"some of {', '.join(CASES)}, or all")
    parser.add_argument("--dtype", default="bf16,f32")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, help="tokens a row")
    parser.add_argument("--rows", type=int, help="rows of the batch")
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="of the model, in place of the usual")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--resume", action="store_true", help="leave out cases that --out has already")
    parser.add_argument("--quick", action="store_true", help="a tiny size: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "training_speed.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, size_of(arguments), CASES[arguments.case], arguments.dtype, arguments.device)
        return 0
    failed = False
    for case in CASES if arguments.case == "all" else arguments.case.split(","):
        for dtype in arguments.dtype.split(","):
            size = dataclasses.asdict(size_of(arguments))
            key = f"{case} {dtype} {size['rows']}x{size['tokens']}"
            if arguments.device != "cpu":
                key += f" {size['hidden']}x{size['layers']} {torch_device_name()}"
            found = kept_in(arguments.out).get(key) if arguments.resume else None
            if found is None or found["size"] != size:
                found = measure(arguments, case, dtype)
                stored = kept_in(arguments.out) | {key: found | {"machine": platform.machine(), "threads": 1}}
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(stored, indent=1) + "\n")
            print(table(found), flush=True)
            for line in misfits(found):
                failed = True
                print(f"not the same work: {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
