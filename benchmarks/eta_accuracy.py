"""How near the time left comes: what a run tells at a tenth of its steps, against what the rest of them then took.

    taskset -c 1 python -m benchmarks.eta_accuracy

Runs of the bundled base on its own data, of uneven lengths, with evaluations and checkpoints; by processor time of one
thread, so that other work on the machine does not count. Results go to benchmarks/results/eta_accuracy.json.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import graftlm
from graftlm.training import progress

RESULT = Path(__file__).parent / "results" / "eta_accuracy.json"
RUNS: dict[str, dict[str, Any]] = {
    "answers, 3 epochs": {"data": "answers.jsonl", "epochs": 3.0, "batch": 8},
    "answers, many evaluations": {"data": "answers.jsonl", "epochs": 2.0, "batch": 4, "eval_every": 8},
    "answers, in parts": {"data": "answers.jsonl", "epochs": 3.0, "batch": 16, "accumulate": 4, "recompute": "blocks"},
    "answers, full fine-tuning": {"data": "answers.jsonl", "epochs": 2.0, "batch": 8, "method": "full"},
    "messages, 2 epochs": {"data": "messages.csv", "epochs": 2.0, "batch": 16},
}


class Watched(progress.Progress):
    """Keeps what is told at a tenth, and the clock then and at the end."""

    found: dict[str, float] = {}  # noqa: RUF012

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Keep what is told at a tenth."""
        super().on_step_end(args, state, control, **more)
        if state.global_step == max(2, state.max_steps // 10):
            self.found |= {"steps": state.max_steps, "at": state.global_step}
            self.found |= {"told_s": self._left_s(args, state), "asked_s": time.process_time()}

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Keep what the rest took."""
        self.found["took_s"] = time.process_time() - self.found.pop("asked_s")
        super().on_train_end(args, state, control, **more)


def main() -> None:
    """Train each, and print what was told and what it took."""
    torch.set_num_threads(1)
    progress.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    importlib.import_module("graftlm.training.run").Progress = Watched  # type: ignore[attr-defined]
    bundled = Path(graftlm.__file__).parent / "bundled" / "data"
    results = {}
    for name, options in RUNS.items():
        given = {**options, "data": bundled / options["data"]}
        with tempfile.TemporaryDirectory() as folder:
            Watched.found = {}
            graftlm.train(**given, output=str(Path(folder) / "run"), quiet=True)
            found = Watched.found
        error = found["told_s"] / found["took_s"] - 1
        results[name] = {key: round(value, 2) for key, value in found.items()} | {"error": round(error, 4)}
        print(
            f"| {name} | {found['steps']} | {found['told_s']:.1f} | {found['took_s']:.1f} | {100 * error:+.1f} % |",
            flush=True,
        )
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
