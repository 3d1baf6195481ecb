r"""A frozen feed-forward part with low-rank changes as one operation, and its plain form.

    y = D(l act(G x) * U x), or D(l act(U x)) where there is no gate; l a trained scaling, where there is one

G, U and D are linear maps, each with its low-rank change, gain and bias (`kernels.linear`). Kept for the backward are x
and the outputs of G and U, and that of D without its bias where it has a gain; the activation, the product and what D
reads are made again. With `recompute`, G and U are made again too: a third of the forward more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graftlm.core import LowRank
from graftlm.core.storage import Packed
from graftlm.kernels.linear import (
    add_dropped,
    add_low_rank,
    back_low_rank,
    dropped,
    new_seed,
    plain_low_rank_linear,
    summed,
    times,
    times_back,
)
from graftlm.kernels.native import loops_for

__all__ = ["Map", "feed_forward", "plain_feed_forward"]

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Map:
    """A linear map with a frozen weight [out, in], packed or not, its bias [out], and the change that acts on it.

    `scaling` [in] is what its input is multiplied by; where it is a feed-forward part's last map.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    change: LowRank | None = None
    scaling: Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether something of it takes a gradient."""
        tensors = [self.bias, self.scaling]
        if self.change is not None:
            tensors += [self.change.down, self.change.up, self.change.gain]
        return any(each is not None and each.requires_grad for each in tensors)


def plain_feed_forward(x: Tensor, inner: Sequence[Map], down: Map, activation: Activation) -> Tensor:
    """The same as `feed_forward` by PyTorch's own operations, one after the other."""

    def through(x: Tensor, part: Map) -> Tensor:
        assert isinstance(part.weight, Tensor)
        if part.change is None:
            return F.linear(x, part.weight, part.bias)
        return plain_low_rank_linear(x, part.weight, part.bias, part.change)

    product = activation(through(x, inner[0]))
    for other in inner[1:]:
        product = product * through(x, other)
    if down.scaling is not None:
        product = product * down.scaling.to(product.dtype)
    return through(product, down)


def feed_forward(
    x: Tensor, inner: Sequence[Map], down: Map, activation: Activation, *, recompute: bool = False
) -> Tensor:
    """y [..., out] for x [..., in]; `inner` is (gate, up), or (up,). Changes have no bias.

    Gains of `inner` are not next to zero: what they multiplied is had from the product.
    """
    maps = (*inner, down)
    terms = tuple(_Term.of(each) for each in maps)
    tensors: list[Tensor | None] = []
    for each in maps:
        change = each.change
        plain = each.weight if isinstance(each.weight, Tensor) else None
        tensors += [plain, each.bias, *((change.down, change.up, change.gain) if change else (None,) * 3)]
    y: Tensor = _FeedForward.apply(x, activation, recompute, terms, down.scaling, *tensors)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True)
class _Term:
    """What is not a tensor of a map: a packed weight; of its change scale, share of the input that is dropped, seed."""

    packed: Packed | None = None
    scale: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, part: Map) -> _Term:
        packed, change = None if isinstance(part.weight, Tensor) else part.weight, part.change
        if change is None:
            return cls(packed)
        return cls(packed, change.scale, change.dropout, new_seed() if change.dropout else 0)

    def of_weight(self, weight: Any) -> Tensor | Packed:
        """The weight, whichever it is."""
        found: Tensor | Packed = weight if self.packed is None else self.packed
        return found

    def read(self, x: Tensor) -> Tensor:
        """What the change reads of x."""
        return dropped(x, self.dropout, self.seed) if self.dropout else x

    def add_back(self, grad: Tensor, back: Tensor, down: Tensor) -> None:
        """Add the gradient of x through the change, s (g B) A where it was not dropped, in place."""
        down = down.to(back.dtype)
        if self.dropout:
            add_dropped(grad, back @ down, self.dropout, self.seed)
        else:
            grad.addmm_(back, down)


