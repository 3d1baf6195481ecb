"""`evaluate`: an adapter or a bare base scored on rows, beside its base and the baselines, and against another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.core import use
from graftlm.data import Collator, prepare
from graftlm.errors import DataError, Finding, GraftError, RunError
from graftlm.evaluation import (
    Estimate,
    answer_scores,
    generate_texts,
    harness_scores,
    losses,
    need_harness,
    paired_test,
    text_scores,
    verdict_on,
)
from graftlm.evaluation.statistics import sure_scores
from graftlm.evaluation.texts import ROW_MEASURES, answer_rows, need_text_metrics
from graftlm.objectives import CausalLM
from graftlm.training.decisions import positions_taken
from graftlm.training.early import context_of, data_of
from graftlm.training.measures import MEASURES, measure_of
from graftlm.training.opening import Opened, open_adapter
from graftlm.training.scoring import questions_of, score_classification, text_results
from graftlm.training.tasks import chooses_by_head, learnt_of

__all__ = ["evaluate", "evaluate_harness"]

_SHOWN = 300  # characters of a row among the worst


def evaluate(
    path: str | Path,
    data: str | Path | None = None,
    *,
    base: str | None = None,
    mapping: dict[str, str] | None = None,
    max_rows: int | None = None,
    against: str | Path | None = None,
    generate: int = 0,
    worst: int = 3,
    max_new_tokens: int = 96,
    **placing: Any,
) -> dict[str, Any]:
    """The scores of a run's (or an adapter's, or a base's) model on `data`, or on the rows that the run held out.

    Every row of `data` is used. Classifiers are scored beside the baselines that learn from the run's own training rows
    (where those are still as they were), writers beside their untouched base. With `against`, another run is scored on
    the same rows, and `against` of the result says by how much they differ, with an interval, a p-value and a verdict:
    in accuracy and loss, or in the score of the task that rows have (`graftlm.training.measures`).
    `generate` is the number of rows that are answered in full and compared with their references (ROUGE-L, chrF, BLEU).
    `worst` is how many of the rows with the largest loss are in the result. `placing` lays the bases out over
    devices and disk, as in `open_adapter`.

    Raises DataError where the rows do not fit the adapter's task, RunError where the data of the run have changed or
    the two models cannot be compared.

    Example:
        >>> evaluate("runs/messages-1", "new.csv")["scores"][0]["macro_f1"]     # doctest: +SKIP
    """
    if data is None and (mapping or max_rows):
        raise DataError(Finding("U123", "mapping and max_rows are for a file with rows, and none is given"))
    if generate:
        need_text_metrics()
    opened = open_adapter(path, base=base, **placing)
    held, known = _rows(path, data, opened, mapping, max_rows)
    other = None
    if against is not None:
        other = open_adapter(against, **placing)
        _check_comparable(path, opened, against, other, held)
    found = _scored(opened, held, known, by_row=other is not None)
    results = found.results
    results["worst"] = found.worst(worst)
    pairs = None
    if generate:
        pairs = _answered(opened, held[:generate], results, max_new_tokens)
    if other is not None:
        rival = _scored(other, held, (), by_row=True)
        results["against"] = _compared(str(against), found, rival)
        if pairs is not None:
            second = _written(other, held[:generate], max_new_tokens)
            rows = [answer_rows(texts, pairs[1]) for texts in (pairs[0], second)]
            results["against"]["answers"] = {
                name: _told(paired_test(rows[0][name], rows[1][name]), higher=True) for name in ROW_MEASURES
            }
    return results


def evaluate_harness(
    path: str | Path,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    max_rows: int | None = None,
    shots: int | None = None,
    **placing: Any,
) -> list[dict[str, Any]]:
    """What a run's (or an adapter's, or a base's) model scores on tasks of lm-evaluation-harness, beside its base.

    `tasks` are names of the harness's catalogue or paths of task files, which need nothing from elsewhere where their
    data lie here. `placing` is as in `open_adapter`. See `graftlm.evaluation.harness_scores` for the lines.

    Raises RunError (U126) for models without a language model's head, DataError (D195) for tasks that are not there,
    EnvironmentFault (E132) without the harness.

    Example:
        >>> evaluate_harness("runs/faq-1", ["tasks/capitals.yaml"])[0]["tuned"]     # doctest: +SKIP
    """
    need_harness()
    opened = open_adapter(path, base=base, **placing)
    if opened.task in ("classify", "regress", "tag", "reward", "mlm") or not opened.model.can_generate():
        message = f"{path} is for {opened.task}, and the harness asks models that write"
        raise RunError(Finding("U126", message, fix=f"graftlm evaluate {path} DATA"))
    taken = positions_taken(opened.adapter.method) if opened.adapter is not None else 0
    return harness_scores(
        opened.model,
        opened.tokenizer,
        tasks,
        max_length=context_of(opened.model.config) - taken,
        max_rows=max_rows,
        shots=shots,
        with_base=opened.adapter is not None,
    )


@dataclass(frozen=True)
class _Found:
    """What scoring one model on the rows gave: results as in run.json, and by row what they come from."""

    results: dict[str, Any]
    #: Names of measures to (values by row, weights by row or None, whether more is better).
    by_row: Mapping[str, tuple[np.ndarray, np.ndarray | None, bool]]
    worst: Callable[[int], list[dict[str, Any]]]


def _rows(
    path: str | Path, data: str | Path | None, opened: Opened, mapping: dict[str, str] | None, max_rows: int | None
) -> tuple[list[Any], Sequence[Any]]:
    """The rows to score, and the training rows that baselines may learn from."""
    from graftlm.training.run import held_out_of  # that room scores with this one

    if opened.adapter is None:
        if data is None:
            raise DataError(Finding("U121", f"{path} is a base model: name a file with rows", fix=f"{path} rows.jsonl"))
    else:
        try:
            prepared = held_out_of(Path(path), opened)
        except GraftError:
            if data is None:
                raise
            prepared = None  # an adapter without a run, or data that are no longer there: no baselines
        if data is None:
            assert prepared is not None
            return prepared.eval, prepared.train
    given = prepare(
        data_of(str(data)),
        mapping=mapping,
        eval_share=0,
        max_rows=max_rows,
        task=opened.task if opened.adapter is not None else "auto",
        tokenizer=opened.tokenizer,
        max_length=opened.max_length,
        labels=opened.labels,
        scale=opened.scale,
        template=opened.template,
        prompt=opened.prompt,
        by_head=chooses_by_head(opened.task, opened.model.config),
        apart=bool(getattr(opened.model.config, "is_encoder_decoder", False)),
    )
    if given.task == "classify" and opened.labels is None:
        message = f"{path} is a base model without a classifier, and {data} has labels"
        raise DataError(Finding("U121", message, fix=f"graftlm train {data}"))
    if opened.adapter is None or prepared is None:
        return given.train, ()
    _not_trained_on(path, given.train, prepared.train)
    return given.train, prepared.train


def _not_trained_on(path: str | Path, rows: Sequence[Any], trained: Sequence[Any]) -> None:
    seen = {item["example"].key for item in trained}
    both = sum(item["example"].key in seen for item in rows)
    if both:
        message = f"{path} was trained on {both} of these {len(rows)} rows: its score on them would say nothing"
        raise RunError(Finding("U125", message, fix="leave DATA out, or give rows that it has not seen"))


def _scored(opened: Opened, held: list[Any], known: Sequence[Any], *, by_row: bool) -> _Found:
    """The model's scores; of tasks whose score is not made row by row, the rows' own too where `by_row` asks for it."""
    collate = Collator(opened.tokenizer.pad_token_id, max_length=opened.max_length)
    name = opened.adapter.method.parts[0].title if opened.adapter is not None else "untouched base"
    one_label = opened.task == "classify" and opened.labels is not None and not opened.labels.several
    if opened.task not in ("lm", "sft") and not one_label:
        learnt, each_row = learnt_of(opened), {}
        told, rows = learnt.score(held, known)
        if by_row:
            measure = measure_of(opened.task, opened.labels)
            scored = measure.score(learnt, held)
            each_row[measure.title] = (measure.by_row(scored.values, scored.counts), None, measure.higher_is_better)
        return _Found(told, each_row, lambda count: rows[:count])
    measures = learnt_of(opened).measures() if opened.adapter is not None else {}
    if one_label:
        assert opened.labels is not None
        results, lines = score_classification(
            opened.model, opened.labels, held, collate, adapter=name, train=list(known)
        )
        right = np.array([float(line["label"] == line["predicted"]) for line in lines])
        nats = np.array([line["nats"] for line in lines])

        def worst_rows(count: int) -> list[dict[str, Any]]:
            order = sorted(range(len(lines)), key=lambda at: (-lines[at]["nats"], at))
            return [lines[at] | {"text": lines[at]["text"][:_SHOWN]} for at in order[:count]]

        results["scores"] = sure_scores(results["scores"], len(held))
        return _Found(measures | results, {"accuracy": (right, None, True), "nats": (nats, None, False)}, worst_rows)
    tuned = losses(opened.model, CausalLM.of(opened.model), held, collate)
    if opened.adapter is None:
        results = {
            "eval_rows": len(held),
            "eval_tokens": int(tuned.counts.sum()),
            "scores": [{"name": "base", "title": name} | text_scores(tuned)],
        }
    else:
        with use(opened.model, None):
            untouched = losses(opened.model, CausalLM.of(opened.model), held, collate)
        results = text_results(tuned, untouched, adapter=name)
    results["scores"] = sure_scores(results["scores"], len(held))
    each = tuned.sums / np.maximum(tuned.counts, 1)

    def worst_texts(count: int) -> list[dict[str, Any]]:
        order = sorted(range(len(held)), key=lambda at: (-each[at], at))
        return [
            {"row": held[at].get("row"), "text": _said(held[at])[:_SHOWN], "loss": float(each[at])}
            for at in order[:count]
        ]

    return _Found(measures | results, {"loss": (tuned.sums, tuned.counts, False)}, worst_texts)


def _said(item: Mapping[str, Any]) -> str:
    example = item["example"]
    if example.messages:
        return " | ".join(str(message.get("content", "")) for message in example.messages)
    return str(example.text)


def _check_comparable(path: str | Path, one: Opened, against: str | Path, other: Opened, held: Sequence[Any]) -> None:
    """Raise RunError where the two models' scores on the same rows cannot be set side by side."""
    from graftlm.training.run import held_out_of

    names = [opened.labels.names if opened.labels else None for opened in (one, other)]
    fault = ""
    if one.task != other.task and {one.task, other.task} != {"lm", "sft"}:
        fault = f"{path} was trained for {one.task}, {against} for {other.task}"
    elif one.task not in MEASURES:
        fault = f"{one.task} has no score of single rows"
    elif names[0] != names[1]:
        fault = f"{path} and {against} have other labels"
    elif one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        fault = f"{path} and {against} have other tokens"
    elif one.adapter is not None and other.adapter is not None and one.template != other.template:
        fault = f"{path} and {against} have other chat templates"
    if fault:
        raise RunError(Finding("U124", f"they cannot be compared row by row: {fault}"))
    if other.adapter is not None:
        try:
            prepared = held_out_of(Path(against), other)
        except GraftError:
            return  # what it was trained on cannot be told
        _not_trained_on(against, held, prepared.train)


