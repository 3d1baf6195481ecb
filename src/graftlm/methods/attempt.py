r"""ATTEMPT: for each input a mixture of prompts that were trained before (Asai et al. 2022, "ATTEMPT: ...").

    P(x) = P_target + sum_j a_j P_j,      a = softmax_j( pool(P_j) . h(x) / T )          (section 3.2)
    h(x) = LN( W_up SiLU( W_down pool(E(x)) ) )

P_1 ... P_S are source prompts, trained on other tasks by `prompt` and frozen here; the target's own prompt is mixed in
as P_{S+1}, as in the paper (`mix_target=False` leaves it out). pool takes the largest entry of each dimension over the
tokens, real ones only. W_down: d -> `bottleneck` and W_up back have no bias. T keeps the mixture soft: 2000 in the
authors' code. Source prompts are set by `AttemptDelta.set_sources`; until then they are drawn from the vocabulary.

The mixture is chosen by the whole input. A model that predicts the next token would see there what it is to predict,
so generating decoders are refused; encoders, encoder-decoders and classifiers are what the paper is about.
Parameters: P d + 2 d bottleneck + 2 d; S P d frozen numbers are stored with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import EmbedDelta, Method, Site, Survey, device_at
from graftlm.errors import Finding, MethodError
from graftlm.methods.prompt import sequences, vocabulary_rows

__all__ = ["Attempt", "AttemptDelta"]


@dataclass(frozen=True)
class Attempt(Method):
    """For each input a mixture of `sources` frozen prompts and one trained prompt, chosen by a small network.

    Example:
        >>> print(Attempt(length=20, sources=6))
        attempt(length=20,sources=6)
        >>> adapter = attach(model, Attempt(length=20, sources=2))                             # doctest: +SKIP
        >>> adapter.parts[0].delta.set_sources(torch.stack([first, second]))                   # doctest: +SKIP
    """

    name: ClassVar[str] = "attempt"
    title: ClassVar[str] = "ATTEMPT"
    learning_rate: ClassVar[float] = 3e-2
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-4, 1.0)
    starts_as_identity: ClassVar[bool] = False

    length: int = 100
    sources: int = 6
    bottleneck: int = 100
    temperature: float = 2000.0
    mix_target: bool = True

    def __post_init__(self) -> None:
        self.require(
            (self.length >= 1, f"length {self.length} is not a whole number from 1", "length=100"),
            (self.sources >= 1, f"sources {self.sources} is not a whole number from 1", "sources=6"),
            (self.bottleneck >= 1, f"bottleneck {self.bottleneck} is not a whole number from 1", "bottleneck=100"),
            (self.temperature > 0, f"temperature {self.temperature} is not above 0", "temperature=2000"),
        )

    @property
    def context_taken(self) -> int:
        """Those of the virtual tokens."""
        return self.length

    def sites(self, survey: Survey) -> list[Site]:
        """The sequence of embeddings; of an encoder-decoder the encoder's."""
        return sequences(survey, "encoder", self.name)

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[AttemptDelta]:  # type: ignore[override]
        """The mixture for the sequence."""
        model: Any = modules[""]
        if any(site.causal for site in sites) and hasattr(model, "can_generate") and model.can_generate():
            raise MethodError(
                Finding(
                    "T154",
                    f"{self.name}: {type(model).__name__} predicts the next token, and the mixture would be chosen by "
                    "what is to be predicted",
                    fix="prompt",
                )
            )
        deltas = []
        for site in sites:
            module = modules[site.path]
            count = self.length * (self.sources + 1)
            shape = (self.sources + 1, self.length, site.in_features)
            rows = vocabulary_rows(module, count) if values else torch.empty(count, site.in_features, device="meta")
            with torch.device(device_at(modules, site.path) if values else torch.device("meta")):
                deltas.append(AttemptDelta(rows.view(shape), self))
        return deltas


class AttemptDelta(EmbedDelta):
    """The mixture at one sequence: a trained prompt, frozen source prompts, and the network that weighs them."""

    source_prompts: Tensor

    def __init__(self, prompts: Tensor, method: Attempt) -> None:
        super().__init__()
        width = int(prompts.shape[-1])
        self.length, self.temperature, self.mix_target = method.length, method.temperature, method.mix_target
        self.prompt_embeddings = nn.Parameter(prompts[0].clone())
        self.register_buffer("source_prompts", prompts[1:].clone())
        self.down = nn.Linear(width, method.bottleneck, bias=False, dtype=torch.float32)
        self.up = nn.Linear(method.bottleneck, width, bias=False, dtype=torch.float32)
        self.norm = nn.LayerNorm(width, dtype=torch.float32)

    def set_sources(self, prompts: Tensor) -> None:
        """Take the source prompts [sources, length, width], as other adapters' `prompt_embeddings` stacked.

        Raises MethodError where the shape is another one.
        """
        if prompts.shape != self.source_prompts.shape:
            raise MethodError(
                Finding(
                    "T155",
                    f"source prompts have shape {tuple(prompts.shape)}, wanted {tuple(self.source_prompts.shape)}",
                    fix=f"attempt(sources={prompts.shape[0]},length={prompts.shape[1]})" if prompts.dim() == 3 else "",
                )
            )
        self.source_prompts.data.copy_(prompts)

    def weights(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        """The share of each prompt for each row, [rows, sources (+ 1)], for its `embeddings` [rows, tokens, width]."""
        if mask is not None:
            embeddings = embeddings.masked_fill(~mask[:, :, None], torch.finfo(embeddings.dtype).min)
        pooled = embeddings.amax(dim=1).float()  # [rows, width]: small, and the softmax is sharp without it
        states = self.norm(self.up(nn.functional.silu(self.down(pooled))))
        return torch.softmax(states @ self._mixed().amax(dim=1).T / self.temperature, dim=-1)

    def _mixed(self) -> Tensor:
        if not self.mix_target:
            return self.source_prompts
        return torch.cat([self.source_prompts, self.prompt_embeddings[None]])

    def tokens(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        """The mixture for each row, [rows, length, width]."""
        mixture = torch.einsum("rs,sld->rld", self.weights(embeddings, mask), self._mixed())
        return self.prompt_embeddings + mixture
