"""What adapters cost when text is generated: many in one batch, one on every map, loading the hundredth, switching.

    python -m benchmarks.serving_speed

Each case times one decoded token behind a filled cache. The contenders (the bare base, ours, peft) have the same
weights, their logits are compared first, and they take turns in one process. Printed are medians, and the median of
the ratios of neighbours. The clock is processor time of one thread, so that a busy machine changes little. Shapes: a
Llama of 110M parameters (hidden size 768, 12 layers), and one of 24 layers whose maps are so small that all time is
Python's. Results go to benchmarks/results/serving_speed.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import graftlm

SHAPES = {
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 32000},
    "narrow": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 24, "num_attention_heads": 4,
               "num_key_value_heads": 4, "vocab_size": 1000},
}  # fmt: skip
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def llama(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=1024)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def with_ours(model: Any, names: list[str]) -> Any:
    model = copy.deepcopy(model)
    for number, name in enumerate(names):
        adapter = graftlm.attach(model, graftlm.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"), name=name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        adapter.requires_grad_(False)
    return model


def with_peft(model: Any, ours: Any, names: list[str]) -> Any:
    """The same adapters in peft."""
    theirs = copy.deepcopy(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MAPS)
    theirs = peft.get_peft_model(theirs, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    tensors = dict(theirs.named_parameters())
    for name in names:
        for key, value in graftlm.adapters(ours)[name].state().items():
            path, _, which = key.rpartition(".")
            tensors[f"base_model.model.{path}.{which}.{name}.weight"].data.copy_(value)
    return theirs.eval().requires_grad_(False)


class Decoder:
    """One decoded token for each row of a batch, behind a cache of `filled` tokens."""

    def __init__(self, model: Any, rows: int, filled: int, **options: Any) -> None:
        self.model, self.options, self.filled = model, options, filled
        ids = torch.randint(3, 900, (rows, filled), generator=torch.Generator().manual_seed(1))
        out = model(input_ids=ids, use_cache=True, **options)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1) * 0 + 5
        self.logits = self()

    def __call__(self) -> torch.Tensor:
        """The token's logits; the cache stays as long as it was."""
        out = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True, **self.options)
        self.cache.crop(-1)
        logits: torch.Tensor = out.logits
        return logits


def in_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Milliseconds of each, and their ratios to the first."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 2):
        for name, call in contenders.items():
            began = time.process_time()
            call()
            if repeat > 1:
                found[name].append(1e3 * (time.process_time() - began))
    first = next(iter(found))
    return {
        "ms": {name: round(statistics.median(times), 3) for name, times in found.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(times, found[first], strict=True)), 3)
            for name, times in found.items()
        },
        "to": first,
    }


def agree(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    assert error < (1e-4 if found.dtype == torch.float32 else 0.05), error
    return error


def mixed(shape: str, dtype: torch.dtype, adapters: int, filled: int, repeats: int) -> dict[str, Any]:
    """A batch in which each row has an adapter of its own."""
    base, names = llama(shape, dtype), [f"a{number}" for number in range(adapters)]
    ours = with_ours(base, names)
    theirs = with_peft(base, ours, names)
    graftlm.use(ours, names)
    bare = Decoder(base, adapters, filled)
    mine = Decoder(ours, adapters, filled)
    peft_ = Decoder(theirs, adapters, filled, adapter_names=names)
    error = agree(mine.logits, peft_.logits)
    result = in_turns({"base": bare, "ours": mine, "peft": peft_}, repeats)
    return {**result, "error": error, "peft_over_ours": round(result["ms"]["peft"] / result["ms"]["ours"], 2)}


def single(shape: str, dtype: torch.dtype, filled: int, repeats: int) -> dict[str, Any]:
    """One adapter on all seven maps of each block, one row."""
    base = llama(shape, dtype)
    ours, idle, merged = (with_ours(base, ["a0"]) for _ in range(3))
    theirs = with_peft(base, ours, ["a0"])
    graftlm.use(idle, None)
    graftlm.adapters(merged)["a0"].merge()
    decoders = {
        "base": Decoder(base, 1, filled),
        "ours": Decoder(ours, 1, filled),
        "ours, none acts": Decoder(idle, 1, filled),
        "ours, merged": Decoder(merged, 1, filled),
        "peft": Decoder(theirs, 1, filled),
    }
    error = agree(decoders["ours"].logits, decoders["peft"].logits)
    return {**in_turns(decoders, repeats), "error": error}


def loading(count: int) -> dict[str, Any]:
    """Seconds for the first and the last of `count` adapters, from files."""
    base = llama("narrow", torch.float32)
    found: dict[str, list[float]] = {"ours": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        ours = with_ours(base, ["first"])
        path = graftlm.adapters(ours)["first"].save(Path(folder) / "adapter")
        fresh, theirs = copy.deepcopy(base), None
        for number in range(count):
            began = time.process_time()
            graftlm.load_adapter(fresh, path, name=f"a{number}")
            found["ours"].append(time.process_time() - began)
        for number in range(min(count, 20)):  # it grows with each
            began = time.process_time()
            if theirs is None:
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), path, adapter_name=f"a{number}")
            else:
                theirs.load_adapter(path, adapter_name=f"a{number}")
            found["peft"].append(time.process_time() - began)
    return {
        name: {
            "first_ms": round(1e3 * statistics.median(times[1:6]), 2),
            "last_ms": round(1e3 * statistics.median(times[-5:]), 2),
            "count": len(times),
        }
        for name, times in found.items()
    }


