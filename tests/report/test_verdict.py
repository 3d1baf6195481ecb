"""The verdict calls a difference real only when the intervals part, and names the strongest baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftlm.report.charts import thin
from graftlm.report.folder import RunFolder
from graftlm.report.verdict import Verdict, judge

from .conftest import loss_score, score


def verdict(scores: list[dict[str, Any]], task: str = "classify", **run: Any) -> Verdict:
    return judge(RunFolder(Path(), {"task": task, "results": {"eval_rows": 100, "scores": scores}, **run}))


@pytest.mark.parametrize(
    ("tuned", "base", "kind", "headline"),
    [
        (0.9, 0.7, "better", "Better than base + head"),
        (0.9, 0.85, "unclear", "No clear gain over base + head"),
        (0.85, 0.9, "unclear", "No clear difference from base + head"),
        (0.7, 0.9, "worse", "Worse than base + head"),
    ],
)
def test_more_is_better_for_f1(tuned: float, base: float, kind: str, headline: str) -> None:
    found = verdict([score("tuned", "LoRA", tuned, 0.05), score("probe", "base + head", base, 0.05)])
    assert (found.kind, found.headline) == (kind, headline)
    assert ("may be noise" in found.caution) == (kind == "unclear")


@pytest.mark.parametrize(
    ("tuned", "kind"), [(1.7, "better"), (2.65, "unclear"), (2.7, "unclear"), (2.75, "unclear"), (3.1, "worse")]
)
def test_less_is_better_for_loss(tuned: float, kind: str) -> None:
    found = verdict([loss_score("tuned", "LoRA", tuned, 0.05), loss_score("base", "base", 2.7, 0.05)], "sft")
    assert found.kind == kind


def test_the_strongest_baseline_decides_and_the_base_is_named_too() -> None:
    found = verdict(
        [
            score("tuned", "LoRA", 0.8, 0.03),
            score("probe", "base + head", 0.6, 0.03),
            score("tfidf", "TF-IDF", 0.9, 0.03),
        ]
    )
    assert found.headline == "Worse than TF-IDF"
    assert "0.600 (0.570 to 0.630) for base + head" in found.sentence
    assert "0.900 (0.870 to 0.930) for TF-IDF, the strongest baseline" in found.sentence


def test_the_strongest_baseline_of_losses_has_the_least() -> None:
    rows = [loss_score("tuned", "A", 2.0, 0.1), loss_score("base", "B", 3.0, 0.1), loss_score("unigram", "C", 6.0, 0.1)]
    assert verdict(rows, "lm").headline == "Better than B"


def test_a_clear_gain_over_the_base_is_said_beside_an_unclear_one() -> None:
    rows = [score("tuned", "A", 0.8, 0.03), score("probe", "B", 0.6, 0.03), score("tfidf", "C", 0.78, 0.03)]
    assert "Against B they do not overlap." in verdict(rows).caution
    rows[1] = score("probe", "B", 0.75, 0.03)
    assert "Against B" not in verdict(rows).caution


def test_without_intervals_nothing_is_claimed() -> None:
    found = verdict([{"name": "tuned", "macro_f1": 0.9}, {"name": "probe", "macro_f1": 0.2, "macro_f1_low": 0.1}])
    assert found.kind == "unclear"
    assert "cannot be told" in found.caution


def test_without_a_baseline_nothing_is_compared() -> None:
    assert verdict([score("tuned", "LoRA", 0.8, 0.03)]).headline == "No baseline to compare with"


@pytest.mark.parametrize(("status", "said"), [("stopped", "stopped after 7 steps"), ("failed", "failed after 7 steps")])
def test_the_state_of_the_run_is_said(status: str, said: str) -> None:
    rows = [score("tuned", "LoRA", 0.9, 0.03), score("probe", "B", 0.6, 0.03)]
    assert said in verdict(rows, status=status, steps=7).caution
    assert said not in verdict(rows, status="done", steps=7).caution


def test_thinning_keeps_extremes_and_the_mean() -> None:
    values = [float(n % 7) for n in range(1000)]
    values[501] = 99.0
    curve = thin(list(range(1000)), values, most=100)
    assert curve.thinned
    assert len(curve.steps) == 100
    assert max(curve.highs) == 99
    assert min(curve.lows) == 0
    assert sum(curve.means) / 100 == pytest.approx(sum(values) / 1000)
    assert thin([], []).steps == []
    assert not thin([1.0], [2.0]).thinned