def _compared(name: str, one: _Found, other: _Found) -> dict[str, Any]:
    """By measure: the other's score, and how much the first differs from it."""
    found: dict[str, Any] = {"name": name, "scores": other.results["scores"][0], "measures": {}}
    for measure, (values, weights, higher) in one.by_row.items():
        difference = paired_test(values, other.by_row[measure][0], weights)
        found["measures"][measure] = _told(difference, higher=higher)
    return found


def _told(difference: Estimate, *, higher: bool) -> dict[str, Any]:
    return {
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p_value": difference.p_value,
        "verdict": verdict_on(difference, higher_is_better=higher),
    }


def _answered(
    opened: Opened, held: Sequence[Any], results: dict[str, Any], max_new_tokens: int
) -> tuple[list[str], list[str]]:
    """Answers and references of the first rows, scored in `results["answers"]` beside the base's answers."""
    if opened.template is None or opened.task == "classify":
        raise DataError(Finding("U123", "there are no answers to write: the rows are not prompts with completions"))
    references = [reference for _, reference in questions_of(held)]
    tuned = _written(opened, held, max_new_tokens)
    results["answers"] = {"rows": len(references), "tuned": answer_scores(tuned, references)}
    if opened.adapter is not None:
        with use(opened.model, None):
            plain = _written(opened, held, max_new_tokens)
        results["answers"]["base"] = answer_scores(plain, references)
        rows = [answer_rows(texts, references) for texts in (tuned, plain)]
        results["answers"]["against_base"] = {
            name: _told(paired_test(rows[0][name], rows[1][name]), higher=True) for name in ROW_MEASURES
        }
    return tuned, references


def _written(opened: Opened, held: Sequence[Any], max_new_tokens: int) -> list[str]:
    prompts = [turns for turns, _ in questions_of(held)]
    return generate_texts(opened.model, opened.tokenizer, opened.template, prompts, max_new_tokens=max_new_tokens)
