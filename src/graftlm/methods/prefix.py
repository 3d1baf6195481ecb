r"""Prefix tuning: trained keys and values before those of the tokens, in every layer (Li & Liang 2021).

    attention(q, [P_k; K], [P_v; V])          P_k, P_v in R^{P x kv}, kv = key-value heads x head width

Queries are not extended, so a prefix costs no positions of its own and every token sees all of it. With `mlp=M` the
prefix is computed while it is trained (section 4.3): [P_k; P_v] of all layers = W_2 tanh(W_1 E), E in R^{P x d} normal,
W_1 in R^{M x d}, W_2 in R^{2 L kv x M}; one E and one MLP for each kind of attention (an encoder's, a decoder's, and
cross attention), as in the authors' code. A layer takes its own rows of W_2, so nothing is kept between layers and
gradient checkpointing recomputes what it needs. On saving the MLP is dropped.

Without an MLP this is P-tuning v2 (Liu et al. 2021) and the "flat" prefix of Li & Liang. Keys and values start normal
with standard deviation 0.02 (PEFT draws from N(0, 1)), or as those that the model itself computes for `tokens`, which
the paper found best for little data. Parameters stored: 2 P kv for each attention call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import (
    KeyValueDelta,
    Method,
    Part,
    Site,
    Survey,
    Targets,
    device_at,
    in_eval_mode,
    one_of,
    without_adapters,
)
from graftlm.core.attention import recorded_keys_values
from graftlm.core.sequence import takes
from graftlm.core.sites import parse_layers, selectors
from graftlm.errors import Finding, MethodError, SiteError

__all__ = ["PrefixDelta", "PrefixMLP", "PrefixTuning", "attentions"]

#: Standard deviation of keys and values at a random start.
_SMALL = 0.02


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Trained keys and values before those of the tokens, at every attention call; without an MLP P-tuning v2.

    `mlp` is the inner width of the reparametrisation, 0 for none; with one the learning rate is 1e-3. `targets` are
    `attention`, `cross`, or either of a stack (`encoder/attention`); all by themselves. `positions="shifted"` counts
    the prefix among the positions, as the authors' GPT-2 code and PEFT do; `own` leaves the tokens' positions alone, as
    the authors' BART code does. In an encoder-decoder `shifted` needs relative positions (T5's) and no cross attention
    among the targets. `start="tokens"` begins with what the model itself computes for the token ids `tokens`,
    cycled to `length`.

    Example:
        >>> print(PrefixTuning(length=10, mlp=512))
        prefix(length=10,mlp=512)
    """

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "prefix tuning"
    learning_rate: ClassVar[float] = 3e-2
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-1)
    starts_as_identity: ClassVar[bool] = False

    length: int = 30
    mlp: int = 0
    dropout: float = 0.0
    targets: Targets = ()
    layers: str | int | Sequence[int] | None = None
    positions: str = "own"
    start: str = "random"
    tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.require(
            (self.length >= 1, f"length {self.length} is not a whole number from 1", "length=30"),
            (self.mlp >= 0, f"mlp {self.mlp} is not a width, nor 0 for none", "mlp=512"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)", "dropout=0.1"),
            one_of("positions", self.positions, ("own", "shifted")),
            one_of("start", self.start, ("random", "tokens")),
            (
                (self.start == "tokens") == bool(self.tokens),
                "start=tokens and tokens=[...] belong together",
                "start=tokens,tokens=[318,257]",
            ),
            (not (self.mlp and self.tokens), "an MLP cannot start from tokens", "mlp=0"),
        )
        if self.mlp:  # a step of the network moves all that it computes
            self.__dict__["learning_rate"] = 1e-3

    @property
    def context_taken(self) -> int:
        """Those of the virtual tokens where they move the tokens'."""
        return self.length if self.positions == "shifted" else 0

    def sites(self, survey: Survey) -> list[Site]:
        """The attention calls that `targets` name in `layers`."""
        found = attentions(survey, self.targets, self.layers, self.name)
        if self.positions == "shifted" and any(site.role == "cross" for site in found):
            raise MethodError(
                Finding(
                    "T151",
                    f"{self.name}: cross attention of {survey.model_name} has no positions to shift",
                    fix="positions=own",
                )
            )
        return found

    def build(self, site: Site, module: nn.Module) -> PrefixDelta:  # noqa: ARG002
        """A plain prefix for one attention call, with a random start."""
        return PrefixDelta(self.length, site.kv_heads, site.head_width, self._shifts(site), self.dropout)

    def _shifts(self, site: Site) -> bool:
        """Whether the tokens' positions move; those of a stack of an encoder-decoder are relative to the prefix's."""
        return self.positions == "shifted" and not site.stack

    def build_all(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[PrefixDelta]:  # type: ignore[override]
        """A prefix for each site; with an MLP the first of each kind of attention holds it for all of its kind."""
        model = modules[""]
        biases: list[nn.Module | None] = [None] * len(sites)
        if self.positions == "shifted":
            biases = [_relative(model, site) if site.stack else None for site in sites]
            absolute = any(site.stack and bias is None for site, bias in zip(sites, biases, strict=True))
            if absolute or not (sites[0].stack or takes(getattr(model, "base_model", model), "position_ids")):
                name = type(model).__name__
                raise MethodError(
                    Finding("T151", f"{self.name}: {name} takes no positions to shift", fix="positions=own")
                )
        deltas = self._built(sites, modules, values=values)
        for delta, bias in zip(deltas, biases, strict=True):
            delta.relative = (bias,)
        return deltas

    def _built(self, sites: Sequence[Site], modules: Mapping[str, nn.Module], *, values: bool) -> list[PrefixDelta]:
        if not self.mlp:
            deltas: list[PrefixDelta] = super().build_all(sites, modules, values=values)  # type: ignore[assignment]
            if values and self.tokens:
                self._start_from_tokens(sites, deltas, modules[""])
            return deltas
        kinds: dict[str, list[Site]] = {}
        for site in sites:
            kinds.setdefault(site.stack, []).append(site)
        made: dict[str, PrefixDelta] = {}
        for own in kinds.values():
            with torch.device(device_at(modules, own[0].path) if values else torch.device("meta")):
                widths = [2 * site.kv_heads * site.head_width for site in own]
                mlp = PrefixMLP(self.length, own[0].in_features, self.mlp, sum(widths))
                for number, site in enumerate(own):
                    made[site.path] = PrefixDelta(
                        self.length, site.kv_heads, site.head_width, self._shifts(site), self.dropout,
                        mlp=mlp, first=sum(widths[:number]), owns=number == 0,
                    )  # fmt: skip
        return [made[site.path] for site in sites]

    def _start_from_tokens(self, sites: Sequence[Site], deltas: Sequence[PrefixDelta], model: nn.Module) -> None:
        ids = torch.tensor([self.tokens[place % len(self.tokens)] for place in range(self.length)])
        with without_adapters(model), in_eval_mode(model):
            found = recorded_keys_values(model, ids, [site.path for site in sites])
        for site, delta in zip(sites, deltas, strict=True):
            for own, recorded in zip((delta.prefix_key, delta.prefix_value), found[site.path], strict=True):
                assert own is not None
                own.data.copy_(recorded.transpose(0, 1).flatten(1))

    @functools.cached_property
    def _plain(self) -> PrefixTuning:
        return replace(self, mlp=0)

    def bake(self, part: Part) -> Part:
        """Without the MLP: the keys and values that it computes."""
        if not self.mlp:
            return part
        assert isinstance(part.delta, PrefixDelta)
        return Part(self._plain, part.site, part.delta.plain())


def _relative(model: nn.Module, site: Site) -> nn.Module | None:
    """The attention module that computes the relative positions' bias for the one of `site`; None where none does.

    That is T5's way: the first layer of a stack has the table, and the others are given what it computes.
    """
    own = model.get_submodule(site.path)
    stack = [module for path, module in model.named_modules() if site.stack in path.split(".")]
    found = (module for module in (own, *stack) if getattr(module, "has_relative_attention_bias", False))
    return next((module for module in found if hasattr(module, "compute_bias")), None)


def attentions(survey: Survey, targets: Targets, layers: str | int | Sequence[int] | None, name: str) -> list[Site]:
    """The attention calls that `targets` (roles, or a stack before a slash; all where empty) name in `layers`.

    Raises MethodError where the model has none and SiteError for targets that name none; `name` is the method's.
    """
    if not survey.attentions:
        raise MethodError(
            Finding(
                "T150",
                f"{name}: {survey.model_name} has attention code of its own, into which no keys can be put",
                fix="prompt",
            )
        )
    words = selectors(targets)
    have = list(dict.fromkeys(word for site in survey.attentions for word in _words_of(site)))
    if wrong := [word for word in words if word not in have]:
        raise SiteError(
            Finding("C101", f"{name}: no attention call is {wrong[0]!r}; there are: {', '.join(have)}", fix=have[0])
        )
    wanted = parse_layers(layers, survey.layer_count)
    found = [
        site
        for site in survey.attentions
        if (not words or any(word in _words_of(site) for word in words)) and (wanted is None or site.layer in wanted)
    ]
    if not found:
        raise SiteError(Finding("C102", f"{name}: layers leave no attention call of {survey.model_name}"))
    return found


def _words_of(site: Site) -> Iterator[str]:
    if site.role:
        yield site.role
        if site.stack and site.stack != site.role:
            yield f"{site.stack}/{site.role}"


class PrefixMLP(nn.Module):
    """The reparametrisation that the layers of one kind share: W_2 tanh(W_1 E), of which a layer takes some rows."""

    def __init__(self, length: int, width: int, inner: int, total: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width, dtype=torch.float32))
        self.first = nn.Linear(width, inner, dtype=torch.float32)
        self.last = nn.Linear(inner, total, dtype=torch.float32)

    def forward(self, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of the prefixes of all layers, [length, stop - start]."""
        hidden = torch.tanh(self.first(self.embedding))
        return F.linear(hidden, self.last.weight[start:stop], self.last.bias[start:stop])


class PrefixDelta(KeyValueDelta):
    """The keys and values before one attention call: its own, or `first` and following columns of a shared MLP."""

    reads_input: ClassVar[bool] = False

    def __init__(
        self, length: int, heads: int, head_width: int, shifted: bool, dropout: float, *,
        mlp: PrefixMLP | None = None, first: int = 0, owns: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.heads, self.head_width, self.shifts_positions = length, heads, head_width, shifted
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.prefix_key: nn.Parameter | None = None
        self.prefix_value: nn.Parameter | None = None
        # A tuple hides the module from this one's children: it belongs to the first delta of its kind alone.
        self._shared: tuple[PrefixMLP | None, int] = (mlp, first)
        #: The base's module that computes the bias over the prefix, hidden likewise; set where the prefix is built.
        self.relative: tuple[nn.Module | None] = (None,)
        self.mlp = mlp if owns else None
        if mlp is None:
            width = heads * head_width
            self.prefix_key = nn.Parameter(torch.randn(length, width, dtype=torch.float32) * _SMALL)
            self.prefix_value = nn.Parameter(torch.randn(length, width, dtype=torch.float32) * _SMALL)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each [length, heads x head width]."""
        mlp, first = self._shared
        if mlp is None:
            assert self.prefix_key is not None
            assert self.prefix_value is not None
            return self.prefix_key, self.prefix_value
        width = self.heads * self.head_width
        keys, values = mlp(first, first + 2 * width).split(width, dim=1)
        return keys, values

    def keys_values(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Keys and values, each [heads, length, head width]; the same for every row."""
        found = []
        for flat in self.flat():
            dropped = flat if self.dropout is None else self.dropout(flat)
            found.append(dropped.view(self.length, self.heads, self.head_width).transpose(0, 1))
        return found[0], found[1]

    @property
    def has_bias(self) -> bool:
        """Whether the base's bias of relative positions reaches over the prefix."""
        return self.relative[0] is not None

    def bias(self, place: int, count: int) -> Tensor:
        """The base's own bias, [heads, count, length], as if the prefix were the tokens before the row's first."""
        module: Any = self.relative[0]
        before = self.length + place
        whole: Tensor = module.compute_bias(count, max(before + count, self.length), past_seen_tokens=before)
        return whole[0, :, :, : self.length]

    def plain(self) -> PrefixDelta:
        """This prefix by values of its own."""
        keys, values = self.flat()
        with torch.device(keys.device):
            delta = PrefixDelta(self.length, self.heads, self.head_width, self.shifts_positions, 0.0)
        assert delta.prefix_key is not None
        assert delta.prefix_value is not None
        delta.prefix_key.data, delta.prefix_value.data = keys.detach().clone(), values.detach().clone()
        delta.relative = self.relative
        return delta
