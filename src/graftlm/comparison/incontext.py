"""Few-shot prompting of the untouched base, scored like the trained contestants, with and without a cached prompt.

k training rows with their answers stand before every question. Answers are scored by the tokens of the reference.
Labels are chosen by rank: of all labels the one whose tokens have the smallest mean loss, as in T-Few (Liu et al. 2022,
"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", sections 3.1 and 3.4). The
examples are the same for all questions, so their keys and values can be computed once: a query then costs the question
alone, and the cache is held in memory for as long as the task is served.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from graftlm.comparison.bench import Bench, flops_of
from graftlm.data import Collator, Template
from graftlm.data.checking import Notes
from graftlm.data.tokenising import IGNORED, encode_chats
from graftlm.errors import Finding, RunError
from graftlm.evaluation import losses
from graftlm.evaluation.losses import batches, evaluating
from graftlm.objectives import CausalLM
from graftlm.training.early import context_of
from graftlm.training.measures import Scored, scored_classes

__all__ = ["InContext", "Prompted", "in_context", "prompted"]

_BATCH = 8
_COUNTED = 6  # queries whose operations are counted


@dataclass(frozen=True)
class Prompted:
    """The questions of the test rows behind one prompt: an item for every answer that is scored.

    `shared` is the number of tokens that all items begin with: the prompt that can be cached.
    """

    items: list[dict[str, Any]]
    options: int
    shared: int
    longest: int


@dataclass(frozen=True)
class InContext:
    """What prompting gave and what a query takes; `cached_` is with the prompt's keys and values held in memory."""

    scored: Scored
    query_flops: int
    cached_query_flops: int
    cache_bytes: int
    query_seconds: float
    cached_query_seconds: float
    #: The largest difference of a row's loss with and without the cache, in nats: rounding.
    cache_difference: float


def prompted(bench: Bench, shots: int, seed: int) -> Prompted:
    """The test rows behind `shots` training rows, drawn by `seed`, for labels as many of each as can be.

    Raises RunError (U153) where the rows cannot be shown, or do not fit the base's context.
    """
    shown = [_conversation(bench, item["example"], silent=True) for item in _chosen(bench, shots, seed)]
    before = [message for messages in shown for message in messages]
    names = [bench.labels.name(at) for at in range(len(bench.labels))] if bench.labels else [None]
    examples = [
        replace(item["example"], messages=tuple(before + _conversation(bench, item["example"], answer=name)))
        for item in bench.test
        for name in names
    ]
    template = bench.template or Template.of(bench.tokenizer)
    items, _, rejected = encode_chats(examples, bench.tokenizer, template, Notes(()), max_length=1 << 30)
    if rejected or len(items) != len(examples):
        message = f"the chat template refuses {shots} examples before a question"
        raise RunError(Finding("U153", message, fix="leave --shots out"))
    longest = max(len(item["input_ids"]) for item in items)
    context = context_of(bench.model.config)
    if longest > context:
        fits = max(0, int(shots * context / longest) - 1)
        message = f"{shots} examples and a question are up to {longest} tokens, the base reads {context}"
        raise RunError(Finding("U153", message, fix=f"--shots {fits}"))
    ids = np.array([item["input_ids"][: min(len(i["input_ids"]) for i in items)] for item in items])
    same = (ids == ids[0]).all(0)
    shared = int(same.argmin()) if not same.all() else len(same)
    # The token before the first that is scored must be computed anew: it predicts it.
    first = min(next(at for at, label in enumerate(item["labels"]) if label != IGNORED) for item in items)
    return Prompted(items, len(names), max(0, min(shared, first - 1)), longest)