#: How many arguments come before the tensors of the maps, and how many tensors a map has.
_BEFORE, _EACH = 5, 5
#: A map's weight, bias, A, B and gain, each None where there is none.
_Tensors = tuple[Any, Any, Any, Any, Any]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, recompute: bool, terms: tuple[_Term, ...],
        scaling: Tensor | None, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        maps = _by_map(tensors)
        wide, narrows = _inner(flat, maps[:-1], terms)
        product = _product(activation, wide)
        if scaling is not None:
            product = product.mul_(scaling.to(product.dtype)) if product is not wide[0] else product * scaling
        weight, bias, down, up, gain = maps[-1]
        y = times(product, terms[-1].of_weight(weight), bias if gain is None else None)
        narrow = None if down is None else add_low_rank(y, terms[-1].read(product), down, up, terms[-1].scale)
        del product
        before = None  # what the last map's gain multiplies
        needs = ctx.needs_input_grad
        if gain is not None:
            before = y if needs[_BEFORE + len(tensors) - 1] else None
            y = _gained(y if before is None else y.clone(), gain, bias)
        # Of x only the gradients of the A inside, and what is made again, have need.
        reads_x = recompute or any(needs[_BEFORE + _EACH * at + 2] for at in range(len(maps) - 1))
        ctx.save_for_backward(
            flat if reads_x else None, *([None] * len(wide) if recompute else wide), *narrows, narrow, before, scaling,
            *tensors,
        )  # fmt: skip
        ctx.activation, ctx.terms, ctx.shape = activation, terms, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        count = len(ctx.terms)  # of maps
        saved = ctx.saved_tensors
        x, wide, narrows = saved[0], list(saved[1:count]), list(saved[count : 2 * count])
        before, scaling = saved[2 * count : 2 * count + 2]
        maps, terms, needs = _by_map(saved[2 * count + 2 :]), ctx.terms, ctx.needs_input_grad
        del saved
        above = above.reshape(-1, above.shape[-1])
        if wide[0] is None:
            wide = _inner(x, maps[:-1], terms, changed=narrows)[0]
        grads: list[Tensor | None] = [None] * (_EACH * count)

        def through(at: int, above: Tensor, z: Callable[[], Tensor]) -> Tensor:
            """The gradient of W x + s B A x for that of the map's output; those of bias and gain are noted."""
            _, bias, _, _, gain = maps[at]
            if needs[_BEFORE + _EACH * at + 1]:
                grads[_EACH * at + 1] = summed(above, bias.dtype)
            if gain is None:
                return above
            if needs[_BEFORE + _EACH * at + 4]:
                grads[_EACH * at + 4] = summed(above * z(), gain.dtype)
            back: Tensor = above * gain.to(above.dtype)
            return back

        loops, kind = _native(ctx.activation, wide[0])
        other = wide[1] if count == 3 else None
        acted: Any = None
        first: Any = None
        product: Any = None
        if loops is None:
            with torch.enable_grad():
                first = wide[0].detach().requires_grad_()
                acted = ctx.activation(first)
        weight, _, down, up, _ = maps[-1]
        above = through(count - 1, above, lambda: before)
        grad_product = times_back(above, terms[-1].of_weight(weight))
        grad_scaling = None
        if down is not None or needs[4]:
            if acted is None:
                product = _product(ctx.activation, wide)
            else:
                product = acted.detach() if other is None else acted.detach() * other
        if down is not None:
            read = terms[-1].read(product if scaling is None else product * scaling.to(product.dtype))
            at = _EACH * (count - 1)
            needed = (needs[_BEFORE + at + 2], needs[_BEFORE + at + 3])
            back, grads[at + 2], grads[at + 3] = back_low_rank(
                above, narrows[-1], read, down, up, terms[-1].scale, needed
            )
            del read
            terms[-1].add_back(grad_product, back, down)
        if needs[4]:
            mine = other is not None or acted is None  # else it is the activation's output
            grad_scaling = summed(product.mul_(grad_product) if mine else product * grad_product, scaling.dtype)
        if scaling is not None:
            grad_product *= scaling.to(grad_product.dtype)
        product = None
        grad_wide: list[Tensor] = []
        if loops is not None:
            grad_other = None if other is None else torch.empty_like(other)
            loops.gated_back(grad_product, wide[0], other, grad_other, grad_product.numel(), kind)
            grad_wide += [grad_product] if grad_other is None else [grad_product, grad_other]
        elif other is None:
            grad_wide += torch.autograd.grad(acted, first, grad_product)
        else:
            grad_other = grad_product * acted.detach()
            grad_wide += torch.autograd.grad(acted, first, grad_product.mul_(other))
            grad_wide.append(grad_other)
        del acted, first, other, grad_product

        grad_x: Tensor | None = None
        for at, each in enumerate(grad_wide):
            weight, bias, down, up, gain = maps[at]
            each = through(at, each, partial(_ungained, wide[at], gain, bias))
            if needs[0]:
                grad_x = times_back(each, terms[at].of_weight(weight), grad_x)
            if down is not None:
                needed = (needs[_BEFORE + _EACH * at + 2], needs[_BEFORE + _EACH * at + 3])
                back, grads[_EACH * at + 2], grads[_EACH * at + 3] = back_low_rank(
                    each, narrows[at], terms[at].read(x) if needed[0] else x, down, up, terms[at].scale, needed
                )
                if grad_x is not None:
                    terms[at].add_back(grad_x, back, down)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, grad_scaling, *grads


