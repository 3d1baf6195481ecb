"""What finished runs say: means with intervals, pairwise verdicts, Pareto fronts, break-even points.

Pure arithmetic over what was stored; nothing is trained and nothing is read again. A run is what `compare` keeps of one
contestant and seed: `contestant`, `seed`, `values` and `counts` by test row, `predicted`, `cost`, and `general` and
`other` by row of what is asked beside.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftlm.evaluation import Estimate, crossed_mean, crossed_test, holm, verdict_on
from graftlm.evaluation.classes import macro_f1
from graftlm.training.measures import Measure

__all__ = ["COSTS", "break_even", "pareto", "summarised"]

#: What a score is set against, with the name for people; fewer is better.
COSTS = {
    "parameters": "trained parameters",
    "memory_bytes": "training memory",
    "seconds": "training time",
    "adapter_bytes": "bytes on disk",
}

Run = Mapping[str, Any]


def summarised(
    contestants: Sequence[Mapping[str, Any]],
    runs: Sequence[Run],
    measure: Measure,
    *,
    truth: Sequence[int] | None = None,
    labels: int = 0,
) -> dict[str, Any]:
    """The table, the pairs and the fronts.

    Args:
        contestants: `name`, `title`, `kind` (trained, in-context or baseline) and what else is to stand in the table.
        runs: of all contestants and seeds; those of one contestant must have the same rows.
        measure: what a row's value is, and whether more of it is better.
        truth: class ids of the test rows, where they have classes: F1 is told beside the score.
        labels: how many classes there are.

    Returns:
        `measure`, `higher_is_better`, `contestants` (the best first, each with `score`, `low`, `high`, and where
        forgetting was measured `general` and `other` with their changes from the untouched base), `pairs` (each
        with `p_value`, `p_corrected` by Holm over all of them and `verdict` on the first of the two), `best_baseline`,
        `against_baseline` (the same against the strongest baseline, corrected by themselves), `fronts` by cost.
    """
    higher = measure.higher_is_better
    tables = {c["name"]: _scores(runs, c["name"], measure) for c in contestants}
    beside = {kept: _beside(runs, kept) for kept in ("general", "other")}
    untouched = [contestant["name"] for contestant in contestants if contestant["kind"] == "baseline"]
    rows = []
    for contestant in contestants:
        name = contestant["name"]
        own = [run for run in runs if run["contestant"] == name]
        estimate = crossed_mean(tables[name])
        row = dict(contestant) | {
            "seeds": len(own),
            "score": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "by_seed": [float(line.mean()) for line in tables[name]],
        }
        if truth is not None and all(run.get("predicted") is not None for run in own):
            f1 = [macro_f1(truth, run["predicted"], labels) for run in own]
            row["macro_f1"] = statistics.mean(f1)
        costs = [run["cost"] for run in own if run.get("cost")]
        if costs:
            row["cost"] = {key: statistics.median(cost[key] for cost in costs) for key in costs[0]}
        for kept, measured in beside.items():
            if name in measured:
                row[kept] = float(measured[name].mean())
                if name not in untouched:
                    change = crossed_test(
                        measured[name], next(measured[base] for base in untouched if base in measured)
                    )
                    row[f"{kept}_change"] = {"value": change.value, "low": change.low, "high": change.high}
        rows.append(row)
    rows.sort(key=lambda row: (-row["score"] if higher else row["score"], row["name"]))
    rivals = [row["name"] for row in rows if row["kind"] != "baseline"]
    baselines = [row["name"] for row in rows if row["kind"] == "baseline"]
    pairs = _tested(list(itertools.combinations(rivals, 2)), tables, higher)
    against = _tested([(name, baselines[0]) for name in rivals], tables, higher) if baselines else []
    trained = [row for row in rows if row["kind"] == "trained" and "cost" in row]
    return {
        "measure": measure.title,
        "higher_is_better": higher,
        "contestants": rows,
        "pairs": pairs,
        "best_baseline": baselines[0] if baselines else None,
        "against_baseline": against,
        "fronts": {
            cost: pareto([(row["name"], row["score"], row["cost"][cost]) for row in trained], higher) for cost in COSTS
        },
    }


def _scores(runs: Sequence[Run], name: str, measure: Measure) -> np.ndarray:
    """[seeds, rows], the mean of which is the score: losses are divided by the mean number of tokens of a row."""
    own = sorted((run for run in runs if run["contestant"] == name), key=lambda run: run["seed"])
    return np.array([measure.by_row(run["values"], run["counts"]) for run in own])


def _beside(runs: Sequence[Run], kept: str) -> dict[str, np.ndarray]:
    """By contestant, what each row of other texts or of another task adds to the score there, [seeds, rows]."""
    own = sorted((run for run in runs if run.get(kept)), key=lambda run: run["seed"])
    names = dict.fromkeys(run["contestant"] for run in own)
    return {name: np.array([run[kept] for run in own if run["contestant"] == name]) for name in names}


def _tested(pairs: Sequence[tuple[str, str]], tables: Mapping[str, np.ndarray], higher: bool) -> list[dict[str, Any]]:
    found: list[Estimate] = [_paired(tables[one], tables[other]) for one, other in pairs]
    corrected = holm([estimate.p_value or 0.0 for estimate in found])
    return [
        {
            "one": one,
            "other": other,
            "difference": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "p_value": estimate.p_value,
            "p_corrected": p,
            "verdict": verdict_on(Estimate(estimate.value, 0, 0, p), higher_is_better=higher),
        }
        for (one, other), estimate, p in zip(pairs, found, corrected, strict=True)
    ]


def _paired(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Seeds are paired where both have them; of another number, as many as both have."""
    if 1 not in (len(one), len(other)):
        most = min(len(one), len(other))
        one, other = one[:most], other[:most]
    return crossed_test(one, other)


def pareto(points: Sequence[tuple[str, float, float]], higher_is_better: bool = True) -> list[str]:
    """The names that no other point beats: none has a score as good for less, or a better one for as little.

    Example:
        >>> pareto([("a", 0.9, 10), ("b", 0.8, 20), ("c", 0.7, 5)])
        ['a', 'c']
    """
    sign = 1 if higher_is_better else -1
    return [
        name
        for name, score, cost in points
        if not any(
            sign * other >= sign * score and less <= cost and (other != score or less != cost)
            for _, other, less in points
        )
    ]


def break_even(training_flops: float, query_flops: float, rival_query_flops: float) -> float | None:
    """After how many queries training has paid for itself against a rival that needs none; None where it never does.

    Liu et al. 2022 (T-Few), section 4.3: training operations over the operations saved by a query.

    Example:
        >>> break_even(1000.0, 1.0, 11.0)
        100.0
    """
    saved = rival_query_flops - query_flops
    return training_flops / saved if saved > 0 else None
