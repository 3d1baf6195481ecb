"""What a batch costs whose rows have different methods, against the same batch with one LoRA for all rows.

    python benchmarks/mixed_methods.py

Ten rows: the base alone, LoRA, (IA)^3, series and parallel adapters, a prefix, a prompt, BitFit, sparse values, and
three of them together. Timed are a forward over all tokens and one decoded token of `generate` with its cache, on a
random model of Llama's shape (hidden size 512, 8 layers) and on the bundled base, in processor time of one thread. The
two routings take turns, so that what else the machine does meets both alike; printed are medians, and that of the
ratios of neighbours. Methods that cannot be attached are left out, and said. Results go to
benchmarks/results/mixed_methods.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import graftlm
from graftlm.errors import GraftError

#: What is attached, by name: the first text that reads and fits.
METHODS = {
    "lora": ("lora(rank=8,targets=attention)",),
    "ia3": ("ia3",),
    "series": ("series(reduction=16)", "series"),
    "parallel": ("parallel(reduction=16)", "parallel"),
    "prefix": ("prefix(length=16)",),
    "prompt": ("prompt(length=16)",),
    "bitfit": ("bitfit(add=true)", "bitfit(add_missing=true)", "bitfit"),
    "sparse": ("sparse(share=0.005,score=magnitude)", "sparse(score=magnitude)", "sparse"),
}
TOGETHER = ("lora", "ia3", "series")
TARGET = 1.5


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def attach_all(model: Any) -> tuple[list[Any], dict[str, str]]:
    """A choice for each row, and what could not be attached, with the reason."""
    missing: dict[str, str] = {}
    for name, texts in METHODS.items():
        for text in texts:
            try:
                adapter = graftlm.attach(model, graftlm.method(text), name=name)
            except GraftError as error:
                missing[name] = str(error).splitlines()[0]
                continue
            missing.pop(name, None)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
            break
    there = [name for name in METHODS if name not in missing]
    together = tuple(name for name in TOGETHER if name in there)
    return [None, *there, *([together] if len(together) > 1 else [])], missing


def batch_of(model: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Left-padded rows of different lengths, as generation has them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : (row * 7) % (tokens // 4)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def forward_s(model: Any, batch: dict[str, torch.Tensor]) -> float:
    began = time.process_time()
    model(**batch, use_cache=False)
    return time.process_time() - began


def token_s(model: Any, batch: dict[str, torch.Tensor], tokens: int = 8) -> float:
    """Seconds for one decoded token, the median of a few."""
    stamps: list[float] = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            stamps.append(time.process_time())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    clock = transformers.StoppingCriteriaList([Clock()])
    model.generate(**batch, min_new_tokens=tokens + 1, max_new_tokens=tokens + 1, do_sample=False,
                   stopping_criteria=clock)  # fmt: skip
    return statistics.median(after - before for before, after in itertools.pairwise(stamps))


def compare(model: Any, routing: list[Any], measure: Callable[[], float], repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"lora": [], "mixed": []}
    for repeat in range(repeats + 1):
        for name, spec in (("lora", "lora"), ("mixed", routing)):
            with graftlm.use(model, spec):
                seconds = measure()
            if repeat:  # the first warms up
                found[name].append(seconds)
    ratios = [mixed / lora for mixed, lora in zip(found["mixed"], found["lora"], strict=True)]
    return {
        "lora_ms": round(1e3 * statistics.median(found["lora"]), 3),
        "mixed_ms": round(1e3 * statistics.median(found["mixed"]), 3),
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixed_methods.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"tokens": options.tokens, "repeats": options.repeats, "threads": options.threads}
    print("| model | rows | one LoRA, ms | mixed, ms | ratio |\n|---|---|---|---|---|")
    for name, make in (("llama-512x8", llama), ("bundled", lambda: graftlm.load_base("bundled")[0])):
        model = make()
        model.generation_config.eos_token_id = None
        routing, missing = attach_all(model)
        batch = batch_of(model, len(routing), options.tokens)
        with torch.inference_mode():
            timed = {
                "forward": compare(model, routing, lambda b=batch, m=model: forward_s(m, b), options.repeats),
                "token": compare(model, routing, lambda b=batch, m=model: token_s(m, b), options.repeats),
            }
        results[name] = {"routing": [str(choice) for choice in routing], "left_out": missing, **timed}
        for what, row in timed.items():
            verdict = "" if row["ratio"] <= TARGET else f" (above {TARGET})"
            print(
                f"| {name}, {what} | {len(routing)} | {row['lora_ms']:.1f} | {row['mixed_ms']:.1f} | "
                f"{row['ratio']:.2f}{verdict} |",
                flush=True,
            )
        for left_out, reason in missing.items():
            print(f"  left out on {name}: {left_out}: {reason}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