#: Non-linearities that the loops know, by their numbers there.
_SILU, _GELU_TANH = 0, 1


def _kind_of(activation: Activation) -> int | None:
    """The number of a non-linearity; a module's `forward` is known by its class."""
    owner, name = getattr(activation, "__self__", None), getattr(activation, "__name__", "")
    if activation is F.silu or (name == "forward" and type(owner).__name__ in ("SiLU", "SiLUActivation")):
        return _SILU
    tanh = name == "forward" and type(owner).__name__ in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh")
    tanh = tanh or (type(owner) is torch.nn.GELU and owner.approximate == "tanh")
    return _GELU_TANH if tanh else None


def _native(activation: Activation, like: Tensor) -> tuple[Any, int]:
    """The loops that make the activation of tensors like this one, with its number; (None, 0) where there are none."""
    kind = _kind_of(activation)
    loops = None if kind is None else loops_for(like)
    return loops, kind or 0


def _product(activation: Activation, wide: Sequence[Tensor]) -> Tensor:
    """act(gate) * up, or act(up), as a tensor of its own where there is a gate."""
    loops, kind = _native(activation, wide[0])
    if loops is not None:
        product = torch.empty_like(wide[0])
        loops.gated(wide[0], wide[1] if len(wide) > 1 else None, product, product.numel(), kind)
        return product
    product = activation(wide[0])
    for other in wide[1:]:
        product = product.mul_(other) if product is not wide[0] else product * other
    return product


def _by_map(tensors: Sequence[Any]) -> list[_Tensors]:
    return [tuple(tensors[at : at + _EACH]) for at in range(0, len(tensors), _EACH)]


def _gained(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """n z + b, in place."""
    z *= gain.to(z.dtype)
    return z if bias is None else z.add_(bias)


def _ungained(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """z for y = n z + b."""
    return (y if bias is None else y - bias) / gain.to(y.dtype)


def _inner(
    x: Tensor, maps: Sequence[_Tensors], terms: Sequence[_Term], changed: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs of the maps that read x, and their narrow products, which `changed` has already."""
    wide: list[Tensor] = []
    narrows: list[Tensor | None] = []
    for at, ((weight, bias, down, up, gain), term) in enumerate(zip(maps, terms, strict=False)):
        narrow = None if changed is None else changed[at]
        y = times(x, term.of_weight(weight), bias if gain is None else None)
        if narrow is not None:
            y.addmm_(narrow, up.to(x.dtype).T, alpha=term.scale)
        elif down is not None:
            narrow = add_low_rank(y, term.read(x), down, up, term.scale)
        wide.append(y if gain is None else _gained(y, gain, bias))
        narrows.append(narrow)
    return wide, narrows
