"""`compare`: methods and seeds on the same rows with the same means; interruptible, and taken up where it stopped.

    plan        contestants sized to the budget; everything that can be wrong is looked for before anything is trained
    rates       the learning rate of each method, by the same number of trials on the validation rows
    runs        each method with each seed, trained with its rate; the test rows are scored once, here
    in-context  the untouched base with examples in its prompt
    baselines   the commonest label, TF-IDF, the frozen base with a trained head; the untouched base for texts

Every finished trial and run is a file of its own in the folder, written at once or not at all.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graftlm
from graftlm.comparison.bench import Bench, open_bench
from graftlm.comparison.budgets import count, sized, trained_beside_head
from graftlm.comparison.incontext import in_context, prompted
from graftlm.comparison.settings import ComparisonSettings, read_budget
from graftlm.comparison.summary import break_even, summarised
from graftlm.core import Method
from graftlm.data.collating import length_of
from graftlm.errors import EnvironmentFault, Finding, GraftError, RunError
from graftlm.formats.atomic import write_json
from graftlm.methods import Full, read_method
from graftlm.models import fingerprint, load_base
from graftlm.report import write_comparison
from graftlm.settings.calls import call_as_text
from graftlm.training.decisions import positions_taken, title_of
from graftlm.training.early import context_of
from graftlm.training.environment import environment
from graftlm.training.folder import free_folder
from graftlm.training.progress import clock

__all__ = ["Comparison", "Contestant", "compare", "compare_with"]

_RECORD = "comparison.json"
_LADDER = 3  # trials that need no estimator
_OUT = 1e9  # the value of a rate with which training breaks down
_RANGE = 8.0  # learning rates are looked for from an eighth to eight times the method's own


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its folder, and what `comparison.json` says."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def contestants(self) -> list[dict[str, Any]]:
        """The lines of the table, the best first: `name`, `score`, `low`, `high`, `cost`."""
        return list(self.record["summary"]["contestants"])

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Every pair with its difference, corrected p-value and verdict on the first."""
        return list(self.record["summary"]["pairs"])

    @property
    def report(self) -> Path:
        """The page that tells the comparison."""
        return self.folder / "report.html"


@dataclass(frozen=True)
class Contestant:
    """One method as it competes: as it was written, and in the size that meets the budget."""

    name: str
    title: str
    method: Method
    parameters: int


def compare(
    data: str | Path | None = None,
    *,
    base: str | Path = "bundled",
    methods: Sequence[str] | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
    jobs: int = 1,
    **settings: Any,
) -> Comparison:
    """Compare `methods` on `data`, and leave a folder with every run, the tables and a report.

    `settings` are the fields of `ComparisonSettings`: `seeds=5`, `budget="0.3%"`, `trials=4`, `shots=(4,)`, ... A
    comparison that was stopped is taken up by the same call with its folder as `output`. `jobs` methods or seeds are
    trained beside one another, each by a process with one thread; the base is in memory once (Linux, no accelerator).
    Raises GraftError with everything that is wrong, before anything is trained.

    Example:
        >>> found = compare("tickets.csv", methods=["lora", "ia3"], seeds=3, budget="0.3%")     # doctest: +SKIP
        >>> [(c["name"], c["score"]) for c in found.contestants]                                # doctest: +SKIP
    """
    given: dict[str, Any] = {"data": str(data) if data is not None else None, "base": str(base)} | settings
    if methods is not None:
        given["methods"] = tuple(str(method) for method in methods)
    for key in ("shots", "waive"):
        if key in given:
            given[key] = tuple(given[key])
    settled = ComparisonSettings(**given)
    called = given | {"output": output if output is None else str(output), "jobs": jobs if jobs != 1 else None}
    command = call_as_text("graftlm.compare", called)
    return compare_with(settled, output=output, quiet=quiet, command=command, jobs=jobs)


