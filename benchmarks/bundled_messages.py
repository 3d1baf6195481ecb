"""The main job over several seeds: LoRA on the bundled base against the frozen base with a trained head.

    python benchmarks/bundled_messages.py --seeds 5

Each seed splits the bundled messages anew (480 rows to train on, 120 held out) and starts LoRA anew; LoRA, the frozen
base with a trained head (logistic regression on its hidden states) and TF-IDF are scored on the same held-out rows.
Printed: macro-F1 by seed, and the mean of the paired differences with its standard error. Results go to
benchmarks/results/bundled_messages.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import graftlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bundled_messages.json")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = graftlm.train(output=Path(folder) / "run", seed=seed, quiet=True)
        scores = {score["name"]: score["macro_f1"] for score in run.record["results"]["scores"]}
        rows.append({"seed": seed, "seconds": run.record["seconds"]} | scores)
        print(json.dumps(rows[-1]), flush=True)
    print("\n| seed | LoRA | frozen base + trained head | TF-IDF |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['seed']} | {row['tuned']:.3f} | {row['probe']:.3f} | {row['tfidf']:.3f} |")
    summary = {}
    for rival in ("probe", "tfidf"):
        differences = [row["tuned"] - row[rival] for row in rows]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        summary[rival] = {"mean_difference": statistics.mean(differences), "standard_error": error}
        print(f"LoRA minus {rival}: {summary[rival]['mean_difference']:+.3f} (standard error {error:.3f})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rows": rows, "differences": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