def switching(shape: str, filled: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to switch between adapters, and what the token behind a switch costs more than one without."""
    base = llama(shape, torch.float32)
    ours = with_ours(base, ["a0", "a1"])
    theirs = with_peft(base, ours, ["a0", "a1"])
    mine = Decoder(ours, 1, filled)
    setting: dict[str, list[float]] = {"ours": [], "peft": []}
    later: list[float] = []
    for repeat in range(repeats + 4):
        name = f"a{repeat % 2}"
        began = time.process_time()
        graftlm.use(ours, name)
        set_ = time.process_time()
        mine()
        first = time.process_time()
        mine()
        second = time.process_time()
        theirs.set_adapter(name)
        theirs_set = time.process_time()
        if repeat >= 4:
            setting["ours"].append(1e3 * (set_ - began))
            later.append(1e3 * ((first - set_) - (second - first)))
            setting["peft"].append(1e3 * (theirs_set - second))
    return {
        "ours_ms": round(statistics.median(setting["ours"]), 4),
        "ours_next_token_more_ms": round(statistics.median(later), 4),
        "peft_ms": round(statistics.median(setting["peft"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--filled", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--adapters", type=int, default=16, help="adapters in the mixed batch")
    parser.add_argument("--loaded", type=int, default=100, help="adapters to load one after another")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"torch": torch.__version__, "peft": peft.__version__, "rank": RANK,
                               "filled": options.filled, "repeats": options.repeats}  # fmt: skip
    with torch.inference_mode(False), torch.no_grad():
        print("| case | base, ms | ours, ms | ours / base | peft, ms | peft / base | ours merged / base |")
        print("|---|---|---|---|---|---|---|")
        for shape in options.shapes:
            for dtype in (torch.float32, torch.bfloat16):
                kind = str(dtype).removeprefix("torch.")
                for what, run in (
                    (f"{options.adapters} adapters in {options.adapters} rows",
                     lambda s=shape, d=dtype: mixed(s, d, options.adapters, options.filled, options.repeats)),
                    ("one adapter, one row", lambda s=shape, d=dtype: single(s, d, options.filled, options.repeats)),
                ):  # fmt: skip
                    row = results[f"{shape} {kind}, {what}"] = run()
                    ms, ratio = row["ms"], row["ratio"]
                    print(
                        f"| {shape} {kind}, {what} | {ms['base']:.2f} | {ms['ours']:.2f} | {ratio['ours']:.2f} | "
                        f"{ms['peft']:.2f} | {ratio['peft']:.2f} | {ratio.get('ours, merged', '')} |",
                        flush=True,
                    )
        results["loading"] = loading(options.loaded)
        print(json.dumps({"loading": results["loading"]}), flush=True)
        results["switching"] = switching("narrow", options.filled, options.repeats)
        print(json.dumps({"switching": results["switching"]}), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