def in_context(model: Any, bench: Bench, asked: Prompted) -> InContext:
    """The untouched causal `model` on the prompted rows, under the routing in force."""
    collate = Collator(bench.tokenizer.pad_token_id, max_length=context_of(model.config))
    began_s = time.perf_counter()
    plain = losses(model, CausalLM(), asked.items, collate, batch=_BATCH)
    plain_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    sums, size = _cached(model, asked, asked.items, collate)
    cached_s = time.perf_counter() - began_s
    queries = len(asked.items) // asked.options
    some = asked.items[: _COUNTED * asked.options]
    flops = flops_of(lambda: [losses(model, CausalLM(), [item], _exact(collate)) for item in some])
    with evaluating(model):
        cache = _prefix(model, asked)
        fewer = flops_of(lambda: [_suffix_losses(model, asked, cache, [item], _exact(collate)) for item in some])
    counted = len(some) // asked.options
    if asked.options > 1:
        each = (plain.sums / np.maximum(plain.counts, 1)).reshape(queries, asked.options)
        chances = np.exp(-each) / np.exp(-each).sum(1, keepdims=True)
        scored = scored_classes(chances, np.array([int(item["labels"]) for item in bench.test]))
    else:
        scored = Scored(plain.sums, plain.counts, plain.sums)
    return InContext(
        scored=scored,
        query_flops=flops // counted,
        cached_query_flops=fewer // counted,
        cache_bytes=size,
        query_seconds=plain_s / queries,
        cached_query_seconds=cached_s / queries,
        cache_difference=float(np.abs(plain.sums - sums).max()),
    )


def _chosen(bench: Bench, shots: int, seed: int) -> list[Any]:
    order = random.Random(seed).sample(range(len(bench.train)), len(bench.train))
    if bench.labels is None or not shots:
        return [bench.train[at] for at in order[:shots]]
    by_label: dict[int, list[Any]] = {}
    for at in order:
        by_label.setdefault(int(bench.train[at]["labels"]), []).append(bench.train[at])
    turns = [group[turn] for turn in range(shots) for _, group in sorted(by_label.items()) if turn < len(group)]
    chosen = turns[:shots]
    random.Random(seed).shuffle(chosen)
    return chosen


def _conversation(bench: Bench, example: Any, *, answer: str | None = None, silent: bool = False) -> list[Any]:
    """A row as messages: those that it has, or its text and a label; `silent` ones are shown and not scored."""
    if bench.labels is not None:
        label = answer if answer is not None else str(bench.labels.name(bench.labels.id(example.label)))
        found: list[dict[str, Any]] = [
            {"role": "user", "content": example.text},
            {"role": "assistant", "content": label},
        ]
    else:
        found = [dict(message) for message in example.messages]
    last = len(found) - 1
    return [
        message | ({"weight": 0} if message["role"] == "assistant" and (silent or at < last) else {})
        for at, message in enumerate(found)
    ]


def _exact(collate: Collator) -> Collator:
    """Without rounding widths up: what is counted is the question, not its padding."""
    return replace(collate, pad_to_multiple_of=1)


def _prefix(model: Any, asked: Prompted) -> Any:
    """The keys and values of what all items begin with; None where that is nothing."""
    if not asked.shared:
        return None
    ids = torch.tensor([asked.items[0]["input_ids"][: asked.shared]], device=model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values


def _cached(model: Any, asked: Prompted, items: Sequence[Any], collate: Collator) -> tuple[np.ndarray, int]:
    """The summed loss of each item with the prompt computed once, and the bytes of what is kept of it."""
    order = sorted(range(len(items)), key=lambda at: len(items[at]["input_ids"]))
    sums = np.zeros(len(items))
    with evaluating(model):
        cache = _prefix(model, asked)
        for part in batches(order, _BATCH):
            found, _ = _suffix_losses(model, asked, cache, [items[at] for at in part], collate)
            sums[list(part)] = found
    return sums, _bytes_of(cache)


def _suffix_losses(
    model: Any, asked: Prompted, cache: Any, items: Sequence[Mapping[str, Any]], collate: Collator
) -> tuple[list[float], list[int]]:
    tails = [{key: item[key][asked.shared :] for key in ("input_ids", "labels")} for item in items]
    batch = {key: tensor.to(model.device) for key, tensor in collate(tails).items()}
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if cache is not None:
        rows, width = batch["input_ids"].shape
        own = copy.deepcopy(cache)  # a forward writes into it
        own.batch_repeat_interleave(rows)
        before = torch.ones(rows, asked.shared, dtype=torch.long, device=model.device)
        inputs["attention_mask"] = torch.cat([before, batch["attention_mask"]], 1)
        inputs["position_ids"] = (asked.shared + torch.arange(width, device=model.device)).expand(rows, width)
        inputs["past_key_values"] = own
    return CausalLM().row_losses(model(**inputs), batch)


def _bytes_of(cache: Any) -> int:
    if cache is None:
        return 0
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
