"""What language models say of labelled tokens: where logits and labels meet, and sums over whole sequences.

A batch of sequences [N, T] may hold several of one row (candidates, or a chosen and a rejected answer): `group` [N]
says which row of the batch each sequence belongs to, ascending from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels import IGNORED, LossHead

__all__ = [
    "IGNORED", "aligned", "by_row", "sequence_inputs", "sequence_outputs", "sequence_scores", "token_log_probs",
    "token_table",
]  # fmt: skip

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")


def sequence_inputs(batch: Mapping[str, Tensor], *, tail_only: bool = False) -> dict[str, Any]:
    """What a language model is called with; `tail_only` asks for logits from the first labelled position on.

    Encoder-decoders are known by their `decoder_input_ids`.
    """
    found: dict[str, Any] = {name: batch[name] for name in _INPUTS if name in batch} | {"use_cache": False}
    if tail_only and "decoder_input_ids" not in batch:
        labels = batch["labels"]
        labelled = (labels[:, 1:] != IGNORED).any(0).nonzero()
        first = int(labelled[0]) if len(labelled) else labels.shape[1] - 1
        found["logits_to_keep"] = labels.shape[1] - first
    return found


def sequence_outputs(
    model: Any, batch: Mapping[str, Tensor], *, tail_only: bool = False, head: LossHead | None = None
) -> Any:
    """The losses of tokens by the model's `head`, or its outputs where that is not known."""
    inputs = sequence_inputs(batch, tail_only=tail_only and head is None)
    return head.losses(model, inputs, batch["labels"]) if head is not None else model(**inputs)


def aligned(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, kept, vocabulary], the labels [N, kept] that they predict, and where there are any.

    A decoder predicts the token after each position; an encoder-decoder's inputs are shifted already.
    """
    logits, labels = outputs.logits, batch["labels"]
    if "decoder_input_ids" not in batch:
        logits = logits[:, :-1]
        labels = labels[:, -logits.shape[1] :] if logits.shape[1] else labels[:, :0]
    return logits, labels, labels != IGNORED


def token_log_probs(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The log-probability of each labelled token, [n] in float32, and the sequence that each belongs to, [n].

    `outputs` are the model's, or the losses of tokens [N, tokens] that a `LossHead` gives.
    """
    if isinstance(outputs, Tensor):
        wanted = batch["labels"][:, 1:] != IGNORED
        return -outputs[:, 1:][wanted].float(), wanted.nonzero()[:, 0]
    logits, labels, wanted = aligned(outputs, batch)
    return -F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none"), wanted.nonzero()[:, 0]


def token_table(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probability of each labelled token at its own place, [N, T] in float32; 0 where there is no label."""
    if isinstance(outputs, Tensor):
        return -outputs
    values, _ = token_log_probs(outputs, batch)
    wanted = batch["labels"] != IGNORED
    if "decoder_input_ids" not in batch:
        wanted[:, 0] = False
    return values.new_zeros(wanted.shape).index_put((wanted,), values)


def sequence_scores(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The summed log-probability of each sequence's labelled tokens, and how many those are, both [N] in float32.

    Example:
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(logits=torch.zeros(1, 3, 4))
        >>> sums, counts = sequence_scores(outputs, {"labels": torch.tensor([[-100, 1, 2]])})
        >>> round(sums.item(), 4), counts.item()
        (-2.7726, 2.0)
    """
    values, owner = token_log_probs(outputs, batch)
    zeros = values.new_zeros(batch["labels"].shape[0])
    return zeros.index_add(0, owner, values), zeros.index_add(0, owner, torch.ones_like(values))


def by_row(values: Tensor, group: Tensor, *, empty: float) -> Tensor:
    """Values of sequences [N] as a table [rows, most sequences of a row]; `empty` where a row has fewer.

    Example:
        >>> by_row(torch.tensor([1., 2., 3.]), torch.tensor([0, 0, 1]), empty=0.0).tolist()
        [[1.0, 2.0], [3.0, 0.0]]
    """
    sizes = torch.bincount(group)
    within = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]
    table = values.new_full((len(sizes), int(sizes.max())), empty)
    return table.index_put((group, within), values)
