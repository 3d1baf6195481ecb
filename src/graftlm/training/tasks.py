"""The tasks: for each its objective, how its rows become batches, and how a model that learnt it is scored.

What rows a task wants is in `graftlm.data.recognise`, which head of a model it needs in `graftlm.models.head_of`; this
table joins them with the arithmetic and the metric. Adding a task means a line here and one in each of those.

Example:
    >>> sorted(TASKS)[:4], TASKS["tag"].measure.title
    (['choice', 'classify', 'dpo', 'grpo'], 'span F1')
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

import numpy as np
from sklearn.metrics import f1_score, precision_recall_fscore_support

from graftlm.core import Method, Samples, use
from graftlm.data import Collator, Labels, MaskingCollator, Scale, SequencesCollator, TargetsCollator, Template
from graftlm.data.prepare import ONLINE
from graftlm.data.targets import source_of
from graftlm.errors import Finding, RunError
from graftlm.evaluation import classification_scores
from graftlm.evaluation.answers import (
    answer_probabilities,
    choice_scores,
    judged_scores,
    preference_scores,
    rewards_of,
)
from graftlm.evaluation.baselines import (
    majority_baseline,
    probe_label_sets,
    probe_numbers,
    tfidf_label_sets,
    tfidf_numbers,
)
from graftlm.evaluation.classes import class_probabilities, label_probabilities
from graftlm.evaluation.generating import draw_of, generate_texts
from graftlm.evaluation.losses import Collate
from graftlm.evaluation.losses import batches as each_of
from graftlm.evaluation.numbers import number_scores, predicted_numbers
from graftlm.evaluation.spans import commonest_tags, f1_of, predicted_tags, span_scores
from graftlm.evaluation.statistics import sure_scores, with_interval
from graftlm.evaluation.texts import answer_scores
from graftlm.kernels import LossHead
from graftlm.models import head_of, is_encoder
from graftlm.objectives import (
    DPO,
    GRPO,
    KTO,
    OBJECTIVES,
    PPO,
    RLOO,
    CausalLM,
    Choice,
    Classification,
    MaskedLM,
    MultiLabel,
    Objective,
    Online,
    Reference,
    Regression,
    Reward,
    Seq2Seq,
    Tagging,
    TFew,
    mean_loss,
)
from graftlm.training.decisions import decide_updates, title_of
from graftlm.training.named_rewards import is_check
from graftlm.training.opening import Opened
from graftlm.training.rewards import Reward as RewardFunction
from graftlm.training.rewards import read_reward
from graftlm.training.rollout import Rollout, Written
from graftlm.training.scoring import questions_of, score_classification, score_text

__all__ = ["TASKS", "Learnt", "Measure", "Task", "chooses_by_head", "learnt_of", "score_line"]

_Kind = TypeVar("_Kind", bound=Online)

_BASELINE_ROWS = 2000
_REWARDED_ROWS = 128  # answers that are sampled and rewarded
_WRITTEN_ROWS = 64  # answers that are written out to be scored


@dataclass(frozen=True)
class Measure:
    """A score by its name in the results, with the title and the direction for people."""

    key: str
    title: str
    more_is_better: bool = True
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for run.json."""
        return {"key": self.key, "title": self.title, "more_is_better": self.more_is_better, "unit": self.unit}


