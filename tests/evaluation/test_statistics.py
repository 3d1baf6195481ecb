"""Statistics: against scipy, and by simulation where the truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from graftlm.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    crossed_mean,
    crossed_test,
    holm,
    mean_interval,
    paired_test,
    verdict_on,
)


def test_the_mean_of_normal_rows_has_the_interval_of_student() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values, draws=9999)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert mean_interval(values) == mean_interval(values)


def test_one_seed_is_a_t_test_of_the_paired_rows() -> None:
    draw = np.random.default_rng(1)
    one, other = draw.normal(0.1, 1, 50), draw.normal(0, 1, 50)
    found, wanted = crossed_test(one, other), stats.ttest_rel(one, other)
    assert found.p_value == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_many_rows_of_seeds_that_differ_are_a_t_test_of_the_seeds() -> None:
    draw = np.random.default_rng(2)
    shift = draw.normal(0.3, 1, 6)
    one = shift[:, None] + 0.01 * draw.normal(size=(6, 500))
    other = np.zeros((6, 500))
    wanted = stats.ttest_1samp(one.mean(1), 0)
    assert crossed_test(one, other).p_value == pytest.approx(wanted.pvalue, rel=0.01)


@pytest.mark.parametrize("differing", [2, 5, 11])
def test_right_and_wrong_are_mcnemars_exact_test(differing: int) -> None:
    for wins in range(differing + 1):
        one = [1] * wins + [0] * (differing - wins) + [1] * 20
        other = [0] * wins + [1] * (differing - wins) + [1] * 20
        wanted = stats.binomtest(wins, differing, 0.5).pvalue
        assert paired_test(one, other).p_value == pytest.approx(min(1.0, wanted))


def test_a_sampled_permutation_test_is_near_the_t_test() -> None:
    draw = np.random.default_rng(3)
    one, other = draw.normal(0.15, 1, 200), draw.normal(0, 1, 200)
    assert paired_test(one, other).p_value == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.02)


def test_equal_scores_are_not_distinguishable() -> None:
    for found in (paired_test([1, 0, 1], [1, 0, 1]), crossed_test(np.ones((3, 4)), np.ones((3, 4)))):
        assert found == Estimate(0.0, 0.0, 0.0, 1.0)
        assert verdict_on(found) == "not distinguishable"
    assert paired_test([1, 0], [0, 0]).p_value == 1.0, "one row proves nothing"


def test_sums_are_weighted() -> None:
    found = paired_test([2.0, 9.0, 4.0], [1.0, 3.0, 2.0], weights=[1, 3, 2])
    assert found.value == pytest.approx(9 / 6)


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="do not belong"):
        crossed_test(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="do not belong"):
        crossed_test(np.zeros((2, 3)), np.zeros((3, 3)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_keeps_the_order_and_is_at_most_bonferroni(p_values: list[float]) -> None:
    found = holm(p_values)
    for p, corrected in zip(p_values, found, strict=True):
        assert p <= corrected <= min(1.0, p * len(p_values)) + 1e-12
    by_p = [found[at] for at in np.argsort(p_values, kind="stable")]
    assert by_p == sorted(by_p)


def test_holm_on_the_example_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@settings(max_examples=30)
@given(st.floats(-1, 1), st.floats(0, 1), st.booleans())
def test_verdicts_turn_round_with_the_sign(value: float, p_value: float, higher: bool) -> None:
    one = verdict_on(Estimate(value, 0, 0, p_value), higher_is_better=higher)
    other = verdict_on(Estimate(-value, 0, 0, p_value), higher_is_better=higher)
    assert {one, other} in ({"better", "worse"}, {"not distinguishable"})


# --- simulation: how often an interval holds the truth, how often a difference is seen where there is none ---


@pytest.mark.parametrize("method", ["percentile", "BCa"])
@pytest.mark.parametrize(
    ("draw_rows", "truth"),
    [
        (lambda draw: draw.normal(2, 1, 120), 2.0),
        (lambda draw: draw.random(150) < 0.8, 0.8),
        (lambda draw: draw.gamma(3, 1, 300), 3.0),
    ],
    ids=["normal", "right or wrong", "skewed"],
)
def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say(
    method: str, draw_rows: Callable[[np.random.Generator], np.ndarray], truth: float
) -> None:
    draw, times, hits = np.random.default_rng(7), 500, 0
    for turn in range(times):
        found = mean_interval(draw_rows(draw), method=method, draws=500, seed=turn)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / times <= 0.97


def crossed(draw: np.random.Generator, seeds: int, rows: int, seed: float, row: float, rest: float) -> np.ndarray:
    return (
        seed * draw.normal(size=(seeds, 1)) + row * draw.normal(size=(1, rows)) + rest * draw.normal(size=(seeds, rows))
    )


@pytest.mark.parametrize(("seed", "row", "rest"), [(0.0, 0.4, 0.3), (0.03, 0.4, 0.3), (0.2, 0.4, 0.3), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_seeds_and_rows_hold_the_truth(seeds: int, seed: float, row: float, rest: float) -> None:
    draw, times, hits, agreed = np.random.default_rng(11), 6000, 0, 0
    for turn in range(times):
        scores = 1.0 + crossed(draw, seeds, 150, seed, row, rest)
        found = crossed_mean(scores)
        held = found.low <= 1.0 <= found.high
        hits += held
        if turn < 200:  # a verdict is the interval's other side
            agreed += held == (crossed_test(scores, np.ones((1, 150))).p_value > 0.05)
    assert agreed == 200
    noise = 2 * math.sqrt(0.05 * 0.95 / times)
    assert 1 - hits / times <= 0.05 + noise, "more than one of twenty differences found where there is none"
    assert 0.93 <= hits / times <= 0.97 + noise


def test_pairs_of_equal_methods_are_told_apart_in_at_most_one_family_of_twenty() -> None:
    """Five methods that are the same, three seeds, right and wrong answers on shared rows: ten pairs a comparison."""
    draw, times, false = np.random.default_rng(13), 1200, 0
    for _ in range(times):
        difficulty = draw.normal(1, 1.2, 120)
        scores = [
            (draw.random((3, 120)) < stats.logistic.cdf(difficulty + 0.25 * draw.normal(size=(3, 1)))).astype(float)
            for _ in range(5)
        ]
        pairs = [crossed_test(scores[a], scores[b]) for a in range(5) for b in range(a)]
        false += min(holm([pair.p_value for pair in pairs])) <= 0.05
    assert false / times <= 0.05


def test_a_real_difference_is_seen() -> None:
    draw = np.random.default_rng(17)
    seen = 0
    for _ in range(50):
        base = crossed(draw, 3, 300, 0.02, 0.4, 0.3)
        seen += verdict_on(crossed_test(base + 0.2 + 0.1 * draw.normal(size=base.shape), base)) == "better"
    assert seen == 50


def test_a_ratio_can_be_the_statistic() -> None:
    found = bootstrap_interval([[1.0, 2.0, 9.0], [1, 1, 4]], lambda a, b, axis: a.sum(axis) / b.sum(axis))
    assert found.value == 2.0
    assert found.low <= 2.0 <= found.high
