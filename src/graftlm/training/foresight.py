"""What a run will take, from its settings and its rows, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graftlm.core import Method
from graftlm.data import Prepared
from graftlm.data.prepare import ONLINE
from graftlm.data.tokenising import IGNORED
from graftlm.errors import Finding
from graftlm.planning import Plan, said
from graftlm.planning.plan import Asked, most_bytes
from graftlm.planning.step import Shape, like
from graftlm.settings import RunSettings
from graftlm.training.decisions import decide_epochs, decide_updates

__all__ = ["does_not_fit", "foreseen", "longest_batch"]

_MULTIPLE = 8  # what the collator rounds the length of a batch up to
_EVALUATION_ROWS = 16  # scored at once, as `evaluation.losses` does


def foreseen(settings: RunSettings, config: Any, prepared: Prepared, method: Method) -> Asked:
    """The run's largest step: its longest rows, with the loss reading all that any row's loss reads.

    A row with several answers counts as so many rows. Raises PlanError where the base's code does not run without
    values, and for tasks whose step is not known to the planner.
    """
    train = settings.train
    on_cuda = torch.cuda.is_available()
    dtype = settings.model.dtype
    if dtype == "auto":
        kind = (getattr(config, "dtype", None) if on_cuda else None) or torch.float32
    else:
        kind = getattr(torch, dtype)
    rows = [sequence for item in [*prepared.train, *prepared.eval] for sequence in item.get("sequences", [item])]
    several = max(len(item.get("sequences", [item])) for item in prepared.train)
    length, labelled = longest_batch(rows)
    if prepared.task in ONLINE:  # answers are yet to be written
        several = settings.reinforcement.answers
        length += -(-settings.generate.max_new_tokens // _MULTIPLE) * _MULTIPLE
    shape = Shape(
        on_processor=not on_cuda,
        rows=min(train.batch // train.accumulate, len(prepared.train)) * several,
        length=length,
        dtype=kind,
        recompute=train.recompute,
        quantize=settings.model.quantize,
        optimizer=train.optimizer,
        labelled=labelled,
        evaluation_rows=min(_EVALUATION_ROWS, len(prepared.eval)) * several,
        target_length=max(len(row.get("labels", ())) for row in rows)
        if like(prepared.task, config) == "seq2seq"
        else 0,
    )
    epochs = train.epochs or decide_epochs(len(prepared.train))
    if prepared.task in ONLINE:
        epochs *= decide_updates(prepared.task, settings.reinforcement.updates)
    lengths = [len(row["input_ids"]) for item in prepared.train for row in item.get("sequences", [item])]
    return Asked(
        config,
        method,
        like(prepared.task, config),
        shape,
        name=settings.model.name,
        accumulate=train.accumulate,
        device="cuda" if on_cuda else "cpu",
        classes=len(prepared.labels) if prepared.labels else 2,
        most_bytes=most_bytes(settings.model.max_memory, "cuda" if on_cuda else "cpu"),
        steps=train.steps or math.ceil(epochs * -(-len(prepared.train) // train.batch)),
        mean_share=min(
            1.0, (sum(lengths) / len(lengths) + _MULTIPLE / 2) / length
        ),  # rows of like length share a batch
    )


def longest_batch(rows: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """The tokens of the longest row, rounded up as batches are, and the share of them that a loss may read.

    From the first label of any row on: the model gives logits from there to the end of the batch.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    length = -(-longest // _MULTIPLE) * _MULTIPLE
    firsts = [
        next((at for at, label in enumerate(row["labels"]) if label != IGNORED), 0)
        for row in rows
        if isinstance(row.get("labels"), list) and len(row["labels"]) == len(row["input_ids"])
    ]
    return length, (length - min(firsts)) / length if firsts else 1.0


def does_not_fit(plan: Plan, room: int) -> Finding:
    """What is said of a run that needs more memory than there is, with the terms that weigh most."""
    most = sorted(plan.terms.items(), key=lambda term: -term[1])[:4]
    detail = ", ".join(f"{name} {said(size)}" for name, size in most)
    message = f"the run needs {said(plan.total_bytes)}, there are {said(room)}: {detail}"
    return Finding("E105", message, fix="--set train.recompute=blocks, or a smaller --batch")
