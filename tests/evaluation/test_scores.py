"""Scores: losses by row, classification metrics against scikit-learn, baselines, probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from graftlm.core import use
from graftlm.data import Labels
from graftlm.evaluation import (
    classification_scores,
    classify_texts,
    losses,
    majority_baseline,
    probe_baseline,
    text_scores,
    tfidf_baseline,
)
from graftlm.evaluation.baselines import probe_label_sets, probe_numbers, tfidf_label_sets, tfidf_numbers
from graftlm.evaluation.losses import RowLosses
from graftlm.models import load_base
from graftlm.objectives import OBJECTIVES
from training.test_objectives import prepared
from training.tiny_runs import labelled_rows


@pytest.mark.parametrize("task", ["sft", "lm", "classify"])
def test_losses_do_not_depend_on_batches_or_order(task: str, tiny_base: Path, tmp_path: Path) -> None:
    model, _, rows, collate = prepared(task, tiny_base, tmp_path)
    objective = OBJECTIVES[task]()
    model.train()
    single = [losses(model, objective, [row], collate) for row in rows]
    for size in (1, 3, 16):
        found = losses(model, objective, rows, collate, batch=size)
        np.testing.assert_allclose(found.sums, [float(one.sums[0]) for one in single], rtol=1e-4)
        assert found.counts.tolist() == [int(one.counts[0]) for one in single]
    turned = losses(model, objective, rows[::-1], collate)
    np.testing.assert_allclose(turned.sums[::-1], found.sums, rtol=1e-4)
    assert model.training, "the mode was not put back"


def test_the_base_has_another_loss_than_the_adapter(tiny_base: Path, tmp_path: Path) -> None:
    model, _, rows, collate = prepared("sft", tiny_base, tmp_path)
    objective = OBJECTIVES["sft"]()
    tuned = losses(model, objective, rows, collate).mean
    with use(model, None):
        assert losses(model, objective, rows, collate).mean != tuned


def test_means_and_intervals() -> None:
    found = RowLosses(np.array([2.0, 8.0, 3.0]), np.array([1, 4, 1]))
    assert found.mean == 13 / 6
    low, high = found.interval()
    assert 2.0 <= low < found.mean < high <= 3.0
    assert found.interval() == (low, high)
    scores = text_scores(found)
    assert scores["perplexity"] == pytest.approx(math.exp(13 / 6))
    assert RowLosses(np.zeros(1), np.zeros(1, dtype=int)).mean == 0.0


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        sums = draw.gamma(2.0, 1.5, 40)
        low, high = RowLosses(sums, np.ones(40, dtype=int)).interval(draws=400)
        hits += low <= 3.0 <= high
    assert 85 <= hits <= 100


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    draw = np.random.default_rng(classes)
    for rows in (3, 30):
        truth, guess = draw.integers(0, classes, rows), draw.integers(0, classes, rows)
        found = classification_scores(truth.tolist(), guess.tolist(), classes)
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
        assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
        assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
        assert found == classification_scores(truth.tolist(), guess.tolist(), classes)


def test_baselines_learn_what_is_there_to_learn(tiny_base: Path, tmp_path: Path) -> None:
    rows = labelled_rows(40)
    known = [int(row["label"] == "track") for row in rows]
    texts = [row["text"] for row in rows]
    assert tfidf_baseline(texts[:30], known[:30], texts[30:]) == known[30:]
    assert majority_baseline([1, 1, 0], 4) == [1] * 4
    model, _, items, collate = prepared("classify", tiny_base, tmp_path)
    with use(model, None):
        found = probe_baseline(model, items, items, collate)
    assert found == [int(item["labels"]) for item in items]

    # The same facts as several labels, one of which no row has, and as numbers.
    sets = np.array([[label, 1 - label, 0] for label in known], dtype=bool)
    assert (tfidf_label_sets(texts[:30], sets[:30], texts[30:]) == sets[30:]).all()
    truth = np.array([[int(item["labels"]), 0, 1] for item in items], dtype=bool)
    several = [item | {"labels": row.astype(float).tolist()} for item, row in zip(items, truth, strict=True)]
    values = [3.0 if item["labels"] else -1.0 for item in items]
    with use(model, None):
        assert (probe_label_sets(model, several, several, collate) == truth).all()
        numbers = probe_numbers(model, items, values, items, collate)
    assert np.corrcoef(numbers, values)[0, 1] > 0.9
    wanted = [3.0 if label else -1.0 for label in known]
    assert np.corrcoef(tfidf_numbers(texts[:30], wanted[:30], texts[30:]), wanted[30:])[0, 1] > 0.9


def test_baselines_of_odd_data() -> None:
    assert len(tfidf_baseline(["1", "2", "3", "4"], [0, 1, 0, 1], ["1", "9"])) == 2  # no words
    assert len(tfidf_baseline(["one word", "two words", "more"], [0, 1, 1], ["one"])) == 1  # a label once


def test_probabilities(tiny_base: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load_base(tiny_base, task="classify", labels=["no", "perhaps", "yes"])
    labels, texts = Labels(("no", "perhaps", "yes")), ["A lamp", "A much longer text about a lamp and a kettle", "No"]
    found = classify_texts(model, tokenizer, labels, texts)
    alone = [classify_texts(model, tokenizer, labels, [text])[0] for text in texts]
    for together, single in zip(found, alone, strict=True):
        assert together.label == single.label
        assert together.probabilities == pytest.approx(single.probabilities, abs=1e-5)
        assert sum(together.probabilities.values()) == pytest.approx(1.0, abs=1e-5)
        assert together.probability == together.probabilities[together.label] == max(together.probabilities.values())
    assert len(classify_texts(model, tokenizer, labels, ["lamp " * 500], max_length=16)) == 1


def test_probabilities_are_those_of_the_model(tiny_base: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load_base(tiny_base, task="classify", labels=["no", "yes"])
    (found,) = classify_texts(model, tokenizer, Labels(("no", "yes")), ["Where is my lamp"])
    with torch.no_grad():
        wanted: Any = model(**tokenizer("Where is my lamp", return_tensors="pt", return_token_type_ids=False)).logits
    assert list(found.probabilities.values()) == pytest.approx(wanted.softmax(-1)[0].tolist(), abs=1e-5)
