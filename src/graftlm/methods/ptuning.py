r"""P-tuning: virtual tokens anywhere in a template, computed by a small network while training (Liu et al. 2021).

    h_1 ... h_P = MLP(BiLSTM(E)),   E in R^{P x d} normal          ("GPT Understands, Too", section 2.3)

With `encoder=lstm` E runs through a bidirectional LSTM of two layers and width `hidden` a direction, and then through
Linear(2 hidden, d), ReLU, Linear(d, d). The authors' LAMA code has hidden = d / 2 (the default here, 0), their
SuperGLUE code hidden = d. With `encoder=mlp` (SuperGLUE code) it is Linear(d, hidden), ReLU, Linear(hidden, d) with
hidden = d. On saving the network is dropped, and a plain prompt is stored. PEFT's P-tuning is another network, but the
same once stored.

The paper puts virtual tokens in several places of a template (p, x, p, [MASK], p): write a marker token there as often
as the prompt is long, and give `position=slots,slot_token=ID`. Parameters while training 14 d^2 + 18 d + P d (LAMA),
stored P d.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import EmbedDelta, Method, Part, Site, Survey, one_of
from graftlm.methods.prompt import PromptDelta, PromptTuning, position_checks, sequences

__all__ = ["PTuning", "PTuningDelta"]


@dataclass(frozen=True)
class PTuning(Method):
    """Virtual tokens that a small network computes while training; stored as a plain prompt.

    `position` and `slot_token` are those of `prompt`, and so is `stack`.

    Example:
        >>> print(PTuning(length=6, position="slots", slot_token=3))
        ptuning(length=6,position=slots,slot_token=3)
    """

    name: ClassVar[str] = "ptuning"
    title: ClassVar[str] = "P-tuning"
    learning_rate: ClassVar[float] = 3e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)
    starts_as_identity: ClassVar[bool] = False

    length: int = 9
    encoder: str = "lstm"
    hidden: int = 0
    dropout: float = 0.0
    position: str = "start"
    slot_token: int = -1
    stack: str = "encoder"

    def __post_init__(self) -> None:
        self.require(
            (self.length >= 1, f"length {self.length} is not a whole number from 1", "length=9"),
            one_of("encoder", self.encoder, ("lstm", "mlp")),
            (self.hidden >= 0, f"hidden {self.hidden} is not a width, nor 0 for the authors' own", "hidden=0"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.1"),
            *position_checks(self.position, self.slot_token),
            one_of("stack", self.stack, ("encoder", "both")),
        )

    @property
    def context_taken(self) -> int:
        """Those of the virtual tokens, unless these stand in place of tokens."""
        return 0 if self.position == "slots" else self.length

    def sites(self, survey: Survey) -> Sequence[Site]:
        """The sequence of embeddings; of an encoder-decoder the encoder's, or both."""
        return sequences(survey, self.stack, self.name)

    def build(self, site: Site, module: nn.Module) -> PTuningDelta:  # noqa: ARG002
        """Fresh virtual tokens and their network for one sequence."""
        return PTuningDelta(site.in_features, self)

    @functools.cached_property
    def _plain(self) -> PromptTuning:
        return PromptTuning(length=self.length, position=self.position, slot_token=self.slot_token, stack=self.stack)

    def bake(self, part: Part) -> Part:
        """The prompt that the network computes."""
        assert isinstance(part.delta, PTuningDelta)
        training = part.delta.training
        with torch.no_grad():
            found = part.delta.eval().vectors().detach().clone()
        part.delta.train(training)
        return Part(self._plain, part.site, PromptDelta(found, self.position, self.slot_token))


class PTuningDelta(EmbedDelta):
    """Virtual tokens [length, width] out of a small network."""

    def __init__(self, width: int, method: PTuning) -> None:
        super().__init__()
        self.length, self.position, self.slot_token = method.length, method.position, method.slot_token
        self.embedding = nn.Parameter(torch.randn(method.length, width, dtype=torch.float32))
        self.lstm: nn.LSTM | None = None
        if method.encoder == "lstm":
            hidden = method.hidden or max(width // 2, 1)
            self.lstm = nn.LSTM(
                width, hidden, num_layers=2, bidirectional=True, dropout=method.dropout, batch_first=True,
                dtype=torch.float32,
            )  # fmt: skip
            wide, inner = 2 * hidden, width
        else:
            wide, inner = width, method.hidden or width
        self.mlp = nn.Sequential(
            nn.Linear(wide, inner, dtype=torch.float32), nn.ReLU(), nn.Linear(inner, width, dtype=torch.float32)
        )

    def vectors(self) -> Tensor:
        """The virtual tokens, float32 [length, width]."""
        states = self.embedding
        if self.lstm is not None:
            states = self.lstm(states[None])[0][0]
        found: Tensor = self.mlp(states)
        return found

    def tokens(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """The virtual tokens, the same for every row."""
        return self.vectors()
