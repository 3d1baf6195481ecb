"""Ensembles: several adapters answer the same rows in one forward, and vote or average, with their spread.

The rows are repeated once for every adapter and routed one by one, so that adapters of any methods go together: prompts
of one task (Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 6: a majority vote
of five), LoRAs of several seeds, or mixtures of both. With adapters k = 1..K, weights w_k that sum to 1, and p_k the
probabilities of adapter k:

    mean-probability       p = sum_k w_k p_k
    mean-log-probability   log p = sum_k w_k log p_k - log Z, the normalised geometric mean
    vote                   p(c) = sum of w_k over the adapters whose likeliest class is c

How far the adapters disagree is the standard deviation of the chosen class's probability over them, and the mutual
information H(sum_k w_k p_k) - sum_k w_k H(p_k) in nats (Houlsby et al. 2011, "Bayesian Active Learning..."): 0 where
all say the same, however unsure each one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from graftlm.core import adapters, use
from graftlm.core.sequence import takes
from graftlm.errors import AdapterError, Finding, RoutingError
from graftlm.evaluation.losses import evaluating

__all__ = ["Ensemble", "Reduce", "ensemble"]

Reduce = Literal["mean-probability", "mean-log-probability", "vote"]


@dataclass(frozen=True)
class Ensemble:
    """What several adapters say of a batch of rows, together and each; the classes are labels, or next tokens.

    All tensors are float32 or int64, on the model's device.
    """

    #: The log-probabilities of all together, [rows, classes]. Of a vote: the logarithms of the shares of votes.
    log_probabilities: Tensor
    #: The likeliest class, [rows]. Where a vote is tied, that of the tied classes with the larger mean probability.
    choice: Tensor
    #: The likeliest class of each adapter, [rows, adapters].
    votes: Tensor
    #: The standard deviation over the adapters of the probability of `choice`, [rows].
    spread: Tensor
    #: The mutual information of the class and the adapter in nats, [rows].
    mutual_information: Tensor
    #: The log-probabilities of each adapter, [adapters, rows, classes].
    each: Tensor
    #: The names of the adapters, in the order of the tensors above; None is the base.
    names: tuple[str | tuple[str, ...] | None, ...]


def ensemble(
    model: Any,
    names: Sequence[str | tuple[str, ...] | None],
    batch: Mapping[str, Any],
    *,
    reduce: Reduce = "mean-probability",
    weights: Sequence[float] | None = None,
) -> Ensemble:
    """Let the adapters `names` answer `batch` in one forward, each with its weight (all alike without `weights`).

    `batch` is what the model is called with: tensors of B rows, left or right padded. Each entry of `names` is an
    adapter, a tuple of adapters that act together, or None for the base. A model with a classification head gives a
    distribution over labels, a language model one over the token that follows each row's last one, with positions
    counted from each row's first token, as in generation. The routing in force is put back afterwards.

    Raises RoutingError for names that are not attached, AdapterError for weights or a batch that do not fit.

    Example:
        >>> found = ensemble(model, ["seed-0", "seed-1", "seed-2"], batch)                   # doctest: +SKIP
        >>> found.choice, found.spread                                                       # doctest: +SKIP
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if reduce not in get_args(Reduce):
        raise AdapterError(Finding("A130", f"reduce={reduce!r} is not one of {', '.join(get_args(Reduce))}"))
    if not names:
        fix = f"ensemble(model, {sorted(adapters(model))}, batch)"
        raise RoutingError(Finding("A131", "an ensemble of no adapters", fix=fix))
    share = _shares(weights, len(names))
    rows, tensors = _rows_of(batch)
    tensors |= _positions(model, tensors)
    repeated = {name: _repeat(value, rows, len(names)) for name, value in tensors.items()}
    others = {name: value for name, value in batch.items() if name not in tensors and name != "labels"}
    with use(model, [name for name in names for _ in range(rows)]), evaluating(model):
        logits = model(**repeated, **others).logits
    logits = _last(logits, repeated) if logits.dim() == 3 else logits
    each = logits.float().log_softmax(-1).reshape(len(names), rows, -1)
    return _reduced(each, share.to(each.device), reduce, names)


def _shares(weights: Sequence[float] | None, count: int) -> Tensor:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    share = torch.tensor(given, dtype=torch.float64)
    if len(given) != count or not bool(torch.isfinite(share).all()) or min(given) < 0 or sum(given) == 0:
        message = f"weights {given} do not weigh {count} adapters: want {count} numbers from 0, not all 0"
        raise AdapterError(Finding("A132", message, fix=f"weights={[1.0] * count}"))
    return share / share.sum()


def _rows_of(batch: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """How many rows the batch has, and its tensors that have a row each; labels and the like are left out."""
    first = next((batch[name] for name in ("input_ids", "inputs_embeds") if isinstance(batch.get(name), Tensor)), None)
    if first is None:
        raise AdapterError(Finding("A133", f"the batch has no input_ids: it has {', '.join(batch) or 'nothing'}"))
    rows = int(first.shape[0])
    skipped = ("labels", "row")
    return rows, {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.dim() and name not in skipped and value.shape[0] == rows
    }


def _positions(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions for rows that are padded on the left, as `generate` counts them; nothing elsewhere."""
    mask = tensors.get("attention_mask")
    generates = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
    if mask is None or mask.dim() != 2 or not generates or "position_ids" in tensors or bool(mask[:, 0].all()):
        return {}
    if not takes(model, "position_ids"):
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}


def _repeat(value: Tensor, rows: int, times: int) -> Tensor:
    return value.expand(times, *value.shape).reshape(times * rows, *value.shape[1:])


def _last(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits [rows, vocabulary] at each row's last real token (the decoder's, where there are two stacks)."""
    tokens = int(logits.shape[1])
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    if mask is None or mask.dim() != 2 or mask.shape[1] < tokens:
        return logits[:, -1]
    places = torch.arange(mask.shape[1], device=logits.device)
    last = (places * (mask.to(logits.device) != 0)).argmax(-1) - (mask.shape[1] - tokens)
    return logits[torch.arange(len(logits), device=logits.device), last]


def _reduced(each: Tensor, share: Tensor, reduce: Reduce, names: tuple[Any, ...]) -> Ensemble:
    # In double precision, so that an adapter averaged with itself is that adapter to the last bit of float32.
    log_p = each.double()
    share = share[:, None, None]
    mean = (log_p.exp() * share).sum(0)
    votes = each.argmax(-1)
    if reduce == "vote":
        counts = torch.zeros_like(mean).scatter_add_(1, votes.T, share[:, 0].T.expand(votes.shape[1], -1).contiguous())
        together = counts.log()
        # The mean probability decides among equally many votes.
        tied = counts >= counts.amax(-1, keepdim=True) - 1e-9
        choice = mean.masked_fill(~tied, -1.0).argmax(-1)
    else:
        if reduce == "mean-probability":
            together = torch.logsumexp(log_p + share.log(), 0)
        else:
            weighted = torch.where(share > 0, log_p * share, torch.zeros_like(log_p))
            together = weighted.sum(0).log_softmax(-1)
        choice = together.argmax(-1)
    chosen = log_p.exp().gather(-1, choice[None, :, None].expand(len(each), -1, 1))[..., 0]
    centre = (chosen * share[..., 0]).sum(0)
    spread = ((chosen - centre) ** 2 * share[..., 0]).sum(0).sqrt()
    own = (_entropy(log_p) * share[..., 0]).sum(0)
    information = (_entropy(mean.log()) - own).clamp(min=0)
    return Ensemble(together.float(), choice, votes.T.contiguous(), spread.float(), information.float(), each, names)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