@dataclass(frozen=True)
class Learnt:
    """A model with what its outputs mean: all that scoring it needs.

    `preferences` and `reinforcement` are the settings of the sections of these names, `reward` what answers are worth.
    `reference` is the model before training, for tasks that compare with it.
    """

    task: str
    model: Any
    tokenizer: Any
    labels: Labels | None = None
    scale: Scale | None = None
    template: Template | None = None
    longest: int | None = None
    seed: int = 0
    preferences: Mapping[str, Any] = field(default_factory=dict)
    reinforcement: Mapping[str, Any] = field(default_factory=dict)
    reward: RewardFunction | None = None
    reference: Reference | None = None
    title: str = "adapter"

    def writing(self) -> dict[str, Any]:
        """How losses of labelled tokens are found on this model: by its head, or by logits from the first label on."""
        tail_only = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return {"tail_only": tail_only, "head": LossHead.of(self.model)}

    def rollout(self, examples: Mapping[int, Any]) -> Rollout:
        """Answers of the model with their rewards; `examples` are the rows by number."""
        assert self.reward is not None
        told = self.reinforcement
        return Rollout(
            self.model,
            self.tokenizer,
            self.template,
            self.reward,
            answers=told["answers"],
            max_new_tokens=told["max_new_tokens"],
            longest=self.longest or told["max_new_tokens"] * 2,
            examples=examples,
            seed=self.seed,
            updates=decide_updates(self.task, told.get("updates")),
        )

    def objective(self) -> Objective:
        """What was, or will be, minimised."""
        return TASKS[self.task].objective(self)

    def collator(self) -> Collate:
        """Items to batches."""
        return TASKS[self.task].collator(self)

    def score(self, held: Sequence[Any], train: Sequence[Any] = ()) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Results for run.json, and a line for each prediction; with `train`, also baselines that learn from it."""
        results, lines = TASKS[self.task].score(self, held, train)
        results["scores"] = sure_scores(results["scores"], len(held))
        return {"task": self.task, "eval_rows": len(held)} | self.measures() | results, lines

    def measured(self, held: Sequence[Any]) -> dict[str, float]:
        """The task's own measure on `held`, by its name, without intervals or rivals; empty where it is the loss."""
        found = TASKS[self.task].measured
        if found is None or not held:
            return {}
        return {str(self.measures()["measure"]["key"]): found(self, held)}

    def samples(self, method: Method, rows: Sequence[Any], *, size: int, seed: int) -> Samples | None:
        """Some of `rows`, drawn by the seed, in batches of `size`, for a method that looks at data; None for others."""
        if not any(part.needs_samples for part in method.parts):
            return None
        most = max(part.sample_rows for part in method.parts)
        chosen = random.Random(seed).sample(range(len(rows)), min(most, len(rows)))
        objective, collate = self.objective(), self.collator()
        batches = [
            {k: v.to(self.model.device) for k, v in collate([rows[at] for at in part]).items() if k != "row"}
            for part in each_of(chosen, size)
        ]
        return Samples(batches, lambda model, batch: mean_loss(model, objective, cast(dict[str, Any], batch)))

    def measures(self) -> dict[str, Any]:
        """The measure that counts and the one told beside it, as results have them."""
        task = TASKS[self.task]
        several = self.labels is not None and self.labels.several
        first, second = _SEVERAL if several else (task.measure, task.second)
        return {"measure": first.to_dict(), "second": second.to_dict()}


@dataclass(frozen=True)
class Task:
    """One way to learn: the functions that carry it out, and how well it went in which measure."""

    objective: Callable[[Learnt], Objective]
    collator: Callable[[Learnt], Collate]
    score: Callable[[Learnt, Sequence[Any], Sequence[Any]], tuple[dict[str, Any], list[dict[str, Any]]]]
    measure: Measure
    second: Measure
    #: The measure alone, for evaluations while it trains; None where that is the loss, or takes more than a pass.
    measured: Callable[[Learnt, Sequence[Any]], float] | None = None


def chooses_by_head(task: str, config: Any) -> bool:
    """Whether answers are told apart by a head on question and answer: choices, with an encoder."""
    return task == "choice" and head_of(task, config) == "sequence" and is_encoder(config)


