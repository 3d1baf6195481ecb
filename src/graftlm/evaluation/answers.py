"""Rows with several answers: which one a model takes, and whether chosen answers are worth more than rejected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftlm.data import Collator, SequencesCollator, TargetsCollator, Template
from graftlm.data.candidates import encode_apart, encode_candidates, encode_paired
from graftlm.data.checking import Example, Notes
from graftlm.data.collating import length_of
from graftlm.evaluation.losses import Collate, batches, evaluating
from graftlm.evaluation.statistics import with_interval
from graftlm.objectives import Choice, Reference, settle

__all__ = [
    "answer_probabilities",
    "choice_scores",
    "choose_answers",
    "in_order",
    "judged_scores",
    "preference_scores",
    "rewards_of",
]


def answer_probabilities(
    model: Any, objective: Choice, items: Sequence[Mapping[str, Any]], collate: Collate, *, batch: int = 8
) -> list[np.ndarray]:
    """The probability of each answer among those of its row, under the routing in force."""
    order = sorted(range(len(items)), key=lambda at: length_of(items[at]))
    found: list[Any] = [None] * len(items)
    with evaluating(model):
        for part in batches(order, batch):
            together = {k: v.to(model.device) for k, v in collate([items[at] for at in part]).items()}
            scores = objective.scores(objective.outputs(model, together), together).softmax(-1).cpu()
            for row, at in enumerate(part):
                found[at] = scores[row, : len(items[at]["sequences"])].numpy()
    return found


def choose_answers(
    model: Any,
    tokenizer: Any,
    template: Template | None,
    objective: Choice,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    max_length: int | None = None,
) -> list[np.ndarray]:
    """The probability of each of `answers` for every question, under the routing in force; `template` None for a head.

    Raises DataError where question and answer do not fit the model's context.
    """
    notes = Notes()
    examples = [
        Example(at, "", {}, messages=({"role": "user", "content": question},), answers=tuple(answers), label=0)
        for at, question in enumerate(questions, 1)
    ]
    collate = Collator(tokenizer.pad_token_id, max_length=max_length)
    apart = getattr(model.config, "is_encoder_decoder", False)
    if apart:
        items, _ = encode_apart(examples, tokenizer, notes, max_length=max_length)
    elif template is None:
        items, _ = encode_paired(examples, tokenizer, notes, max_length=max_length)
    else:
        items, _, _ = encode_candidates(examples, tokenizer, template, notes, max_length=max_length)
    notes.settle()
    inner = TargetsCollator(collate, model.prepare_decoder_input_ids_from_labels) if apart else collate
    return answer_probabilities(model, objective, items, SequencesCollator(inner))


def choice_scores(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """The share of rows with the right answer, with its interval."""
    right = np.asarray(truth) == np.asarray(predicted)
    return with_interval("accuracy", [right.astype(float)], np.mean)


def rewards_of(
    model: Any,
    objective: Any,
    items: Sequence[Mapping[str, Any]],
    collate: Collate,
    *,
    reference: Reference | None = None,
    batch: int = 8,
) -> np.ndarray:
    """What a preference objective says of each row's answers: [rows, 2] of pairs, [rows] of judged answers."""
    order = sorted(range(len(items)), key=lambda at: length_of(items[at]))
    found: list[Any] = [None] * len(items)
    for part in batches(order, batch):
        together = {k: v.to(model.device) for k, v in collate([items[at] for at in part]).items()}
        settle(model, objective, [together], reference)
        with evaluating(model):
            values = objective.rewards(objective.outputs(model, together), together).float().cpu().numpy()
        for row, at in enumerate(part):
            found[at] = values[row]
    return np.asarray(found)


def preference_scores(rewards: np.ndarray) -> dict[str, float]:
    """The share of pairs whose chosen answer has the larger reward, with its interval, and the mean difference.

    A tie counts half: an adapter that changes nothing prefers nothing.

    Example:
        >>> preference_scores(np.array([[1.0, 0.0], [0.0, 0.5]]))["pair_accuracy"]
        0.5
    """
    margin = float((rewards[:, 0] - rewards[:, 1]).mean())
    return with_interval("pair_accuracy", [in_order(rewards)], np.mean) | {"margin": margin}


def in_order(rewards: np.ndarray) -> np.ndarray:
    """Of each pair [rows, 2] whether the first is worth more, [rows]; a tie counts half."""
    gap = rewards[:, 0] - rewards[:, 1]
    right: np.ndarray = (gap > 0) + 0.5 * (gap == 0)
    return right


def judged_scores(rewards: np.ndarray, wanted: Sequence[int]) -> dict[str, float]:
    """How often a wanted answer has a larger reward than an unwanted one (the area under the ROC curve), and the
    difference of the mean rewards.

    Example:
        >>> judged_scores(np.array([1.0, 0.0, 2.0]), [1, 0, 1])["auc"]
        1.0
    """
    kind = np.asarray(wanted).astype(bool)
    margin = float(rewards[kind].mean() - rewards[~kind].mean()) if kind.any() and not kind.all() else 0.0
    return with_interval("auc", [rewards, kind.astype(float)], _area) | {"margin": margin}


def _area(rewards: np.ndarray, wanted: np.ndarray, axis: int = -1) -> Any:
    """The area under the ROC curve by ranks (Mann and Whitney 1947); one half where there is one kind only."""
    from scipy.stats import rankdata

    good, rows = wanted.sum(axis), wanted.shape[axis]
    pairs = good * (rows - good)
    above = (rankdata(rewards, axis=axis) * wanted).sum(axis) - good * (good + 1) / 2
    return np.where(pairs > 0, above / np.maximum(pairs, 1), 0.5)
