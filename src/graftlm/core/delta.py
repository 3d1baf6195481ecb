"""Deltas: the change to one site, through one of five ports.

| port | what a delta sees |
|---|---|
| linear | input and output of a linear-like module (also norms, embeddings), or of a part of a fused one |
| branch | input and output of a sublayer, before its residual add |
| kv | keys and values of an attention call |
| embed | the sequence of input embeddings |
| param | one existing parameter |
| none | nothing: it reads the states at its site when its objective asks it |

A delta holds only its own parameters (float32 whatever the base's type), never a base weight's storage, and starts as
the identity unless its paper says otherwise. Precision rule: small tensors are cast down to the activations' type,
activations are never cast up. `fold` says what the merged weight and bias are, in float32.
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graftlm.errors import Finding, NotMergeable

__all__ = [
    "Base", "BottleneckMaps", "BranchDelta", "Delta", "EmbedDelta", "KeyValueDelta", "LinearDelta", "LowRank",
    "ParameterDelta", "Port", "ReadingDelta", "WholeParameterDelta",
]  # fmt: skip

Port = Literal["linear", "param", "branch", "kv", "embed", "none"]


@dataclass(frozen=True)
class Base:
    """The base module behind a linear site, as a delta that needs more than its input may ask it.

    `output` is the module's own output for these rows, bias included and before any delta. `mask` says which tokens are
    real: [rows, tokens], or None where all are.
    """

    output: Tensor
    map: Callable[[Tensor], Tensor]  # the bare map, W z for z of shape [..., in], whatever W is stored as; no bias
    weight: Callable[[], Tensor]  # W as a tensor [out, in] ([tokens, width] for embeddings); dequantised at each call
    stored: nn.Parameter | None  # what W is stored as, by which it can be told whether it has changed
    bias: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class LowRank:
    """The change s B A drop(x) + s c at a linear map, for operations that make it together with the base's product.

    With `gain`, n, the map gives n (W x + s B A x) + b.
    """

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]
    scale: float = 1.0
    dropout: float = 0.0  # the share that is dropped now: 0 in evaluation
    bias: Tensor | None = None  # c [out]
    gain: Tensor | None = None  # n [out]


@dataclass(frozen=True)
class BottleneckMaps:
    """The change s (W_up act(W_down x + b_1) + b_2) at a sublayer, for operations that make several of them at once."""

    down: Tensor  # W_down [width, in]
    down_bias: Tensor  # b_1 [width]
    up: Tensor  # W_up [out, width]
    up_bias: Tensor  # b_2 [out]
    activation: Callable[[Tensor], Tensor]
    scale: float = 1.0


class Delta(nn.Module):
    """A change to one site, seen as its call; starts as the identity; holds only its own parameters."""

    port: ClassVar[Port]
    #: True where tensors take their sizes from data or training, so that only a stored state tells them (see `adopt`).
    sizes_from_state: ClassVar[bool] = False

    def adopt(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take tensors of `shapes` (by name) before a stored state is copied in; most deltas know theirs already."""

    def wake(self) -> None:
        """Start away from the identity, so that a gate of zero around this delta gets a gradient.

        Raises NotImplementedError where the delta has no such start.
        """
        raise NotImplementedError


class LinearDelta(Delta):
    """A delta at a linear-like module: y = after(W before(x) + b + sum of add(before(x))).

    With several deltas at one site the `before`s run in order, every `add` reads the same input, the sums are added to
    the base's output, and the `after`s run in order; so a composition does not depend on who was attached first
    unless two deltas scale the same side, which commutes. At a part of a fused map (`Site.columns`) the output is
    that part's; there is no `before` there, since the parts share their input.
    """

    port: ClassVar[Port] = "linear"

    def before(self, x: Tensor) -> Tensor:
        """The input that the site reads instead of `x`, of the same shape [rows, ..., in]."""
        return x

    def add(self, x: Tensor) -> Tensor | None:
        """What is added to the site's output, [rows, ..., out], for its input `x`; None for nothing."""
        return None

    def add_over(self, x: Tensor, base: Base) -> Tensor | None:
        """As `add`, for deltas that must know what the base computes (DoRA's norm, trained rows of an embedding)."""
        return None

    def low_rank(self) -> LowRank | None:
        """What `add` adds as a low-rank product, where it is one; None where it is not."""
        return None

    def low_rank_over(self, weight: Tensor, stored: nn.Parameter) -> LowRank | None:
        """What `add_over` adds, as a low-rank product with a gain; None where it is not, or not now.

        `weight` [out, in] is a plain tensor, `stored` the parameter that it comes from.
        """
        return None

    def after(self, y: Tensor) -> Tensor:
        """The output in place of `y`, of the same shape."""
        return y

    def as_shift(self) -> Tensor | None:
        """What `add` adds whatever its input is, [out], where that is all it does; None where it is not."""
        return None

    def as_scaling(self) -> Tensor | None:
        """What `before` or `after` multiplies by, [width], where that is all it does; None where it is not."""
        return None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged (weight, bias) in float32; `weight` is [out, in] for maps, [tokens, width] for embeddings.

        Raises NotMergeable where there is none.
        """
        raise NotMergeable(Finding("R201", f"{type(self).__name__} cannot be folded into a weight"))


class ParameterDelta(Delta):
    """A delta that stands for one parameter of a module. Several at one parameter add up their changes.

    Where it stands for the weight of a linear map or an embedding it may have an `add` too, the same change beside the
    map: what a changed weight adds to the output. `adds` says when that is the cheaper way. Where the weight is packed,
    all that stand for it act beside the map, those without an `add` by the difference of both weights.
    """

    port: ClassVar[Port] = "param"

    @property
    def has_add(self) -> bool:
        """Whether there is an `add`."""
        return type(self).add is not ParameterDelta.add

    def adds(self, x: Tensor, rows: bool) -> bool:
        """Whether `add` is to be called for the input `x` instead of `parameter`; `rows`: for some rows of a batch."""
        return False

    def add(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """What the changed weight adds to the output of its map, [..., out], for the input `x` [..., in].

        For embeddings `x` are token ids [...]. `weight()` is the base's own, as the module stores it.
        """
        raise NotImplementedError

    def as_entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Outputs, inputs and values of the changed entries, each [entries], where these are few; else None.

        For a token at a time and a linear map: value times input is added at the output.
        """
        return None

    def kept(self) -> Tensor | None:
        """True for the entries that this delta lets stand, where others are zero; None where it makes no zeros."""
        return None

    def parameter(self, base: Tensor) -> Tensor:
        """The parameter that the module computes with, in the type of `base`; differentiable in the delta's own."""
        raise NotImplementedError


