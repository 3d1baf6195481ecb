"""A training step of four new tokens at GPT-2's widths, here and in peft: processor time and memory beyond the base.

    python -m benchmarks.trained_tokens

Each contender runs in a process of its own, in turns; the fastest of four steps counts, and the largest resident size.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

IDS = [100, 200, 300, 400]
ROUNDS, STEPS = 2, 4


def ready(contender: str) -> tuple[Any, list[Any]]:
    """The model to be called, and what is trained."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2)).train()
    if contender == "peft":
        import peft

        model = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=IDS))
        return model, [parameter for parameter in model.parameters() if parameter.requires_grad]
    from graftlm import TrainableTokens, attach

    return model, list(attach(model, TrainableTokens(IDS)).parameters())


def measure(contender: str) -> None:
    """Print seconds of the fastest step and the megabytes that the steps took beyond the model."""
    import torch

    model, trained = ready(contender)
    ids = torch.randint(0, 50257, (2, 128))
    ids[:, 5] = IDS[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.process_time() - start)
        for parameter in trained:
            parameter.grad = None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{contender:8} step {min(seconds):.2f} s   memory {grown:.0f} MB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for contender in ("graftlm", "peft") * ROUNDS:
            subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.trained_tokens", contender], check=True)
