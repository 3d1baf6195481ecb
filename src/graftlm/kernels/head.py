r"""The loss head: log-likelihoods of labelled tokens without the [tokens, vocabulary] matrix of logits.

    loss_t = logsumexp(f(W h_t + b)) - f(W h_t + b)[label_t],   f(z) = c tanh(s z / c), or s z where there is no cap c

Only positions with a label are looked at, some at a time; what is kept for the backward is one gradient of the states,
[tokens, width], computed beside the loss and scaled by what comes from above. Where the head itself is trained or
adapted, its chunks are computed again in the backward instead, through the module, so that its own gradient is what it
always was.
The idea is that of Wijmans et al. 2024 ("Cut Your Losses in Large-Vocabulary Language Models") and of Liger Kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graftlm.core import in_eval_mode, without_adapters
from graftlm.core.junction import junction_of
from graftlm.kernels.native import loops_for

__all__ = ["IGNORED", "LossHead", "with_states"]

#: The label of a position that costs nothing.
IGNORED = -100
#: A chunk's logits take so much memory; below so many rows products become slow.
_CHUNK_BYTES, _LEAST_ROWS = 32 * 2**20, 32


@dataclass(frozen=True)
class LossHead:
    """How a causal model makes logits of its last hidden states: f(z) as above, over its output embeddings.

    Example:
        >>> head = LossHead.of(model)                                          # doctest: +SKIP
        >>> losses = head.losses(model, {"input_ids": ids}, labels)            # doctest: +SKIP
        >>> log_likelihood_by_row = -losses.sum(1)                             # doctest: +SKIP
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> LossHead | None:
        """The head of `model`; None where its logits are not such a function of its last hidden states.

        A forward over three tokens is compared with what this head makes of the same states.
        """
        config: Any = getattr(model, "config", None)
        head, backbone = _head(model), getattr(model, "base_model", None)
        if config is None or head is None or backbone is None or backbone is model:
            return None
        if getattr(config, "is_encoder_decoder", False) or not isinstance(getattr(head, "weight", None), Tensor):
            return None
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        found = cls(float(scale), getattr(config, "final_logit_softcapping", None))
        device = head.weight.device
        if device.type == "meta":
            return found  # for planning: there are no numbers to compare
        ids = torch.arange(3, 6, device=device)[None] % int(head.weight.shape[0])
        with in_eval_mode(model), without_adapters(model), torch.no_grad():
            states, outputs = with_states(model, {"input_ids": ids, "use_cache": False})
            if states is None or not isinstance(getattr(outputs, "logits", None), Tensor):
                return None
            if states.shape[-1] != head.weight.shape[-1]:  # something comes before the head (a masked model's)
                return None
            own = found.shaped(head(states))
        alike = own.shape == outputs.logits.shape and torch.allclose(own, outputs.logits, rtol=1e-2, atol=1e-3)
        return found if alike else None

    def shaped(self, logits: Tensor) -> Tensor:
        """f of the bare logits."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def losses(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """The negative log-likelihood of each label [rows, tokens] given the tokens before it, in nats, float32.

        Zero where there is no label (-100), and for the first token of a row, which has none before it. `inputs` are
        what the model is called with, ids [rows, tokens] among them; its own logits are asked for at no position.
        """
        return self.losses_and_states(model, inputs, labels)[0]

    def losses_and_states(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the last hidden states that they come from, [rows, tokens, width]."""
        states, _ = with_states(model, {**inputs, "logits_to_keep": _no_positions(model)} if _keeps(model) else inputs)
        assert states is not None
        wanted = labels[:, 1:] != IGNORED
        found = torch.zeros(labels.shape, dtype=torch.float32, device=states.device)
        target = labels[:, 1:][wanted]
        if not len(target):
            return found + 0 * states.sum().float(), states  # nothing to learn, but a gradient to ask for
        losses = self._of_states(model, states[:, :-1], wanted, target)
        return F.pad(losses.new_zeros(wanted.shape).index_put((wanted,), losses), (1, 0)), states

    def _of_states(self, model: nn.Module, states: Tensor, wanted: Tensor, target: Tensor) -> Tensor:
        head = _head(model)
        assert head is not None
        junction = junction_of(head)
        if junction is not None and junction.switch.current().rows is not None and junction.plan():
            # Each row has its own head: rows must stay rows.
            return F.cross_entropy(self.shaped(head(states))[wanted].float(), target, reduction="none")
        chosen = states[wanted]
        if _is_plain(head, chosen):
            losses: Tensor = _TokenLosses.apply(chosen, head.weight, head.bias, target, self.scale, self.cap)  # type: ignore[no-untyped-call]
            return losses

        def part(states: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.shaped(head(states)).float(), target, reduction="none")

        rows = _rows_of(head.weight)
        parts = [
            checkpoint(part, own, to, use_reentrant=False) if torch.is_grad_enabled() else part(own, to)
            for own, to in zip(torch.split(chosen, rows), torch.split(target, rows), strict=True)
        ]
        return torch.cat(parts)