def score_line(score: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """A score in words: its measure with the interval, and the second measure."""
    first, second = results["measure"], results["second"]
    key = first["key"]
    sure = "one row, no interval"
    if f"{key}_low" in score:
        sure = f"{score[f'{key}_low']:.3f} to {score[f'{key}_high']:.3f}"
    said = f"{first['title']} {score[key]:.3f} ({sure})"
    return said + (f"  {second['title']} {score[second['key']]:,.3f}" if second["key"] in score else "")


def learnt_of(opened: Opened) -> Learnt:
    """An opened adapter as what it has learnt; the model before training is the base without it."""
    assert opened.adapter is not None
    needs = "reference" in OBJECTIVES[opened.task].needs
    reinforcement = opened.facts.get("reinforcement") or {}
    reward = None
    if opened.task in ONLINE:
        named = reinforcement.get("reward")
        if not is_check(named):
            message = (
                f"{opened.folder} learnt from the reward {named!r}, which is not run for an adapter that asks for it"
            )
            raise RunError(Finding("U142", message, fix="graftlm generate or chat, to see what it writes"))
        reward = read_reward(named)
    return Learnt(
        opened.task,
        opened.model,
        opened.tokenizer,
        labels=opened.labels,
        scale=opened.scale,
        template=opened.template,
        longest=opened.max_length,
        preferences=opened.facts.get("preferences") or {},
        reinforcement=reinforcement,
        reward=reward,
        reference=Reference(opened.adapter, rest=opened.beneath) if needs else None,
        title=title_of(opened.adapter.method),
    )


# --- batches ---


def _padded(learnt: Learnt) -> Collator:
    return Collator(learnt.tokenizer.pad_token_id, max_length=learnt.longest)


def _sequences(learnt: Learnt) -> Collate:
    config = learnt.model.config
    apart = getattr(config, "is_encoder_decoder", False) and head_of(learnt.task, config) == "seq2seq"
    return SequencesCollator(_written_apart(learnt) if apart else _padded(learnt))


def _prompts(learnt: Learnt) -> Collate:
    return Collator(learnt.tokenizer.pad_token_id, side="left", max_length=learnt.longest)


def _written_apart(learnt: Learnt) -> TargetsCollator:
    return TargetsCollator(_padded(learnt), learnt.model.prepare_decoder_input_ids_from_labels)


def _masking(learnt: Learnt) -> Collate:
    tokenizer = learnt.tokenizer
    return MaskingCollator(
        _padded(learnt), tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids), seed=learnt.seed
    )


# --- scores ---


def _score_classes(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    labels, model, collate = learnt.labels, learnt.model, learnt.collator()
    assert labels is not None
    if labels.several:
        return _score_label_sets(learnt, held, train)
    return score_classification(model, labels, held, collate, adapter=learnt.title, train=train)


def _macro_f1(learnt: Learnt, held: Sequence[Any]) -> float:
    labels, model, collate = learnt.labels, learnt.model, learnt.collator()
    assert labels is not None
    if labels.several:
        truth = np.asarray([item["labels"] for item in held]) > 0.5
        return float(f1_score(truth, label_probabilities(model, held, collate) > 0.5, average="micro", zero_division=0))
    told = class_probabilities(model, held, collate).argmax(1)
    ids = range(len(labels))
    return float(f1_score([int(i["labels"]) for i in held], told, labels=ids, average="macro", zero_division=0))


def _pearson(learnt: Learnt, held: Sequence[Any]) -> float:
    assert learnt.scale is not None
    told = predicted_numbers(learnt.model, held, learnt.collator(), learnt.scale)
    return number_scores([float(item["example"].label) for item in held], list(map(float, told)))["pearson"]


def _span_f1(learnt: Learnt, held: Sequence[Any]) -> float:
    assert learnt.labels is not None
    told = predicted_tags(learnt.model, held, learnt.collator(), learnt.labels)
    return span_scores([list(item["example"].tags) for item in held], told)["span_f1"]


def _share_right(learnt: Learnt, held: Sequence[Any]) -> float:
    objective = learnt.objective()
    assert isinstance(objective, Choice)
    chances = answer_probabilities(learnt.model, objective, held, learnt.collator())
    return float(np.mean([int(row.argmax()) == int(item["target"]) for row, item in zip(chances, held, strict=True)]))


def _in_order(learnt: Learnt, held: Sequence[Any]) -> float:
    rewards = rewards_of(learnt.model, learnt.objective(), held, learnt.collator(), reference=learnt.reference)
    return preference_scores(rewards)["pair_accuracy"]


def _auc(learnt: Learnt, held: Sequence[Any]) -> float:
    rewards = rewards_of(learnt.model, learnt.objective(), held, learnt.collator(), reference=learnt.reference)
    return judged_scores(rewards, [int(item["target"]) for item in held])["auc"]


def _score_label_sets(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    labels = learnt.labels
    assert labels is not None
    truth = np.asarray([item["labels"] for item in held]) > 0.5
    chances = label_probabilities(learnt.model, held, learnt.collator())
    rivals = [("tuned", f"tuned: {learnt.title}", chances > 0.5)]
    if train:
        train = train[:_BASELINE_ROWS]
        known = np.asarray([item["labels"] for item in train]) > 0.5
        often = known.mean(0) > 0.5
        texts = [[item["example"].text for item in part] for part in (train, held)]
        with use(learnt.model, None):
            probed = probe_label_sets(learnt.model, train, held, learnt.collator())
        rivals.append(("probe", "frozen base + trained head", probed))
        rivals.append(("tfidf", "TF-IDF + logistic regression", tfidf_label_sets(texts[0], known, texts[1])))
        rivals.append(("majority", "labels that most rows have", np.tile(often, (len(held), 1))))
    precision, recall, f1, rows = precision_recall_fscore_support(truth, rivals[0][2], average=None, zero_division=0)
    results = {
        "labels": list(labels.names),
        "scores": [{"name": name, "title": title} | _label_set_scores(truth, guess) for name, title, guess in rivals],
        "per_label": [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for name, p, r, f, n in zip(labels.names, precision, recall, f1, rows, strict=True)
        ],
    }
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "label": ", ".join(n for n, there in zip(labels.names, want, strict=True) if there),
            "predicted": ", ".join(n for n, p in zip(labels.names, got, strict=True) if p > 0.5),
            "probabilities": {n: round(float(p), 4) for n, p in zip(labels.names, got, strict=True)},
        }
        for item, want, got in zip(held, truth, chances, strict=True)
    ]
    return results, lines


