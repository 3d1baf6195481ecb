"""Scores of parameters: how much each entry of a weight matters, by its size, its gradient, or its Fisher information.

`magnitude` |w| and `random` need no data. From data, with g the gradient of an example's mean loss: `gradient` the
mean of |g|, `snip` the mean of |w g| (Lee et al. 2019), `empirical-fisher` the mean of g^2 with the true labels, and
`fisher` the same with labels drawn from the model's own distribution (Sung et al. 2021, "Training Neural Networks
with Fixed Sparse Masks", section 3). The Fisher scores take one example at a time: the mean of squares is not the
square of the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import Samples, in_eval_mode
from graftlm.core.kind import head_kind
from graftlm.core.storage import is_across, is_packed, plain_weight
from graftlm.errors import Finding, MethodError
from graftlm.methods.parameters import shape_of

__all__ = ["FROM_DATA", "SCORES", "best", "scores_from_data"]

FROM_DATA = ("gradient", "snip", "empirical-fisher", "fisher")
SCORES = ("magnitude", "random", *FROM_DATA)


#: What objectives read of a batch and models do not.
_NO_INPUTS = ("labels", "group", "target", "row", "reference")


def scores_from_data(
    model: nn.Module, scored: Sequence[nn.Parameter | nn.Module], kind: str, samples: Samples
) -> list[Tensor]:
    """The score of every entry of what is `scored`, float32; the model is left as it was.

    That is parameters, or linear maps of the model, whose weights are meant, packed or not; the scores have the shape
    of the parameter, or of `core.storage.plain_weight`. Every batch is taken row by row. Gradients and modes are put
    back afterwards.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with _gradients_of(scored) as leaves:
        totals = [torch.zeros(leaf.shape, dtype=torch.float32, device=leaf.device) for leaf in leaves]
        count = 0
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for leaf in leaves:
                leaf.requires_grad_(True)
            with in_eval_mode(model), torch.enable_grad():
                for batch in samples.batches:
                    for row in _rows(batch):
                        loss = _own_loss(model, row) if kind == "fisher" else samples.loss(model, row)
                        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                        for total, each, gradient in zip(totals, scored, gradients, strict=True):
                            if gradient is not None:
                                total += _score(kind, each, gradient.float())
                        count += 1
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
    return [total / max(count, 1) for total in totals]


@contextmanager
def _gradients_of(scored: Sequence[nn.Parameter | nn.Module]) -> Iterator[list[Tensor]]:
    """Tensors whose gradients are those of what is `scored`: parameters themselves, and for packed maps zeros beside.

    What is added to the output by x Z^T with Z = 0 is nothing, and its gradient is that of the weight.
    """
    leaves: list[Tensor] = []
    handles = []
    for each in scored:
        if isinstance(each, nn.Parameter):
            leaves.append(each)
        elif not is_packed(each):
            weight = each._parameters["weight"]
            assert weight is not None
            leaves.append(weight)
        else:
            zeros = torch.zeros(shape_of(each), device=next(each.buffers(), each.weight).device)  # type: ignore[arg-type]
            leaves.append(zeros)
            handles.append(each.register_forward_hook(_added(zeros, is_across(each))))
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _added(zeros: Tensor, across: bool) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        beside = zeros.to(x.dtype)
        return output + (x @ beside if across else F.linear(x, beside)).to(output.dtype)

    return hook


def _score(kind: str, scored: nn.Parameter | nn.Module, gradient: Tensor) -> Tensor:
    if kind == "gradient":
        return gradient.abs()
    if kind == "snip":
        weight = scored if isinstance(scored, nn.Parameter) else plain_weight(scored)
        return (weight.detach().float() * gradient).abs()
    return gradient.square()


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The batch as batches of one row; of one item with all its answers, where rows have several."""
    if isinstance(groups := batch.get("group"), Tensor):
        return [_item(batch, groups, number) for number in sorted(set(groups.tolist()))]
    count = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim())
    return [
        {
            name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
            for name, value in batch.items()
        }
        for row in range(count)
    ]


def _item(batch: Mapping[str, Any], groups: Tensor, number: int) -> dict[str, Any]:
    """The sequences of one item: `group` says of each to which it belongs, `target` and `row` are by item."""
    own = (groups == number).nonzero()[:, 0]
    found = {
        name: value.index_select(0, own) if isinstance(value, Tensor) and len(value) == len(groups) else value
        for name, value in batch.items()
        if name not in ("target", "row")
    }
    found |= {name: batch[name][number : number + 1] for name in ("target", "row") if name in batch}
    return found | {"group": torch.zeros_like(own)}


def _own_loss(model: nn.Module, row: Mapping[str, Any]) -> Tensor:
    """Minus the mean log-probability of labels drawn from the model's own distribution.

    Where the row has labels, only where they stand (a causal model's logits speak of the next token).
    """
    labels = row.get("labels")
    outputs = model(**{name: value for name, value in row.items() if name not in _NO_INPUTS})
    if not isinstance(getattr(outputs, "logits", None), Tensor):
        raise MethodError(
            Finding("T166", f"{type(model).__name__} gives no logits to draw labels from", fix="score=empirical-fisher")
        )
    logits: Tensor = outputs.logits.float()
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind == "multi_label_classification" and isinstance(labels, Tensor) and labels.shape == logits.shape:
        # Several labels a row are drawn one by one, as their losses are.
        return F.binary_cross_entropy_with_logits(logits, logits.detach().sigmoid().bernoulli())
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1] and labels.dim() > 1:
        causal = head_kind(type(model).__name__) == "causal"
        logits = logits[:, :-1][labels[:, 1:] != -100] if causal else logits[labels != -100]
    else:
        logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[-1] == 1 or kind == "regression":  # numbers, or a reward: drawn from a normal distribution
        return (logits * torch.randn_like(logits)).mean()
    drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1)[:, 0]
    return F.cross_entropy(logits, drawn)


def best(scores: Iterable[Tensor], count: int) -> list[Tensor]:
    """The flat indices of the `count` highest entries over all `scores`, by tensor, each in rising order.

    Never more than one tensor's candidates and the winners so far are held together.
    """
    values = torch.empty(0)
    places = torch.empty(0, 2, dtype=torch.long)
    tensors = 0
    for number, score in enumerate(scores):
        tensors = number + 1
        flat = score.detach().flatten()
        top, index = flat.topk(min(count, flat.numel()))
        values = torch.cat([values, top.float().cpu()])
        places = torch.cat([places, torch.stack([torch.full_like(index, number), index], dim=1).cpu()])
        if len(values) > count:
            values, order = values.topk(count)
            places = places[order]
    return [places[places[:, 0] == number, 1].sort().values for number in range(tensors)]