def _no_positions(model: nn.Module) -> Tensor:
    # One position would cost more than it seems: a product of [rows, 1, width] copies the head's weight for each row.
    device: torch.device = next(model.parameters()).device
    return torch.empty(0, dtype=torch.long, device=device)


def _head(model: Any) -> Any:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _keeps(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def with_states(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
    """The last hidden states of a call of the model, [rows, tokens, width], as its backbone gives them; its outputs."""
    caught: list[Any] = []
    # Some heads read their decoder, past the backbone around it. Registered last, a hook sees what adapters leave.
    inner: set[Any] = {model.base_model, model.get_decoder() if hasattr(model, "get_decoder") else model.base_model}
    handles = [
        each.register_forward_hook(lambda _module, _args, output: caught.append(output)) for each in inner - {model}
    ]
    try:
        outputs = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not caught:
        return None, outputs
    states = getattr(caught[-1], "last_hidden_state", None)
    return (states if states is not None else caught[-1][0]), outputs


def _is_plain(head: nn.Module, states: Tensor) -> bool:
    """Whether the head is a bare frozen linear map under the routing in force, so that its call may be left out."""
    junction = junction_of(head)
    own = 0 if junction is None else 1
    weight, bias = head._parameters.get("weight"), head._parameters.get("bias")
    return (
        type(head) is nn.Linear
        and weight is not None
        and weight.dtype == states.dtype
        and not (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        and (junction is None or not junction.plan())
        and len(head._forward_hooks) == len(head._forward_pre_hooks) == own
        and not head._backward_hooks
        and (states.is_meta or not torch.is_autocast_enabled(states.device.type))
    )


def _rows_of(head: Tensor) -> int:
    """How many rows a chunk has at a head's weight [vocabulary, width]."""
    return max(_LEAST_ROWS, _CHUNK_BYTES // (head.element_size() * int(head.shape[0])))


def _losses_of(bare: Tensor, target: Tensor, scale: float, cap: float | None, needed: bool) -> Tensor:
    """The losses [N] of bare logits [N, vocabulary] and labels [N, 1]; the logits become their gradient if `needed`."""
    loops = loops_for(bare) if cap is None and scale > 0 else None
    if loops is not None:
        losses = torch.empty(len(bare), dtype=torch.float32)
        loops.losses(bare, target, losses, len(bare), bare.shape[1], float(scale), int(needed))
        return losses
    shaped = bare * scale if scale != 1 else bare
    if cap is not None:
        shaped = cap * torch.tanh(shaped / cap)
    at_label = shaped.gather(1, target).float()
    chances = torch.softmax(shaped, dim=1, dtype=torch.float32)
    # The largest chance is 1 / sum(exp(z - max)), at least one in the vocabulary: its logarithm is safe.
    highest = shaped.amax(1, keepdim=True).float()
    losses = (highest - chances.amax(1, keepdim=True).log() - at_label).squeeze(1)
    if needed:
        chances.scatter_add_(1, target, chances.new_full(target.shape, -1.0))
        if cap is not None:
            chances *= 1 - (shaped.float() / cap).square()
        if scale != 1:
            chances *= scale
        bare.copy_(chances)
    return losses


class _TokenLosses(torch.autograd.Function):
    """The losses [N] of states [N, width] at a frozen head, with the gradient of the states beside them."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        needed = ctx.needs_input_grad[0]
        rows, losses = _rows_of(weight), []
        gradient = torch.empty_like(states) if needed else None
        place = states.new_empty(min(rows, len(states)), weight.shape[0])  # of all chunks' logits
        for start in range(0, len(states), rows):
            # The product of many rows at once, its float32 of few: the one wants to be large, the other is memory.
            bare = place[: len(states) - start]
            torch.mm(states[start : start + rows], weight.T, out=bare)
            if bias is not None:
                bare += bias
            for own, to in zip(
                torch.split(bare, _LEAST_ROWS),
                torch.split(target[start : start + rows, None], _LEAST_ROWS),
                strict=True,
            ):
                losses.append(_losses_of(own, to, scale, cap, needed))
            if gradient is not None:
                torch.mm(bare, weight, out=gradient[start : start + rows])
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * above[:, None].to(gradient.dtype), None, None, None, None, None