class WholeParameterDelta(ParameterDelta):
    """A parameter delta that holds the adapted value in full.

    `value` starts as a float32 copy of the base's parameter, so casting it back gives the base exactly.
    """

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        # On the current default device: that of the module, or meta where only shapes are wanted.
        self.value = nn.Parameter(torch.empty(base.shape, dtype=torch.float32).copy_(base.detach()))

    def parameter(self, base: Tensor) -> Tensor:
        """The adapted value."""
        return self.value.to(base.dtype)


class BranchDelta(Delta):
    """A delta at a sublayer: it sees an input of the sublayer and what would be added to the residual stream.

    At a site of kind `stream` (after the residual add) `y` is the stream itself, and `x` the stream as the model's own
    norm behind the add gives it, or again the stream where the model normalises before its sublayers.
    """

    port: ClassVar[Port] = "branch"
    #: Whether `branch` reads `x`; where none does, `x` is not kept, and `y` is given twice.
    reads_input: ClassVar[bool] = False
    #: Whether `branch` reads `mask`; where it does not, None is given.
    reads_mask: ClassVar[bool] = True

    def branch(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """What is added instead of `y`, for the input `x`; all [rows, tokens, width], or [tokens, width].

        `mask` says which tokens are real: [rows, tokens], or None where all are.
        """
        return y

    def as_bottleneck(self) -> BottleneckMaps | None:
        """What `branch` adds to `y`, where that is a bottleneck of `x` (of `y` unless `reads_input`); else None."""
        return None


class KeyValueDelta(Delta):
    """A delta at an attention call: keys and values that stand before those of the tokens, seen by every token."""

    port: ClassVar[Port] = "kv"
    #: How many virtual tokens there are.
    length: int
    #: True where the tokens' positions start behind the virtual ones (PEFT's prefixes).
    shifts_positions: bool = False
    #: Whether keys and values depend on the input; where they do not, a generation computes them once.
    reads_input: ClassVar[bool] = True

    def keys_values(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values, each [key-value heads, length, head width], or [rows, ...] where they depend on the row.

        `x` is the attention's input [rows, tokens, width]; `mask` says which of its tokens are real (None: all).
        """
        raise NotImplementedError

    @property
    def has_bias(self) -> bool:
        """Whether `bias` gives something; else the base adds nothing to the scores over the virtual tokens."""
        return False

    def bias(self, place: int, count: int) -> Tensor:
        """What the base adds to the scores of `count` queries over the virtual tokens, [heads, count, length].

        For bases whose attention adds a bias by relative positions, where the virtual tokens have positions. `place` is
        the first query's, counted from the row's first real token.
        """
        raise NotImplementedError


class EmbedDelta(Delta):
    """A delta on the sequence of input embeddings: virtual tokens that stand next to the row's own."""

    port: ClassVar[Port] = "embed"
    #: How many virtual tokens there are.
    length: int
    #: Where they stand: `start` (before the row's first token), `after-bos`, `end` (behind its last token, before an
    #: end-of-sequence token in encoders), or `slots` (in place of the tokens `slot_token`, wherever these are).
    position: str = "start"
    slot_token: int = -1

    def tokens(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        """The virtual tokens, [length, width], or [rows, length, width] where they depend on the row.

        `embeddings` are the row's own tokens, [rows, tokens, width]; `mask` says which are real (None: all).
        """
        raise NotImplementedError


class ReadingDelta(Delta):
    """A delta that changes nothing: no forward calls it, whatever the routing, and a merge leaves it out.

    It is trained, saved and loaded with its adapter; the objective that it belongs to calls it (a value head).
    """

    port: ClassVar[Port] = "none"


def acts(delta: Delta, step: str) -> bool:
    """True where `delta` defines `step` (`before`, `add`, `add_over`, `after`) itself.

    A wrapper says it by a method `acts(step)` of its own.
    """
    own = getattr(delta, "acts", None)
    if own is not None:
        return bool(own(step))
    return getattr(type(delta), step, None) is not getattr(LinearDelta, step)


def folds(delta: Delta) -> bool:
    """Whether there is a merged form: for a parameter always, for a linear map where the delta says how.

    A delta for which it depends says so by an attribute `folds` of its own.
    """
    own = getattr(delta, "folds", None)
    if isinstance(delta, (ParameterDelta, ReadingDelta)):
        return own is not False
    return bool(own) if own is not None else isinstance(delta, LinearDelta) and type(delta).fold is not LinearDelta.fold