def _label_set_scores(truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    counts = [(truth & guess).sum(1), guess.sum(1), truth.sum(1)]
    exact = float((truth == guess).all(1).mean()) if len(truth) else 0.0
    macro = float(f1_score(truth, guess, average="macro", zero_division=0))
    return with_interval("micro_f1", counts, f1_of) | {"macro_f1": macro, "exact": exact}


def _score_numbers(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    scale = learnt.scale
    assert scale is not None
    truth = [float(item["example"].label) for item in held]
    told = predicted_numbers(learnt.model, held, learnt.collator(), scale)
    rivals: list[tuple[str, str, Sequence[float]]] = [("tuned", f"tuned: {learnt.title}", list(map(float, told)))]
    if train:
        train = train[:_BASELINE_ROWS]
        known = [float(item["example"].label) for item in train]
        texts = [[item["example"].text for item in part] for part in (train, held)]
        with use(learnt.model, None):
            probed = probe_numbers(learnt.model, train, known, held, learnt.collator())
        rivals.append(("probe", "frozen base + trained head", probed))
        rivals.append(("tfidf", "TF-IDF + ridge regression", tfidf_numbers(texts[0], known, texts[1])))
        rivals.append(("mean", "always the mean", [sum(known) / len(known)] * len(held)))
    results = {
        "scores": [{"name": name, "title": title} | number_scores(truth, guess) for name, title, guess in rivals],
        "scale": scale.to_dict(),
    }
    lines = [
        {"row": item.get("row"), "text": item["example"].text, "label": want, "predicted": round(float(got), 4)}
        for item, want, got in zip(held, truth, told, strict=True)
    ]
    return results, lines


def _score_tags(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    labels = learnt.labels
    assert labels is not None
    truth = [list(item["example"].tags) for item in held]
    told = predicted_tags(learnt.model, held, learnt.collator(), labels)
    rivals = [("tuned", f"tuned: {learnt.title}", told)]
    if train:
        rivals.append(("words", "each word's commonest tag", commonest_tags(train, held)))
    results = {
        "labels": list(labels.names),
        "scores": [{"name": name, "title": title} | span_scores(truth, guess) for name, title, guess in rivals],
    }
    lines = [
        {"row": item.get("row"), "text": item["example"].text, "label": " ".join(want), "predicted": " ".join(got)}
        for item, want, got in zip(held, truth, told, strict=True)
    ]
    return results, lines


def _score_choices(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    objective, collate = learnt.objective(), learnt.collator()
    assert isinstance(objective, Choice)
    truth = [int(item["target"]) for item in held]
    chances = answer_probabilities(learnt.model, objective, held, collate)
    told = [int(row.argmax()) for row in chances]
    rivals = [("tuned", f"tuned: {learnt.title}", told)]
    if not objective.by_head:
        with use(learnt.model, None):
            untuned = answer_probabilities(learnt.model, objective, held, collate)
        rivals.append(("base", "untouched base", [int(row.argmax()) for row in untuned]))
    if train:
        rivals.append(
            ("majority", "always the commonest place", majority_baseline([int(i["target"]) for i in train], len(held)))
        )
    scores = [{"name": name, "title": title} | choice_scores(truth, guess) for name, title, guess in rivals]
    words = {item["example"].answers for item in held}
    if len(words) == 1:  # the same answers in every row are labels
        for score, (_, _, guess) in zip(scores, rivals, strict=True):
            score |= classification_scores(truth, guess, len(next(iter(words))))
    # How sure the right answer is says more than the share of right ones where rows are few.
    for score, found in zip(scores, [chances, *([] if objective.by_head else [untuned])], strict=False):
        right = [float(row[want]) for row, want in zip(found, truth, strict=True)]
        score["probability"] = sum(right) / max(len(right), 1)
    results = {
        "scores": scores,
        "chance": sum(1 / len(row) for row in chances) / max(len(chances), 1),
    }
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "label": item["example"].answers[want],
            "predicted": item["example"].answers[got],
            "probability": round(float(row[got]), 4),
        }
        for item, want, got, row in zip(held, truth, told, chances, strict=True)
    ]
    return results, lines


def _score_preferences(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    del train
    rewards = rewards_of(learnt.model, learnt.objective(), held, learnt.collator(), reference=learnt.reference)
    long = np.asarray([[len(answer) for answer in item["example"].answers] for item in held], dtype=float)
    rivals = [("tuned", f"tuned: {learnt.title}", rewards), ("longer", "always the longer answer", long)]
    results = {
        "scores": [{"name": name, "title": title} | preference_scores(guess) for name, title, guess in rivals],
    }
    del results["scores"][1]["margin"]  # in characters, which nobody asked for
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "label": item["example"].answers[0],
            "predicted": item["example"].answers[int(row[1] > row[0])],
            "margin": round(float(row[0] - row[1]), 4),
        }
        for item, row in zip(held, rewards, strict=True)
    ]
    return results, lines


def _score_judged(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    del train
    wanted = [int(item["target"]) for item in held]
    rewards = rewards_of(learnt.model, learnt.objective(), held, learnt.collator(), reference=learnt.reference)
    long = np.asarray([len(item["example"].answers[0]) for item in held], dtype=float)
    rivals = [("tuned", f"tuned: {learnt.title}", rewards), ("longer", "the longer, the better", long)]
    results = {"scores": [{"name": n, "title": t} | judged_scores(guess, wanted) for n, t, guess in rivals]}
    del results["scores"][1]["margin"]
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "answer": item["example"].answers[0],
            "label": "wanted" if want else "unwanted",
            "reward": round(float(reward), 4),
        }
        for item, want, reward in zip(held, wanted, rewards, strict=True)
    ]
    return results, lines


