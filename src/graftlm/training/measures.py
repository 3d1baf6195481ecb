"""What a test row is worth, by task: right or wrong, its loss, its error; row by row, so that contestants are paired.

A measure over a whole set that is a ratio of sums (F1 of spans: twice the right ones over those told and those true)
is divided among the rows to first order. One that is none (Pearson's r) has another in its place: the squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graftlm.data import Labels
from graftlm.evaluation import losses, majority_baseline, probe_baseline, tfidf_baseline
from graftlm.evaluation.answers import answer_probabilities, in_order, rewards_of
from graftlm.evaluation.baselines import probe_label_sets, probe_numbers, tfidf_label_sets, tfidf_numbers
from graftlm.evaluation.classes import class_probabilities, label_probabilities
from graftlm.evaluation.numbers import predicted_numbers
from graftlm.evaluation.spans import commonest_tags, predicted_tags, span_counts
from graftlm.objectives import Choice
from graftlm.training.tasks import Learnt

__all__ = ["MEASURES", "Measure", "Rival", "Scored", "measure_of", "scored_classes"]

Items = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Scored:
    """Scores of one model on some rows, row by row.

    The sum of `values` [rows] over that of `counts` is the score: 1 for right and 0 for wrong, or summed losses in nats
    over so many tokens. `nats` decide between equals. `predicted` are class ids, None where there are no classes.
    """

    values: np.ndarray
    counts: np.ndarray
    nats: np.ndarray
    predicted: list[int] | None = None

    @property
    def mean(self) -> float:
        """The score."""
        return float(self.values.sum() / max(self.counts.sum(), 1))

    @property
    def mean_nats(self) -> float:
        """Loss in nats per row."""
        return float(self.nats.mean())


@dataclass(frozen=True)
class Rival:
    """A baseline: its name, what it is, and how it scores on the test rows when it is asked; nothing is attached."""

    name: str
    title: str
    scored: Callable[[], Scored]


@dataclass(frozen=True)
class Measure:
    """The score of a task: its title for people, its direction, how rows get it, and what a model must beat.

    `counts_vary`: what a row counts for depends on what was told of it, so that the score is a ratio of two sums.
    """

    title: str
    higher_is_better: bool
    score: Callable[[Learnt, Items], Scored]
    rivals: Callable[[Learnt, Items, Items], list[Rival]]
    counts_vary: bool = False

    def by_row(self, values: Any, counts: Any) -> np.ndarray:
        """What each row adds to the score, [rows]; their mean is the score.

        For a ratio to first order (the delta method): the score, and by how much the row moves it.
        """
        values, counts = np.asarray(values, dtype=float), np.asarray(counts, dtype=float)
        each = max(counts.mean(), 1e-12)
        score = values.mean() / each if self.counts_vary else 0.0
        found: np.ndarray = score + (values - score * counts) / each
        return found

    def to_be_small(self, scored: Scored) -> float:
        """The score as trials are ordered by it: less is better, and of equal ones the smaller loss."""
        return 1 - scored.mean + 1e-3 * scored.mean_nats if self.higher_is_better else scored.mean


def measure_of(task: str, labels: Labels | None = None) -> Measure:
    """The measure of a task; of classifiers whose rows may have several labels another one."""
    return _SEVERAL if labels is not None and labels.several else MEASURES[task]


def scored_classes(chances: np.ndarray, truth: np.ndarray) -> Scored:
    """Scores out of probabilities [rows, classes]."""
    predicted = chances.argmax(1)
    nats = -np.log(np.maximum(chances[np.arange(len(truth)), truth], 1e-12))
    return _hits(predicted, truth, nats)


def _hits(predicted: Any, truth: np.ndarray, nats: Any = None) -> Scored:
    """What class ids are worth, where `truth` is right."""
    return replace(_by_row(np.asarray(predicted) == truth, nats), predicted=[int(at) for at in predicted])


def _by_row(values: Any, nats: Any = None) -> Scored:
    values = np.asarray(values, dtype=float)
    return Scored(values, np.ones(len(values), dtype=int), np.zeros(len(values)) if nats is None else np.asarray(nats))


# --- labels ---


def _truth(items: Items) -> np.ndarray:
    return np.array([int(item["labels"]) for item in items])


def _classes(learnt: Learnt, items: Items) -> Scored:
    return scored_classes(class_probabilities(learnt.model, items, learnt.collator()), _truth(items))


def _class_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    known, truth = [int(item["labels"]) for item in train], _truth(test)
    texts = [[item["example"].text for item in part] for part in (train, test)]
    return [
        Rival(
            "probe",
            "frozen base + trained head",
            lambda: _hits(probe_baseline(learnt.model, train, test, learnt.collator()), truth),
        ),
        Rival("tfidf", "TF-IDF + logistic regression", lambda: _hits(tfidf_baseline(texts[0], known, texts[1]), truth)),
        Rival("majority", "always the commonest label", lambda: _hits(majority_baseline(known, len(truth)), truth)),
    ]


def _label_sets(learnt: Learnt, items: Items) -> Scored:
    chances = np.asarray(label_probabilities(learnt.model, items, learnt.collator()))
    truth = np.asarray([item["labels"] for item in items]) > 0.5
    right = np.clip(np.where(truth, chances, 1 - chances), 1e-12, None)
    return _by_row(((chances > 0.5) == truth).mean(1), -np.log(right).mean(1))


def _label_set_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    known, truth = (np.asarray([item["labels"] for item in part]) > 0.5 for part in (train, test))
    often = known.mean(0) > 0.5
    texts = [[item["example"].text for item in part] for part in (train, test)]

    def agree(guess: np.ndarray) -> Scored:
        return _by_row((truth == guess).mean(1))

    return [
        Rival(
            "probe",
            "frozen base + trained head",
            lambda: agree(probe_label_sets(learnt.model, train, test, learnt.collator())),
        ),
        Rival("tfidf", "TF-IDF + logistic regression", lambda: agree(tfidf_label_sets(texts[0], known, texts[1]))),
        Rival("majority", "labels that most rows have", lambda: agree(often)),
    ]


# --- tags, numbers ---


def _tags(learnt: Learnt, items: Items) -> Scored:
    assert learnt.labels is not None
    collate = learnt.collator()
    found = losses(learnt.model, learnt.objective(), items, collate)
    truth = [list(item["example"].tags) for item in items]
    told = predicted_tags(learnt.model, items, collate, learnt.labels)
    return replace(_spans(truth, told), nats=found.sums / np.maximum(found.counts, 1))


def _spans(truth: Sequence[Sequence[str]], told: Sequence[Sequence[str]]) -> Scored:
    right, found, true = span_counts(truth, told).T
    return Scored(2 * right, found + true, np.zeros(len(truth)))


def _tag_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    del learnt
    truth = [list(item["example"].tags) for item in test]
    return [Rival("words", "each word's commonest tag", lambda: _spans(truth, commonest_tags(train, test)))]


def _numbers(items: Items) -> np.ndarray:
    return np.array([float(item["example"].label) for item in items])


def _errors(learnt: Learnt, items: Items) -> Scored:
    assert learnt.scale is not None
    told = predicted_numbers(learnt.model, items, learnt.collator(), learnt.scale)
    return _by_row((told - _numbers(items)) ** 2)


def _number_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    known, truth = _numbers(train), _numbers(test)
    texts = [[item["example"].text for item in part] for part in (train, test)]

    def squares(told: Sequence[float]) -> Scored:
        return _by_row((np.asarray(told) - truth) ** 2)

    return [
        Rival(
            "probe",
            "frozen base + trained head",
            lambda: squares(probe_numbers(learnt.model, train, list(known), test, learnt.collator())),
        ),
        Rival("tfidf", "TF-IDF + ridge regression", lambda: squares(tfidf_numbers(texts[0], list(known), texts[1]))),
        Rival("mean", "always the mean", lambda: _by_row((known.mean() - truth) ** 2)),
    ]


# --- answers ---


def _choices(learnt: Learnt, items: Items) -> Scored:
    objective = learnt.objective()
    assert isinstance(objective, Choice)
    chances = answer_probabilities(learnt.model, objective, items, learnt.collator())
    wanted = [int(item["target"]) for item in items]
    right = [float(row.argmax() == want) for row, want in zip(chances, wanted, strict=True)]
    return _by_row(right, [-np.log(max(row[want], 1e-12)) for row, want in zip(chances, wanted, strict=True)])


def _choice_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    objective = learnt.objective()
    assert isinstance(objective, Choice)
    wanted = np.array([int(item["target"]) for item in test])
    common = majority_baseline([int(item["target"]) for item in train], len(test))
    place = Rival("majority", "always the commonest place", lambda: _by_row(np.asarray(common) == wanted))
    # A head that was never trained says nothing.
    return [place] if objective.by_head else [_untouched(learnt, test, _choices), place]


def _pairs(learnt: Learnt, items: Items) -> Scored:
    objective, collate = learnt.objective(), learnt.collator()
    rewards = rewards_of(learnt.model, objective, items, collate, reference=learnt.reference)
    return _by_row(in_order(rewards), np.logaddexp(0.0, rewards[:, 1] - rewards[:, 0]))


def _pair_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    del learnt, train
    long = np.asarray([[len(answer) for answer in item["example"].answers] for item in test], dtype=float)
    return [Rival("longer", "always the longer answer", lambda: _by_row(in_order(long)))]


# --- texts ---


def _losses(learnt: Learnt, items: Items) -> Scored:
    found = losses(learnt.model, learnt.objective(), items, learnt.collator())
    return Scored(found.sums, found.counts, found.sums)


def _text_rivals(learnt: Learnt, train: Items, test: Items) -> list[Rival]:
    del train
    return [_untouched(learnt, test, _losses)]


def _untouched(learnt: Learnt, test: Items, score: Callable[[Learnt, Items], Scored]) -> Rival:
    return Rival("base", "untouched base", lambda: score(learnt, test))


_LOSS = Measure("loss in nats per token", False, _losses, _text_rivals)
_CHOICES = Measure("accuracy", True, _choices, _choice_rivals)
_PAIRS = Measure("pairs in order", True, _pairs, _pair_rivals)
_SEVERAL = Measure("share of labels right", True, _label_sets, _label_set_rivals)

MEASURES: dict[str, Measure] = {
    "choice": _CHOICES,
    "classify": Measure("accuracy", True, _classes, _class_rivals),
    "dpo": _PAIRS,
    "lm": _LOSS,
    "mlm": _LOSS,
    "regress": Measure("mean squared error", False, _errors, _number_rivals),
    "reward": _PAIRS,
    "seq2seq": _LOSS,
    "sft": _LOSS,
    "tag": Measure("span F1", True, _tags, _tag_rivals, counts_vary=True),
    "tfew": _CHOICES,
}
