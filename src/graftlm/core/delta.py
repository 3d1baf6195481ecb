"""Deltas: the change to one site, through one of five ports.

| port | what a delta sees | status |
|---|---|---|
| linear | input and output of any linear-like module (also embeddings, whose input is a one-hot row) | here |
| param | one existing parameter | here |
| branch | input and output of a sublayer, before its residual add | protocol; `attach` refuses it so far |
| kv | keys and values of an attention call | protocol; `attach` refuses it so far |
| embed | the sequence of input embeddings | protocol; `attach` refuses it so far |

A delta holds only its own parameters (float32 whatever the base's type), never a base weight's storage, and starts as
the identity unless its paper says otherwise. Precision rule: small tensors are cast down to the activations' type,
activations are never cast up. `fold` says what the merged weight and bias are, in float32.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graftlm.errors import Finding, NotMergeable

__all__ = ["BranchDelta", "Delta", "EmbedDelta", "KeyValueDelta", "LinearDelta", "ParameterDelta", "Port"]

Port = Literal["linear", "param", "branch", "kv", "embed"]


class Delta(nn.Module):
    """A change to one site, seen as its call; starts as the identity; holds only its own parameters."""

    port: ClassVar[Port]


class LinearDelta(Delta):
    """A delta at a linear-like module: y = after(W before(x) + b + sum of add(before(x))).

    With several deltas at one site the `before`s run in order, every `add` reads the same input, the sums are added to
    the base's output, and the `after`s run in order; so a composition does not depend on who was attached first
    unless two deltas scale the same side, which commutes.
    """

    port: ClassVar[Port] = "linear"

    def before(self, x: Tensor) -> Tensor:
        """The input that the site reads instead of `x`, of the same shape [rows, ..., in]."""
        return x

    def add(self, x: Tensor) -> Tensor | None:
        """What is added to the site's output, [rows, ..., out], for its input `x`; None for nothing."""
        return None

    def after(self, y: Tensor) -> Tensor:
        """The output in place of `y`, of the same shape."""
        return y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged (weight, bias) in float32; `weight` is [out, in] for maps, [tokens, width] for embeddings.

        Raises NotMergeable where there is none.
        """
        raise NotMergeable(Finding("R201", f"{type(self).__name__} cannot be folded into a weight"))


class ParameterDelta(Delta):
    """A delta that stands for one parameter of a module: it holds the adapted value in full.

    `value` starts as a float32 copy of the base's parameter, so casting it back gives the base exactly.
    """

    port: ClassVar[Port] = "param"

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        # On the current default device: that of the module, or meta where only shapes are wanted.
        self.value = nn.Parameter(torch.empty(base.shape, dtype=torch.float32).copy_(base.detach()))

    def parameter(self, base: Tensor) -> Tensor:
        """The parameter that the module computes with, in the type of `base` and with its shape."""
        return self.value.to(base.dtype)


class BranchDelta(Delta):
    """A delta at a sublayer: it sees the sublayer's input and what the sublayer would add to the residual stream."""

    port: ClassVar[Port] = "branch"

    def branch(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added instead of `y`, for the sublayer's input `x`; all are [rows, tokens, width]."""
        return y


class KeyValueDelta(Delta):
    """A delta at an attention call: keys and values that stand before those of the tokens."""

    port: ClassVar[Port] = "kv"

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each [key-value heads, length, head width]."""
        raise NotImplementedError


class EmbedDelta(Delta):
    """A delta on the sequence of input embeddings: virtual tokens that stand next to the row's own."""

    port: ClassVar[Port] = "embed"

    def tokens(self) -> Tensor:
        """The virtual tokens, [length, width]."""
        raise NotImplementedError


def acts(delta: Delta, step: str) -> bool:
    """True where `delta` defines `step` (`before`, `add`, `after`) itself."""
    return getattr(type(delta), step, None) is not getattr(LinearDelta, step)