def compare_with(
    settings: ComparisonSettings,
    *,
    output: str | Path | None = None,
    quiet: bool = False,
    command: str = "",
    jobs: int = 1,
) -> Comparison:
    """Compare as `settings` say; see `compare`."""
    if jobs > 1 and sys.platform != "linux":
        raise RunError(
            Finding("U159", f"--jobs {jobs} shares the base by fork, which is safe on Linux alone", fix="--jobs 1")
        )
    if settings.trials > _LADDER:
        need_optuna()
    folder = Path(output).expanduser() if output else free_folder(settings.data or "bundled:messages", parent=_PARENT)
    _check_folder(folder, settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return _Work(settings, folder, quiet, command, jobs).run()


_PARENT = Path("comparisons")
_NEEDED = ("settings", "data", "base", "started")


class _Work:
    """The steps of one comparison, with what they hand to one another."""

    def __init__(self, settings: ComparisonSettings, folder: Path, quiet: bool, command: str, jobs: int = 1) -> None:
        self.settings, self.folder, self.quiet, self.command, self.jobs = settings, folder, quiet, command, jobs
        self.is_apart = False  # in a process of its own, which says nothing

    def run(self) -> Comparison:
        began_s = time.monotonic()
        bench = open_bench(self.settings)
        if self.jobs > 1 and bench.model.device.type != "cpu":
            message = f"--jobs {self.jobs} shares the base by fork, which accelerators do not allow"
            raise RunError(Finding("U159", message, fix="--jobs 1"))
        contestants = planned(bench)
        seeds = list(range(self.settings.seeds))
        prompts = {
            (shots, seed): prompted(self._causal(bench, tokens_only=True), shots, seed)
            for shots in self.settings.shots
            for seed in (seeds if shots else [0])
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self._record(bench)
        self._say_plan(bench, contestants, record)
        before = self.sha256 = bench.weights_sha256()
        self.done, self.total = 0, len(contestants) * (self.settings.trials * (self.settings.trials > 1) + len(seeds))
        self.started_s, self.fitted = time.monotonic(), 0

        tuned = self._all(self._tuned, [(bench, c) for c in contestants])
        factors = {c.name: factor for c, factor in zip(contestants, tuned, strict=True)}
        runs = self._all(self._trained, [(bench, c, factors[c.name], seed) for c in contestants for seed in seeds])
        record["base"]["sha256_before"], record["base"]["sha256_after"] = before, bench.weights_sha256()
        if before != record["base"]["sha256_after"]:
            raise AssertionError("the base changed during the comparison")  # a defect of ours
        listed = [_line(bench, c, factors[c.name]) for c in contestants]
        more, baseline_runs = self._baselines(bench)
        listed, runs = [*listed, *more], [*runs, *baseline_runs]
        if prompts:
            more, shown = self._prompted(bench, prompts)
            listed, runs = [*listed, *more], [*runs, *shown]

        truth = [int(item["labels"]) for item in bench.test] if bench.has_classes else None
        count = len(bench.labels) if bench.labels else 0
        found = summarised(listed, runs, bench.measure, truth=truth, labels=count)
        record["summary"] = _with_break_even(found)
        record["status"] = "done"
        record["seconds"] = round(record.get("seconds", 0.0) + time.monotonic() - began_s, 1)
        record["finished"] = _now()
        keep(self.folder / _RECORD, record)
        write_comparison(self.folder)
        self._say("report", str(self.folder / "report.html"))
        return Comparison(self.folder, record)

    def _all(self, do: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`do(*task)` of each task, in their order; beside one another where there are jobs for it.

        Processes of their own leave their results in the folder, where they are then found.
        """
        if self.jobs == 1:
            return [do(*task) for task in tasks]
        found: dict[int, Any] = {}
        for at, fitted in _apart(self, do, tasks):
            self.fitted += fitted
            found[at] = do(*tasks[at])
        return [found[at] for at in range(len(tasks))]

    # --- the record ---

    def _record(self, bench: Bench) -> dict[str, Any]:
        """`comparison.json`; one that is there must be of the same rows and the same base."""
        place = self.folder / _RECORD
        record: dict[str, Any] = {
            "graftlm": graftlm.__version__,
            "status": "running",
            "started": _now(),
            "command": self.command,
            "settings": self.settings.to_dict(),
            "task": bench.task,
            "new_head": bench.has_new_head,
            "labels": [bench.labels.name(at) for at in range(len(bench.labels))] if bench.labels else None,
            "steps": bench.steps,
            "rows": {"train": len(bench.train), "validation": len(bench.validation), "test": len(bench.test)},
            "data": {"sha256": bench.sha256, "lines": list(bench.lines)},
            "base": {
                "name": self.settings.base,
                "class": type(bench.model).__name__,
                "fingerprint": fingerprint(bench.model),
                "parameters": bench.base_parameters,
            },
            "budget": self.settings.budget and read_budget(self.settings.budget, bench.base_parameters),
            "environment": environment(bench.model),
        }
        if place.exists():
            there = _kept(place, _NEEDED) or {}
            for key, what in (("data", "sha256"), ("base", "fingerprint")):
                if there[key][what] != record[key][what]:
                    message = f"the {key} changed since the comparison in {self.folder} began"
                    raise RunError(Finding("U152", message, fix=f"-o {free_folder(self.folder.name, parent=_PARENT)}"))
            record |= {"started": there["started"], "seconds": there.get("seconds", 0.0)}
        keep(place, record)
        return record

    # --- learning rates ---

    def _tuned(self, bench: Bench, contestant: Contestant) -> float:
        """The factor on the method's own learning rates that did best on the validation rows; ties go to the first."""
        if self.settings.trials == 1:
            return 1.0
        history: list[tuple[float, float]] = []
        for number in range(self.settings.trials):
            place = self.folder / "trials" / contestant.name / f"{number}.json"
            found = _kept(place, ("factor", "value"))
            if found is None:
                factor = next_factor(history)
                try:
                    with bench.fitted(contestant.method, seed=0, factor=factor):
                        scored = bench.scored(bench.validation)
                    found = {"factor": factor, "value": bench.measure.to_be_small(scored), "score": scored.mean}
                    found["nats"] = scored.mean_nats
                except RunError as error:  # a loss that is no number any more: the rate is out of the question
                    if number == 0:
                        raise
                    found = {"factor": factor, "value": _OUT, "failed": error.findings[0].message}
                found["learning_rates"] = bench.rates(contestant.method, factor)
                keep(place, found)
                self.fitted += 1
            history.append((found["factor"], found["value"]))
            told = f"validation {found['score']:.4f}" if "score" in found else found["failed"]
            self._progress(f"{contestant.name}: rate x {found['factor']:.3g}, {told}")
        return min(history, key=lambda pair: pair[1])[0]

    # --- runs ---

    def _trained(self, bench: Bench, contestant: Contestant, factor: float, seed: int) -> dict[str, Any]:
        place = self.folder / "runs" / f"{contestant.name}-{seed}.json"
        found = _kept_run(place)
        if found is None:
            with bench.fitted(contestant.method, seed=seed, factor=factor, counted=True) as (_, cost):
                scored = bench.scored(bench.test)
                general, other = bench.on_general(), bench.on_other()
            found = _run(contestant.name, seed, scored) | {
                "method": str(contestant.method),
                "factor": factor,
                "learning_rates": bench.rates(contestant.method, factor),
                "cost": dataclasses.asdict(cost),
                "general": general,
                "other": other,
            }
            keep(place, found)
            self.fitted += 1
        score = float(np.sum(found["values"]) / max(np.sum(found["counts"]), 1))
        self._progress(f"{contestant.name}, seed {seed}: test {score:.4f}")
        return found

    def _baselines(self, bench: Bench) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Yardsticks that learn from the same training rows, or from none."""
        rivals = bench.measure.rivals(bench.learnt, bench.train, bench.test)
        runs = []
        for rival in rivals:
            place = self.folder / "runs" / f"{rival.name}.json"
            found = _kept_run(place)
            if found is None:
                found = _run(rival.name, 0, rival.scored())
                if rival is rivals[0]:  # the body as it was, which none of them changes
                    found |= {"general": bench.on_general(), "other": bench.on_other()}
                keep(place, found)
            runs.append(found)
        return [{"name": rival.name, "title": rival.title, "kind": "baseline"} for rival in rivals], runs

    def _causal(self, bench: Bench, *, tokens_only: bool = False) -> Bench:
        """The bench, on whose base a language model can be prompted."""
        if bench.task != "sft" and not bench.has_classes:
            message = f"--shots is for labels and answers in chats, and these rows are for {bench.task}"
            raise RunError(Finding("U153", message, fix="leave --shots out"))
        if tokens_only and bench.has_new_head and not hasattr(bench.model, "score"):
            message = f"{self.settings.base} is an encoder: it cannot be prompted with examples"
            raise RunError(Finding("U153", message, fix="leave --shots out"))
        return bench

    def _prompted(
        self, bench: Bench, prompts: Mapping[tuple[int, int], Any]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        model = bench.model
        lines, runs = [], []
        for shots in self.settings.shots:
            name = f"in-context-{shots}"
            own = []
            for seed in [seed for k, seed in prompts if k == shots]:
                place = self.folder / "runs" / f"{name}-{seed}.json"
                found = _kept(place, ("values", "counts"))
                if found is None:
                    if bench.has_new_head and model is bench.model:
                        # One base in memory: the classifier has had its turn.
                        bench.model = bench.model.to("meta")
                        model, _ = load_base(self.settings.base, task="lm", dtype=self.settings.dtype)
                        bench.model = model
                    asked = in_context(model, bench, prompts[shots, seed])
                    found = _run(name, seed, asked.scored) | {
                        key: getattr(asked, key)
                        for key in (
                            "query_flops", "cached_query_flops", "cache_bytes", "query_seconds",
                            "cached_query_seconds", "cache_difference",
                        )
                    }  # fmt: skip
                    keep(place, found)
                own.append(found)
                score = float(np.sum(found["values"]) / max(np.sum(found["counts"]), 1))
                self._say("prompt", f"{shots} examples, seed {seed}: test {score:.4f}")
            runs += own
            keys = ("query_flops", "cached_query_flops", "cache_bytes", "query_seconds", "cached_query_seconds")
            lines.append(
                {
                    "name": name,
                    "title": f"untouched base, {shots} shown",
                    "kind": "in-context",
                    "shots": shots,
                    "prompting": {key: float(np.median([run[key] for run in own])) for key in keys},
                }
            )
        return lines, runs

    # --- what is said ---

    def _say_plan(self, bench: Bench, contestants: Sequence[Contestant], record: Mapping[str, Any]) -> None:
        for at, line in enumerate(bench.lines):
            self._say("" if at else "data", line)
        where = f"{self.settings.base}  {type(bench.model).__name__}  {bench.base_parameters:,} parameters"
        self._say("base", where)
        if record["budget"]:
            self._say("budget", f"{record['budget']:,} trained parameters beside the head ({self.settings.budget})")
        for at, c in enumerate(contestants):
            share = 100 * c.parameters / bench.base_parameters
            self._say("" if at else "methods", f"{c.name:<10} {c.method}  {c.parameters:,} ({share:.2g} %)")
        trials = self.settings.trials if self.settings.trials > 1 else 0
        self._say(
            "plan",
            f"{len(contestants)} methods x ({trials} trials + {self.settings.seeds} seeds) x {bench.steps} steps",
        )

    def _progress(self, said: str) -> None:
        self.done += 1
        left = ""
        if self.fitted:
            each_s = (time.monotonic() - self.started_s) / self.fitted
            left = f"  about {clock(each_s * (self.total - self.done))} left"
        self._say(f"{self.done}/{self.total}", f"{said}{left if self.done < self.total else ''}")

    def _say(self, what: str, line: str) -> None:
        if self.is_apart:
            return
        text = f"{what:<9}{line}"
        if not self.quiet:
            print(text, flush=True)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(text.rstrip() + "\n")


# --- processes ---

_FORKED: tuple[_Work, Callable[..., Any], Sequence[tuple[Any, ...]]]  # what a forked process finds in its memory


def _apart(work: _Work, do: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, int]]:
    """Do the tasks in forked processes; yields the place of each one that is done and how many trainings it took."""
    global _FORKED
    _FORKED = (work, do, tasks)
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(work.jobs, len(tasks)), context, initializer=_alone)
    try:
        with warnings.catch_warnings():
            # Its threads are those of torch's kernels, of which the new processes have none and use none.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            waiting = {pool.submit(_done_apart, at): at for at in range(len(tasks))}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        message = "a process that trained was ended from outside, most likely for want of memory"
        raise RunError(Finding("U159", message, fix="--jobs 1 goes on: what is finished is kept")) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _alone() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _done_apart(at: int) -> int:
    work, do, tasks = _FORKED
    work.is_apart, before = True, work.fitted
    do(*tasks[at])
    bench: Bench = tasks[at][0]
    if bench.weights_sha256() != work.sha256:
        raise AssertionError("the base changed during the comparison")  # a defect of ours
    return work.fitted - before


# --- contestants ---


def planned(bench: Bench) -> list[Contestant]:
    """The methods in the sizes that meet the budget, full fine-tuning beside them.

    Raises GraftError with every method that is unknown, does not fit the base, or is above the budget.
    """
    settings = bench.settings
    budget = read_budget(settings.budget, bench.base_parameters) if settings.budget else None
    faults: list[Finding] = []
    found: list[Contestant] = []
    for text in [*settings.methods, *(["full"] if settings.full and "full" not in settings.methods else [])]:
        try:
            asked = trained_beside_head(read_method(text))
            is_full = any(isinstance(part, Full) for part in asked.parts)
            longest = max(1, (context_of(bench.model.config) - bench.max_length) or context_of(bench.model.config) // 4)
            method = asked if budget is None or is_full else sized(bench.model, asked, budget, longest=longest)
            taken = positions_taken(method)
            rows = (bench.train, bench.validation, bench.test)
            most = max(length_of(item) for part in rows for item in part)
            if most + taken > context_of(bench.model.config):
                message = f"{method} takes {taken} positions, and rows have up to {most} tokens"
                raise RunError(Finding("U151", message, fix=f"--max-length {context_of(bench.model.config) - taken}"))
            name = _name(text)
            found.append(Contestant(name, title_of(asked), method, count(bench.model, method)))
        except GraftError as error:
            faults += error.findings
    names = [c.name for c in found]
    if not faults and len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        faults.append(Finding("U154", f"{', '.join(twice)} is named twice", fix="--methods lora,ia3"))
    if not faults and len(found) + len(settings.shots) < 2:
        faults.append(Finding("U154", "one contestant alone is no comparison", fix="--methods lora,ia3"))
    if faults:
        raise RunError(faults)
    return found


def _name(text: str) -> str:
    """A method's text as the name of files and lines: `lora(rank=4)` is `lora-rank-4`."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _line(bench: Bench, contestant: Contestant, factor: float) -> dict[str, Any]:
    return {
        "name": contestant.name,
        "title": contestant.title,
        "kind": "trained",
        "method": str(contestant.method),
        "learning_rate": bench.rates(contestant.method, factor)[0],
        "factor": factor,
    }


# --- learning rates ---


def need_optuna() -> Any:
    """Optuna; EnvironmentFault (E131) where it is not installed."""
    try:
        import optuna
    except ImportError:
        message = "choosing learning rates needs optuna, which is not installed"
        fix = "pip install 'graftlm[compare]', or at most --trials 3"
        raise EnvironmentFault(Finding("E131", message, fix=fix)) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def next_factor(history: Sequence[tuple[float, float]]) -> float:
    """The factor on a method's learning rates to try next, after (factor, value to be made small) so far.

    The first is 1, the method's own rate, the second 3, the third on from there if that was better and a third if not:
    few trials must not depend on luck, which would favour one method over another. From the fourth on, Optuna's
    tree-structured Parzen estimator looks from an eighth to eight times the rate, on a logarithmic scale. What comes
    next depends on the history alone, so that a comparison that was stopped goes on as if it had not been.
    """
    if len(history) < 2:
        return (1.0, 3.0)[len(history)]
    if len(history) < _LADDER:
        return _RANGE if history[1][1] < history[0][1] else 0.333
    optuna = need_optuna()

    space = optuna.distributions.FloatDistribution(1 / _RANGE, _RANGE, log=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=len(history), n_startup_trials=3)
        study = optuna.create_study(sampler=sampler)
        for factor, value in history:
            study.add_trial(
                optuna.trial.create_trial(params={"factor": factor}, distributions={"factor": space}, value=value)
            )
        return float(f"{study.ask({'factor': space}).params['factor']:.3g}")


# --- what is kept ---


def keep(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON into `path`, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    write_json(temporary, dict(value))
    os.replace(temporary, path)


def _kept(path: Path, needs: Sequence[str]) -> dict[str, Any] | None:
    """What was kept in a file; None where it is not there. Raises RunError (U160) where it lacks what it `needs`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, f"it is no JSON ({error})") from None
    if not isinstance(found, dict) or (lacking := [name for name in needs if name not in found]):
        raise _damaged(path, f"it has no {', '.join(lacking)}" if isinstance(found, dict) else "it is no object")
    return found


def _kept_run(path: Path) -> dict[str, Any] | None:
    """As `_kept`, of a run: what was asked beside is told row by row in it."""
    found = _kept(path, ("values", "counts"))
    for name in ("general", "other"):
        if found is not None and not isinstance(found.get(name), (list, type(None))):
            raise _damaged(path, f"its {name} is not told row by row")
    return found


def _damaged(path: Path, why: str) -> RunError:
    fix = f"rm {shlex.quote(str(path))}, and the same command again makes anew what it held"
    return RunError(Finding("U160", f"{path} cannot be gone on from: {why}", fix=fix))


def _run(name: str, seed: int, scored: Any) -> dict[str, Any]:
    return {
        "contestant": name,
        "seed": seed,
        "values": [float(value) for value in scored.values],
        "counts": [int(count) for count in scored.counts],
        "predicted": scored.predicted,
    }


def _check_folder(folder: Path, settings: ComparisonSettings) -> None:
    """Raise RunError (U152) where the folder holds anything but this comparison."""
    place = folder / _RECORD
    if place.exists():
        # Settings that came later were then as they are by themselves.
        there = ComparisonSettings().to_dict() | (_kept(place, _NEEDED) or {})["settings"]
        now = settings.to_dict()
        changed = [f"{key}: {there.get(key)} there, {now[key]} asked for" for key in now if there.get(key) != now[key]]
        if changed:
            fix = f"-o {free_folder(folder.name, parent=folder.parent)}"
            message = f"{folder} holds another comparison"
            raise RunError(Finding("U152", message, detail=tuple(changed[:6]), fix=fix))
    elif folder.is_file() or (folder.is_dir() and any(path.name != "log.txt" for path in folder.iterdir())):
        fix = f"-o {free_folder(folder.name, parent=folder.parent)}"
        raise RunError(Finding("U152", f"{folder} is no comparison and not empty", fix=fix))


def _with_break_even(summary: dict[str, Any]) -> dict[str, Any]:
    """For every trained contestant, after how many queries it is cheaper than each way of prompting."""
    prompting = [row for row in summary["contestants"] if row["kind"] == "in-context"]
    for row in summary["contestants"]:
        if row["kind"] == "trained" and prompting:
            cost = row["cost"]
            row["break_even"] = {
                rival["name"]: {
                    key: break_even(cost["train_flops"], cost["query_flops"], rival["prompting"][name])
                    for key, name in (("plain", "query_flops"), ("cached", "cached_query_flops"))
                }
                for rival in prompting
            }
    return summary


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