def _score_rewards(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    del train
    some = held[:_REWARDED_ROWS]
    tuned = written_to(learnt, some)
    with use(learnt.model, None):
        before = written_to(learnt, some)
    rivals = [("tuned", f"tuned: {learnt.title}", tuned), ("base", "untouched base", before)]
    scores = [
        {"name": name, "title": title}
        | with_interval("reward", [np.asarray(found.rewards)], np.mean)
        | {"answer_tokens": float(np.mean([len(ids) for ids in found.tokens]))}
        for name, title, found in rivals
    ]
    lines = [
        {
            "row": item.get("row"),
            "text": item["example"].text,
            "answer": text,
            "label": f"before: {old[:200]}",
            "reward": round(float(value), 4),
        }
        for item, text, old, value in zip(some, tuned.texts, before.texts, tuned.rewards, strict=True)
    ]
    return {"scores": scores, "rewarded_rows": len(some)}, lines


def written_to(learnt: Learnt, items: Sequence[Any]) -> Written:
    """A sampled answer to each row with its reward, under the routing in force; the same draws each time."""
    draws = [draw_of(learnt.seed, at) for at in range(len(items))]
    return learnt.rollout({}).write([item["input_ids"] for item in items], [item["example"] for item in items], draws)


def _score_text(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    del train
    objective = learnt.objective()
    return score_text(learnt.model, objective, held, learnt.collator(), adapter=learnt.title), []


def _score_targets(
    learnt: Learnt, held: Sequence[Any], train: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    results, _ = _score_text(learnt, held, train)
    some = held[:_WRITTEN_ROWS]
    sources = [source_of(item["example"]) for item in some]
    references = [answer for _, answer in questions_of(some)]
    written = generate_texts(learnt.model, learnt.tokenizer, None, sources)
    with use(learnt.model, None):
        before = generate_texts(learnt.model, learnt.tokenizer, None, sources)
    for score, texts in zip(results["scores"], (written, before), strict=True):
        score |= {
            name: value for name, value in answer_scores(texts, references).items() if name in ("bleu", "rouge_l")
        }
    results["written_rows"] = len(some)
    lines = [
        {"row": item.get("row"), "text": source, "label": right, "predicted": text}
        for item, source, right, text in zip(some, sources, references, written, strict=True)
    ]
    return results, lines


_LOSS = Measure("loss", "loss", more_is_better=False, unit="nats per token")
_PERPLEXITY = Measure("perplexity", "perplexity", more_is_better=False)
_REWARD, _ANSWER_TOKENS = Measure("reward", "mean reward"), Measure("answer_tokens", "tokens an answer")
_ACCURACY = Measure("accuracy", "accuracy")
#: What is told of classifiers whose rows may have several labels.
_SEVERAL = (Measure("micro_f1", "micro-F1"), Measure("exact", "rows all right"))


def _choice(learnt: Learnt) -> Choice:
    if chooses_by_head("choice", learnt.model.config):
        return Choice(by_head=True)
    return Choice(**learnt.writing())


def _online(kind: type[_Kind], of: Learnt) -> _Kind:
    told = {each.name: of.reinforcement[each.name] for each in fields(kind) if each.name in of.reinforcement}
    return kind(**told, **of.writing())


TASKS: dict[str, Task] = {
    "choice": Task(
        _choice,
        _sequences, _score_choices, _ACCURACY, Measure("probability", "probability of the right answer"),
        _share_right,
    ),
    "classify": Task(
        lambda of: MultiLabel() if of.labels is not None and of.labels.several else Classification(),
        _padded, _score_classes, Measure("macro_f1", "macro-F1"), _ACCURACY, _macro_f1,
    ),
    "dpo": Task(
        lambda of: DPO(
            beta=of.preferences.get("beta", 0.1), smoothing=of.preferences.get("smoothing", 0.0),
            kind=of.preferences.get("loss", "sigmoid"), **of.writing(),
        ),
        _sequences, _score_preferences, Measure("pair_accuracy", "pairs in order"), Measure("margin", "margin"),
        _in_order,
    ),
    "grpo": Task(
        lambda of: _online(GRPO, of), _prompts, _score_rewards, _REWARD, _ANSWER_TOKENS,
    ),
    "kto": Task(
        lambda of: KTO(
            beta=of.preferences.get("beta", 0.1), wanted_weight=of.preferences.get("wanted_weight", 1.0),
            unwanted_weight=of.preferences.get("unwanted_weight", 1.0), **of.writing(),
        ),
        _sequences, _score_judged, Measure("auc", "area under the curve"), Measure("margin", "margin"), _auc,
    ),
    "lm": Task( lambda of: CausalLM.of(of.model), _padded, _score_text, _LOSS, _PERPLEXITY
    ),
    "mlm": Task( lambda _: MaskedLM(), _masking, _score_text, _LOSS, _PERPLEXITY),
    "ppo": Task(
        lambda of: _online(PPO, of).on(of.model), _prompts, _score_rewards, _REWARD, _ANSWER_TOKENS,
    ),
    "regress": Task( lambda _: Regression(), _padded, _score_numbers, Measure("pearson", "Pearson's r"),
        Measure("rmse", "RMSE", more_is_better=False), _pearson,
    ),
    "reward": Task( lambda _: Reward(), _sequences, _score_preferences,
        Measure("pair_accuracy", "pairs in order"), Measure("margin", "margin"), _in_order,
    ),
    "rloo": Task(
        lambda of: _online(RLOO, of), _prompts, _score_rewards, _REWARD, _ANSWER_TOKENS,
    ),
    "seq2seq": Task( lambda _: Seq2Seq(), _written_apart, _score_targets, _LOSS, Measure("bleu", "BLEU")),
    "sft": Task( lambda of: CausalLM.of(of.model), _padded, _score_text, _LOSS, _PERPLEXITY
    ),
    "tag": Task( lambda _: Tagging(), _padded, _score_tags, Measure("span_f1", "span F1"), _ACCURACY, _span_f1,
    ),
    "tfew": Task( lambda of: TFew(**of.writing()), _sequences,
        _score_choices, _ACCURACY, Measure("probability", "probability of the right answer"), _share_right,
    ),
}  # fmt: skip
