"""`choose`: method, size, placement and learning rate by successive halving, within limits of memory and time.

Candidates are trained for a few steps, the better third of them for three times as many, and so on up to the whole
(Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification"; the synchronous halving of Hyperband). What does
not fit the memory is left out before it is trained, what would take too long after its first steps; both are told.
Where a LoRA goes is proposed by importance: the mean squared gradient of each linear map's weights (the empirical
Fisher information) on some training rows says which layers and which kind of map matter for the task.

The last two are trained with further seeds. How far the winner is ahead of the other, and whether that is more than
chance, is part of the answer. All of it is judged on validation rows; the test rows are scored once, for the winner.
"""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.comparison.bench import Bench, open_bench
from graftlm.comparison.budgets import count, trained_beside_head
from graftlm.comparison.comparing import keep
from graftlm.comparison.settings import OF_DATA, ComparisonSettings
from graftlm.core import Method, Samples, survey
from graftlm.errors import Finding, GraftError, RunError
from graftlm.evaluation import crossed_mean, crossed_test, verdict_on
from graftlm.methods import read_method
from graftlm.methods.scoring import scores_from_data

__all__ = ["Choice", "choose", "importance", "proposals"]

_THIRD = 3
_FACTORS = (1.0, 3.0)
_SEEDS = 3
_LOOKED_AT = 16  # rows that importance is told from
_KEPT_BY_IMPORTANCE = 0.5  # the share of the layers that a proposed placement has

