"""Compiled blocks beside the fused forms: time and peak memory of a LoRA step, each in a process of its own.

Blocks are compiled by torch.compile with its usual settings; the loss head is the fused one in all cases. One thread;
of some steps the last is told, and the first, in which compiling is.

    python -m benchmarks.compiled --dtype bfloat16,float32
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
import time

_WAYS = ("fused", "compiled", "neither")


def step_of(way: str, dtype: str, steps: int) -> None:
    """Train some steps one way, and print the last one's figures."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from graftlm import attach, read_method
    from graftlm.kernels import LossHead, fuse

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **shape)).to(getattr(torch, dtype))
    ids = torch.randint(0, 32_000, (4, 512))
    adapter = attach(model, read_method("lora(rank=16,targets=all-linear)"))
    model.train()
    head = LossHead.of(model)
    if way == "compiled":
        for block in model.model.layers:
            block.compile()
    took_s = first_s = 0.0
    with fuse(model, recompute="none") if way == "fused" else contextlib.nullcontext():
        for _ in range(steps):
            began_s = time.process_time()
            loss = head.losses(model, {"input_ids": ids}, ids).mean()
            loss.backward()
            for part in adapter.parts:
                part.delta.zero_grad()
            took_s = time.process_time() - began_s
            first_s = first_s or took_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{way:<10}{dtype:<10}{took_s:6.2f} s  first {first_s:6.2f} s  peak {peak:,.0f} MB  loss {loss.item():.4f}")


def main() -> None:
    """Each way and type in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16,float32", help="types, with commas")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--way", choices=_WAYS, help="this one alone, in this process")
    asked = parser.parse_args()
    for dtype in asked.dtype.split(","):
        for way in [asked.way] if asked.way else _WAYS:
            if asked.way:
                step_of(way, dtype, asked.steps)
            else:
                command = [sys.executable, "-m", "benchmarks.compiled", "--way", way, "--dtype", dtype]
                subprocess.run([*command, "--steps", str(asked.steps)], check=True)


if __name__ == "__main__":
    main()
