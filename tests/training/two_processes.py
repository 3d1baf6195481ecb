"""One optimizer step on several processes, for `test_processes`: `torchrun two_processes.py OUT rows,task,base ...`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from training.test_invariance import Ready


def step(rows: str, task: str, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step over eight rows, all processes together."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    ready = Ready(rows, task, base, folder)
    several = {"ddp_backend": "gloo"} if processes > 1 else {}
    run = ready.step(folder, batch=8 // processes, max_grad_norm=1e9, **several)
    told = torch.tensor(sum(run.losses))  # this process's share
    if processes > 1:
        torch.distributed.all_reduce(told)
    return {"loss": told, **{f"gradient.{at}": gradient for at, gradient in enumerate(run.gradients[0])}}


def main() -> None:
    out = Path(sys.argv[1])
    for at, case in enumerate(sys.argv[2:]):
        rows, task, base = case.split(",")
        with tempfile.TemporaryDirectory() as folder:
            found = step(rows, task, Path(base), Path(folder))
        if os.environ.get("RANK", "0") == "0":
            save_file(found, out / f"{at}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