#: What competes where nothing else is said; placements by importance come on top.
CANDIDATES = (
    "lora(rank=4)", "lora(rank=16,alpha=32.0)", "lora(rank=8,targets=all-linear)", "dora(rank=8)", "ia3", "bitfit",
    "series(width=16)", "prefix(length=16)",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What was chosen: the method's text, its learning rate, and the record of all trials."""

    method: str
    learning_rate: float
    record: Mapping[str, Any]

    @property
    def command(self) -> str:
        """How to train with it."""
        return str(self.record["command"])


@dataclass(frozen=True)
class _Candidate:
    name: str
    method: Method
    factor: float
    parameters: int
    memory_bytes: int


def choose(
    data: str | Path | None = None,
    *,
    base: str | Path = "bundled",
    memory_bytes: int | None = None,
    time_s: float | None = None,
    candidates: Sequence[str] | None = None,
    rounds: int = 3,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Choice:
    """The method for `data` on `base` within limits; `settings` are those of `ComparisonSettings` (steps, batch, ...).

    `memory_bytes` bounds what a training step holds, `time_s` the whole training of the method that is chosen.
    `candidates` are methods' texts instead of the built-in ones; each is tried with its own learning rate and three
    times it. `rounds` is how often two thirds are dropped. With `output`, `choice.json` holds every trial there.
    Raises GraftError for what is wrong with data, base or candidates, RunError (U158) where nothing fits the limits.

    Example:
        >>> choose("tickets.csv", memory_bytes=10**9, time_s=600).method                        # doctest: +SKIP
        'lora(rank=4)'
    """
    if rounds < 1:
        raise RunError(Finding("U155", f"rounds is {rounds}, wanted 1 or more", fix="--rounds 3"))
    if output is not None and (Path(output) / "choice.json").exists():
        raise RunError(Finding("U152", f"{output} holds a choice already", fix="another -o"))
    settled = ComparisonSettings(data=str(data) if data is not None else None, base=str(base), **settings)
    bench = open_bench(settled)
    ranked = importance(bench)
    texts = list(candidates) if candidates else [*CANDIDATES, *proposals(ranked)]
    found, dropped = _candidates(bench, texts, memory_bytes, strict=candidates is not None)
    trials: list[dict[str, Any]] = []
    alive = found
    for number in range(rounds):
        steps = max(1, bench.steps // _THIRD ** (rounds - 1 - number))
        say(f"round {number + 1}: {len(alive)} candidates, {steps} steps each")
        scores: list[tuple[float, int, _Candidate]] = []
        for candidate in alive:
            trial = _trial(bench, candidate, steps, seed=0) | {"round": number + 1}
            too_slow = time_s is not None and trial["step_seconds"] * bench.steps > time_s
            trials.append({key: value for key, value in trial.items() if key != "rows"} | {"too_slow": too_slow})
            said = " (too slow)" if too_slow else ""
            say(f"  {candidate.name:<44} rate x {candidate.factor:g}  {trial['score']:.4f}{said}")
            if too_slow:
                dropped.append(
                    {"method": candidate.name, "why": "time", "seconds": trial["step_seconds"] * bench.steps}
                )
            else:
                scores.append((trial["value"], len(scores), candidate))
        scores.sort(key=lambda entry: entry[:2])
        most = max(2, -(-len(scores) // _THIRD)) if number < rounds - 1 else 2
        alive = [candidate for _, _, candidate in scores[:most]]
        if not alive:
            raise RunError(_nothing_fits(dropped))
    final = _final(bench, alive, say)
    winner = next(c for c in alive if c.name == final["winner"]["method"] and c.factor == final["winner"]["factor"])
    with bench.fitted(winner.method, seed=0, factor=winner.factor):
        test = bench.scored(bench.test).mean
    rate = bench.rates(winner.method, winner.factor)[0]
    record = {
        "command": _command(settled, winner.name, rate),
        "measure": bench.measure.title,
        "chosen": {"method": winner.name, "learning_rate": rate, "parameters": winner.parameters,
                   "memory_bytes": winner.memory_bytes, "test_score": test},
        "final": final,
        "importance": ranked,
        "trials": trials,
        "dropped": dropped,
        "limits": {"memory_bytes": memory_bytes, "time_s": time_s},
        "steps": bench.steps,
    }  # fmt: skip
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        keep(Path(output) / "choice.json", record)
    return Choice(winner.name, rate, record)


def _command(settings: ComparisonSettings, method: str, rate: float) -> str:
    """The training of `method` on the same rows, read and trained on as here."""
    flags = {
        "-m": settings.base,
        "--method": method,
        "--lr": f"{rate:g}",
        "--task": None if settings.task == "auto" else settings.task,
        "--map": ",".join(f"{role}={column}" for role, column in (settings.mapping or {}).items()),
        "--steps": settings.steps,
        "--epochs": settings.epochs,
        "--batch": settings.batch,
        "--max-length": settings.max_length,
    }
    words = ["graftlm", "train", *([settings.data] if settings.data else [])]
    for flag, value in flags.items():
        words += [flag, str(value)] if value else []
    plain = ComparisonSettings()
    sets = {name: value for name in OF_DATA if (value := getattr(settings, name)) != getattr(plain, name)}
    sets |= {"waive": ",".join(settings.waive)} if settings.waive else {}
    sets |= {"max_rows": settings.max_rows} if settings.max_rows else {}
    for name, value in sets.items():
        words += ["--set", f"data.{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join(words)


def importance(bench: Bench) -> dict[str, dict[str, float]]:
    """The share of the Fisher information that each layer and each role of map holds, per parameter; they sum to 1.

    Measured on some training rows, under the base without adapters and, for a classifier, with its head as it is.
    """
    sites = survey(bench.model).select("all-linear", kinds=("linear", "conv1d"))
    modules = dict(bench.model.named_modules())
    maps = [modules[site.path] for site in sites]
    some = bench.train[:: max(len(bench.train) // _LOOKED_AT, 1)][:_LOOKED_AT]
    samples = Samples([bench.batch([item]) for item in some], bench.loss)
    scores = scores_from_data(bench.model, maps, "empirical-fisher", samples)
    by: dict[str, dict[str, list[float]]] = {"layer": defaultdict(list), "role": defaultdict(list)}
    for site, score in zip(sites, scores, strict=True):
        mean = float(score.mean())
        by["layer"][str(site.layer)].append(mean)
        by["role"][str(site.role)].append(mean)
    found = {}
    for kind, groups in by.items():
        means = {name: float(np.mean(values)) for name, values in groups.items()}
        total = sum(means.values()) or 1.0
        found[kind] = {name: value / total for name, value in sorted(means.items(), key=lambda item: -item[1])}
    return found


def proposals(ranked: Mapping[str, Mapping[str, float]]) -> list[str]:
    """LoRAs where importance is: in the better half of the layers, and on the two best kinds of maps."""
    layers = [int(name) for name in ranked["layer"] if name != "None"]
    roles = [name for name in ranked["role"] if name != "None"][:2]
    half = sorted(layers[: max(1, round(len(layers) * _KEPT_BY_IMPORTANCE))])
    found = []
    if half and len(half) < len(layers):
        found.append(f"lora(rank=8,targets=all-linear,layers=[{','.join(map(str, half))}])")
    if roles:
        found.append(f"lora(rank=8,targets=[{','.join(roles)}])")
    return found


def _candidates(
    bench: Bench, texts: Sequence[str], memory_bytes: int | None, *, strict: bool
) -> tuple[list[_Candidate], list[dict[str, Any]]]:
    """What fits the base and the memory; with `strict` a candidate that does not fit the base is an error."""
    faults: list[Finding] = []
    found: list[_Candidate] = []
    dropped: list[dict[str, Any]] = []
    for text in dict.fromkeys(texts):
        try:
            method = trained_beside_head(read_method(text))
            parameters = count(bench.model, method)
            memory = bench.memory_bytes(method)
        except GraftError as error:
            faults += error.findings if strict else ()
            dropped.append({"method": text, "why": error.findings[0].message})
            continue
        if memory_bytes is not None and memory > memory_bytes:
            dropped.append({"method": str(method), "why": "memory", "memory_bytes": memory})
            continue
        found += [_Candidate(str(method), method, factor, parameters, memory) for factor in _FACTORS]
    if faults:
        raise RunError(faults)
    if not found:
        raise RunError(_nothing_fits(dropped))
    return found, dropped


def _nothing_fits(dropped: Sequence[Mapping[str, Any]]) -> Finding:
    needed = [entry["memory_bytes"] for entry in dropped if "memory_bytes" in entry]
    slow = [entry["seconds"] for entry in dropped if "seconds" in entry]
    if needed:
        message, fix = f"no candidate fits: the smallest holds {min(needed):,} bytes", f"--memory {min(needed)}"
    elif slow:
        message, fix = f"no candidate is fast enough: the fastest takes {min(slow):.0f} s", f"--time {min(slow):.0f}"
    else:
        message, fix = "no candidate fits the base", "--candidates lora,ia3"
    return Finding("U158", message, fix=fix)


def _trial(bench: Bench, candidate: _Candidate, steps: int, seed: int) -> dict[str, Any]:
    with bench.fitted(candidate.method, seed=seed, factor=candidate.factor, steps=steps):
        began_s = time.perf_counter()
        scored = bench.scored(bench.validation)
        scoring_s = time.perf_counter() - began_s
    return {
        "method": candidate.name,
        "factor": candidate.factor,
        "steps": steps,
        "seed": seed,
        "score": scored.mean,
        "value": bench.measure.to_be_small(scored),
        "step_seconds": bench.last_step_seconds,
        "scoring_seconds": scoring_s,
        "rows": bench.measure.by_row(scored.values, scored.counts),
    }


def _final(bench: Bench, alive: Sequence[_Candidate], say: Callable[[str], None]) -> dict[str, Any]:
    """The last ones with several seeds: the better one, its margin, and the verdict."""
    tables = []
    for candidate in alive:
        rows = [_trial(bench, candidate, bench.steps, seed)["rows"] for seed in range(_SEEDS)]
        tables.append((candidate, np.stack(rows)))
    sign = -1 if bench.measure.higher_is_better else 1
    tables.sort(key=lambda entry: sign * entry[1].mean())
    lines = []
    for candidate, table in tables:
        mean = crossed_mean(table)
        lines.append({"method": candidate.name, "factor": candidate.factor, "score": mean.value, "low": mean.low,
                      "high": mean.high, "by_seed": [float(row.mean()) for row in table]})  # fmt: skip
        say(f"  {candidate.name:<44} {mean.value:.4f} ({mean.low:.4f} to {mean.high:.4f}), {_SEEDS} seeds")
    found: dict[str, Any] = {"winner": lines[0], "seeds": _SEEDS}
    if len(tables) > 1:
        difference = crossed_test(tables[0][1], tables[1][1])
        found |= {
            "runner_up": lines[1],
            "margin": difference.value,
            "margin_low": difference.low,
            "margin_high": difference.high,
            "p_value": difference.p_value,
            "verdict": verdict_on(difference, higher_is_better=bench.measure.higher_is_better),
        }
    return found
