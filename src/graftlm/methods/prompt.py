r"""Prompt tuning: trained vectors among the input embeddings (Lester et al. 2021, "The Power of Scale...").

    X' = [P; E(x)]          P in R^{P x d}, the only parameters

Start (section 3.2): `uniform` in [-0.5, 0.5] (the authors' code draws from [0, 0.5)), `vocabulary` (embeddings of words
drawn without replacement from the first 5,000 ids, which are the most frequent ones), `text` (the embeddings of given
token ids), or `labels` (one vector a class label, the mean over its tokens; the rest from the vocabulary). The
published code can also put P behind the first token or at the end, and so can this. In encoder-decoders P stands in
the encoder alone, as in the paper; `stack=both` gives the decoder one of its own (PEFT's files have both).
Parameters: P d a stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import EmbedDelta, Method, Site, Survey, one_of
from graftlm.errors import Finding, MethodError

__all__ = ["POSITIONS", "PromptDelta", "PromptTuning", "embedded", "sequences", "vocabulary_rows"]

POSITIONS = ("start", "after-bos", "end", "slots")
#: How many ids count as the most frequent ones.
_FREQUENT = 5000


@dataclass(frozen=True)
class PromptTuning(Method):
    """Trained vectors among the input embeddings.

    `position` is `start`, `after-bos`, `end`, or `slots`: in place of the tokens `slot_token` in each row. `tokens` are
    the ids for `start="text"` (cycled or cut to `length`), `labels` those of each label for `start="labels"`.

    Example:
        >>> print(PromptTuning(length=5, start="text", tokens=[318, 257]))
        prompt(length=5,start=text,tokens=[318,257])
    """

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "prompt tuning"
    learning_rate: ClassVar[float] = 3e-2
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-4, 1.0)
    starts_as_identity: ClassVar[bool] = False

    length: int = 20
    start: str = "vocabulary"
    tokens: Sequence[int] = ()
    labels: Sequence[Sequence[int]] = ()
    position: str = "start"
    slot_token: int = -1
    stack: str = "encoder"

    def __post_init__(self) -> None:
        starts = ("vocabulary", "uniform", "text", "labels")
        self.require(
            (self.length >= 1, f"length {self.length} is not a whole number from 1", "length=20"),
            one_of("start", self.start, starts),
            ((self.start == "text") == bool(self.tokens), "start=text and tokens=[...] belong together", "start=text"),
            (
                (self.start == "labels") == bool(self.labels) and all(self.labels),
                "start=labels and labels=[[...],...], the token ids of each label, belong together",
                "start=labels",
            ),
            (
                len(self.labels) <= self.length,
                f"{len(self.labels)} labels do not fit into length {self.length}",
                f"length={len(self.labels)}",
            ),
            *position_checks(self.position, self.slot_token),
            one_of("stack", self.stack, ("encoder", "both")),
        )

    @classmethod
    def from_text(cls, tokenizer: Any, text: str, **settings: Any) -> PromptTuning:
        """A prompt that starts as the embeddings of `text`, one vector a token unless `length` is among `settings`.

        Example:
            >>> PromptTuning.from_text(tokenizer, "Is this positive?", position="end")     # doctest: +SKIP
        """
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return cls(**{"length": len(ids), "start": "text", "tokens": ids, **settings})

    @property
    def context_taken(self) -> int:
        """Those of the virtual tokens, unless these stand in place of tokens."""
        return 0 if self.position == "slots" else self.length

    def sites(self, survey: Survey) -> list[Site]:
        """The sequence of embeddings; of an encoder-decoder the encoder's, or both."""
        return sequences(survey, self.stack, self.name)

    def build(self, site: Site, module: nn.Module) -> PromptDelta:
        """A prompt for `site`, whose module has the embeddings to start from."""
        return PromptDelta(self._start(site, module), self.position, self.slot_token)

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[PromptDelta]:  # type: ignore[override]
        """A prompt for each sequence."""
        if values:
            return [self.build(site, modules[site.path]) for site in sites]
        return [
            PromptDelta(torch.empty(self.length, site.in_features, device="meta"), self.position, self.slot_token)
            for site in sites
        ]

    def _start(self, site: Site, module: nn.Module) -> Tensor:
        if self.start == "uniform":
            device = module.get_input_embeddings().weight.device  # type: ignore[operator]
            return torch.empty(self.length, site.in_features, dtype=torch.float32, device=device).uniform_(-0.5, 0.5)
        if self.start == "text":
            return embedded(module, [self.tokens[place % len(self.tokens)] for place in range(self.length)])
        rows = vocabulary_rows(module, self.length)
        if self.start == "labels":
            means = torch.stack([embedded(module, label).mean(dim=0) for label in self.labels])
            rows = torch.cat([means, rows[len(means) :]])
        return rows


def position_checks(position: str, slot_token: int) -> tuple[tuple[bool, str, str], ...]:
    """What `Method.require` must check of where virtual tokens stand."""
    return (
        one_of("position", position, POSITIONS),
        (
            (position == "slots") == (slot_token >= 0),
            "position=slots and slot_token=ID, the token whose places are taken, belong together",
            "position=slots,slot_token=3",
        ),
    )


def sequences(survey: Survey, stack: str, name: str) -> list[Site]:
    """Where virtual tokens are put in: the only sequence, or the encoder's (`stack` "both": the decoder's too).

    Raises MethodError where the model takes no embeddings; `name` is the method's.
    """
    found = [site for site in survey.sequences if stack == "both" or site.stack in ("", "encoder")]
    if not found:
        raise MethodError(
            Finding("T152", f"{name}: {survey.model_name} takes no input embeddings, so none can be added", fix="lora")
        )
    return found


def embedded(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """The input embeddings of token ids as the stack `module` sees them, float32 [tokens, width].

    Raises MethodError for ids that are out of the vocabulary.
    """
    table: Any = module.get_input_embeddings()  # type: ignore[operator]
    if wrong := [token for token in ids if not 0 <= token < table.num_embeddings]:
        raise MethodError(Finding("T153", f"token {wrong[0]} is not one of the {table.num_embeddings} of the model"))
    with torch.no_grad():
        # Without its hooks: other adapters at the table do not count. Scaled tables (Gemma, BART) scale in forward.
        found: Tensor = table.forward(torch.tensor(list(ids), device=table.weight.device))
    return found.detach().to(torch.float32, copy=True)


def vocabulary_rows(module: nn.Module, count: int) -> Tensor:
    """The embeddings of `count` ids drawn from the 5,000 most frequent, each once unless `count` is greater."""
    table: Any = module.get_input_embeddings()  # type: ignore[operator]
    ids: list[int] = []
    while len(ids) < count:
        ids += torch.randperm(min(_FREQUENT, table.num_embeddings), device="cpu").tolist()
    return embedded(module, ids[:count])


class PromptDelta(EmbedDelta):
    """The trained vectors `prompt_embeddings` [length, width] of one sequence."""

    def __init__(self, start: Tensor, position: str, slot_token: int) -> None:
        super().__init__()
        self.length, self.position, self.slot_token = int(start.shape[0]), position, slot_token
        self.prompt_embeddings = nn.Parameter(start)

    def tokens(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """The vectors, the same for every row."""
        return self.prompt_embeddings
