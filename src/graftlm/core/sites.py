"""Sites: the addressable places of a base model where a delta can act, and the selectors that choose them.

A site is a module (or one parameter of a module) with its *role*: what it does in the network, whatever its name.
Roles: `query key value output` (attention maps), `up gate down` (feed-forward maps), `qkv` and `gate_up` (fused
maps), `router`-like and unknown maps have none; `embed`, `norm` and `head` are what they say. `Survey` lists every
site of one model; selectors choose among them:

- a role, or a group of roles: `attention`, `ffn`, `all-linear`, `norm`, `embed`, `head`;
- `experts`: the 3-D parameters in which a layer's experts are kept;
- a module name or a dotted suffix of its path: `q_proj`, `self_attn.q_proj`, a full path;
- a regular expression that matches whole paths (anything with a character of `*+?[](){}|^$\\`);
- a stack before a slash: `encoder/attention`, `decoder/query`, `cross/key`.

Several selectors are given as a list or separated by commas. What matches nothing is an error with the nearest names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from graftlm.errors import Finding, SiteError, nearest

__all__ = [
    "ROLES", "ROLE_GROUPS", "Site", "Survey", "Targets", "is_named", "linear_kind", "parse_layers", "selectors",
]  # fmt: skip

Targets = str | Sequence[str]

ROLES = ("query", "key", "value", "output", "qkv", "up", "gate", "gate_up", "down", "embed", "norm", "head")

_BLOCK_LINEAR = ("query", "key", "value", "output", "qkv", "up", "gate", "gate_up", "down")

ROLE_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output", "qkv"),
    "ffn": ("up", "gate", "gate_up", "down"),
}

_FUSED = {"query": "qkv", "key": "qkv", "value": "qkv", "up": "gate_up", "gate": "gate_up"}

_REGEX = re.compile(r"[*+?\[\](){}|^$\\]")


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a delta can act.

    `path` is the module's path in the base model; `parameter` names one of its parameters, for the `param` port.
    `kind` tells what it is, and through it the port: `linear`, `conv1d`, `embedding`, `norm` and `other` are modules;
    `sublayer` is what a sublayer adds to the residual stream and `stream` the stream after that (port `branch`; role
    `attention`, `cross` or `ffn`); `attention` is an attention call (port `kv`; role `attention` or `cross`);
    `sequence` is where token embeddings enter a stack (port `embed`); `experts` is one 3-D parameter of experts.

    `rows` says how the first dimension of the module's input relates to the rows of the batch: `batch` (one entry
    a row), `tokens` (rows times tokens), `broadcast` (one entry for all rows) or `unknown`. `aliases` are further
    (module path, parameter) places that hold the very same tensor (tied weights).
    """

    path: str
    kind: str  # linear | conv1d | embedding | norm | other | sublayer | stream | attention | sequence | experts
    role: str | None = None
    layer: int | None = None
    stack: str = ""  # encoder | decoder | cross, empty where a model has one stack
    rows: str = "unknown"
    in_features: int = 0
    out_features: int = 0
    parameter: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    #: For a part of a fused map: the part's name (`query`), and the output columns it has, as (start, stop) ranges.
    part: str = ""
    columns: tuple[tuple[int, int], ...] = ()
    #: For `sublayer`: the module whose input is the sublayer's own; for `stream`: "norm" where the model's own norm
    #: follows the add and is the site's module, "output" where the stream is the module's output.
    entry: str = ""
    #: For `attention`: query heads, key-value heads, width of a head; whether a token sees later ones.
    heads: int = 0
    kv_heads: int = 0
    head_width: int = 0
    causal: bool = False

    @property
    def key(self) -> str:
        """The site's address: the module's path, with the parameter's or the part's name behind it if there is one."""
        if self.part:
            return f"{self.path}:{self.part}"
        return f"{self.path}.{self.parameter}" if self.parameter else self.path

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """Every (module path, parameter) that holds this site's tensor."""
        return ((self.path, self.parameter or ""), *self.aliases)


def linear_kind(module: nn.Module) -> str | None:
    """`linear` (weight [out, in]), `conv1d` (weight [in, out]) or `embedding`; None for anything else.

    Quantised linears count by their `in_features` and `out_features`, whatever they store.
    """
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
        return "linear"
    return None


def parse_layers(text: str | int | Sequence[int] | None, count: int) -> frozenset[int] | None:
    """The layers that `text` names among `count`: `3`, `-1`, `0-3`, `-4:`, `:6`, `0,2,4`; None means all.

    Example:
        >>> sorted(parse_layers("-2:", 6))
        [4, 5]
    """
    if text is None or text == "":
        return None
    every = range(count)
    chosen: set[int] = set()
    parts = [text] if isinstance(text, int) else (text.split(",") if isinstance(text, str) else list(text))
    for part in parts:
        word = str(part).strip()
        if match := re.fullmatch(r"(-?\d*):(-?\d*)", word):
            first, last = (int(word) if word else None for word in match.groups())
            chosen.update(every[first:last])
        elif match := re.fullmatch(r"(\d+)-(\d+)", word):
            chosen.update(range(int(match[1]), int(match[2]) + 1))
        elif re.fullmatch(r"-?\d+", word):
            chosen.add(int(word) + count if int(word) < 0 else int(word))
        else:
            raise SiteError(
                Finding("C103", f"cannot read layers {word!r}: want 3, 0-3, -4: or 0,2,4", fix="layers=-4:")
            )
    if beyond := sorted(chosen.difference(every)):
        raise SiteError(Finding("C104", f"no layer {beyond[0]}: the model has {count} (0 to {count - 1})"))
    return frozenset(chosen)


@dataclass(frozen=True)
class Survey:
    """Every site of one model, in the order of its modules; `source` says how the roles were found.

    `rows` holds the row layout (see `Site`) of every module whose calls were watched, by path.
    """

    model_name: str
    sites: tuple[Site, ...]
    parameters: tuple[Site, ...]
    layer_count: int
    source: str  # "data flow" | "names"
    rows: Mapping[str, str]
    #: Parts of fused maps (query, key, value; gate, up), as sites of kind linear or conv1d with `columns`.
    slices: tuple[Site, ...] = ()
    #: Sites of the port `branch`: kinds `sublayer` and `stream`.
    branches: tuple[Site, ...] = ()
    #: Sites of the port `kv`: kind `attention`.
    attentions: tuple[Site, ...] = ()
    #: Sites of the port `embed`: kind `sequence`; the encoder's before the decoder's.
    sequences: tuple[Site, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def select(
        self,
        targets: Targets,
        *,
        layers: str | int | Sequence[int] | None = None,
        exclude: Targets = (),
        kinds: Iterable[str] = ("linear", "conv1d", "embedding"),
    ) -> list[Site]:
        """The module sites that `targets` name, restricted to `layers` and `kinds`, without `exclude`.

        Raises SiteError with every selector that matches nothing, each with the nearest names.
        """
        allowed = frozenset(kinds)
        everywhere = (*self.sites, *self.slices, *(site for site in self.parameters if site.kind == "experts"))
        pool = [site for site in everywhere if site.kind in allowed]
        wanted = parse_layers(layers, self.layer_count)
        chosen: dict[str, Site] = {}
        faults: list[Finding] = []
        for selector in selectors(targets):
            found = [site for site in pool if _matches(selector, site)]
            if not found:
                faults.append(self._unmatched(selector, pool))
            chosen.update((site.key, site) for site in found)
        for selector in selectors(exclude):
            found = [site for site in everywhere if _matches(selector, site)]
            if not found:
                faults.append(self._unmatched(selector, pool))
            for site in found:
                chosen.pop(site.key, None)
        if faults:
            raise SiteError(faults)
        sites = [site for site in pool if site.key in chosen and (wanted is None or site.layer in wanted)]
        if not sites:
            raise SiteError(
                Finding("C102", f"{_text(targets)!r} leaves no site of {self.model_name} after layers and exclude")
            )
        return sites

    def select_parameters(self, targets: Targets) -> list[Site]:
        """Every parameter of the modules that `targets` name (a role, or a module's name, suffix, path or pattern).

        A tensor that is tied to one elsewhere is taken at the named module alone: training a head leaves the embedding
        that shares its weight as it is. Raises SiteError with every selector that matches nothing.
        """
        by_path = {site.path: site for site in self.sites}
        chosen: dict[str, Site] = {}
        faults: list[Finding] = []
        for selector in selectors(targets):
            found = [
                replace(site, path=path, parameter=name, aliases=(), rows=self.rows.get(path, "unknown"))
                for site in self.parameters
                for path, name in site.places
                if any(_matches(selector, by_path.get(prefix, Site(prefix, "other"))) for prefix in _with_parents(path))
            ]
            if not found:
                faults.append(self._unmatched(selector, list(self.sites)))
            chosen.update((site.key, site) for site in found)
        if faults:
            raise SiteError(faults)
        return list(chosen.values())

    def with_role(self, *roles: str) -> list[Site]:
        """The module sites that have one of `roles`."""
        return [site for site in self.sites if site.role in roles]

    def _unmatched(self, selector: str, pool: list[Site]) -> Finding:
        stack, _, word = selector.rpartition("/")
        roles = Counter(site.role for site in pool if site.role)
        names = Counter(site.path.rpartition(".")[2] for site in pool)
        fused = _FUSED.get(word)
        if fused and roles[fused]:
            example = next(site.path.rpartition(".")[2] for site in pool if site.role == fused)
            return Finding(
                "C105", f"{word!r} is a part of the fused {example} in {self.model_name}", fix=f"targets={example}"
            )
        groups = [name for name, members in ROLE_GROUPS.items() if any(roles[member] for member in members)]
        choices = [*roles, *groups, "all-linear", *names]
        close = nearest(word, choices)
        have = " ".join(f"{name} ({count})" for name, count in names.most_common(10) if not name.isdigit())
        return Finding(
            "C101",
            f"no module matches {selector!r} in {self.model_name}. It has {have}",
            fix="targets=" + (f"{stack}/" if stack else "") + (close[0] if close else "attention"),
        )


def _with_parents(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[:count]) for count in range(1, len(words) + 1)]


def is_named(targets: Targets, site: Site) -> bool:
    """Whether one of the selectors in `targets` names `site`.

    Example:
        >>> is_named("attention,down", Site("h.0.mlp.c_proj", "conv1d", role="down"))
        True
    """
    return any(_matches(selector, site) for selector in selectors(targets))


def selectors(targets: Targets) -> list[str]:
    """The single selectors of `targets`. Raises SiteError for a bad regular expression."""
    if isinstance(targets, str):
        # A regular expression may hold commas of its own.
        words = [targets] if _REGEX.search(targets) else targets.split(",")
    else:
        words = list(targets)
    words = [word.strip() for word in words if word.strip()]
    for word in words:
        if _REGEX.search(word):
            try:
                re.compile(word.rpartition("/")[2])
            except re.error as error:
                raise SiteError(Finding("C106", f"{word!r} is not a regular expression: {error}")) from None
    return words


def _text(targets: Targets) -> str:
    return targets if isinstance(targets, str) else ",".join(targets)


def _matches(selector: str, site: Site) -> bool:
    stack, slash, word = selector.rpartition("/")
    if slash and stack != site.stack:
        return False
    if site.part:  # a part of a fused map is meant by its role alone; everything else means the whole map
        return word == site.role
    if site.kind == "experts":  # a parameter: meant by `experts`, or by its module's name and its own
        named = "." in word and (site.key == word or site.key.endswith("." + word))
        return word == "experts" or named or _is_full_match(word, site.key)
    if word == "all-linear":
        return site.role in _BLOCK_LINEAR
    if word in ROLE_GROUPS:
        return site.role in ROLE_GROUPS[word]
    if word in ROLES:
        # A role's word may also be a module's own name (BERT's `query`): where roles are known they decide.
        return site.role == word or (site.role is None and site.path.rpartition(".")[2] == word)
    if _REGEX.search(word):
        return _is_full_match(word, site.path)
    return site.path == word or site.path.endswith("." + word)


def _is_full_match(pattern: str, path: str) -> bool:
    return _REGEX.search(pattern) is not None and re.fullmatch(pattern, path) is not None


def with_parameter(site: Site, name: str, aliases: tuple[tuple[str, str], ...] = ()) -> Site:
    """The site of parameter `name` of the module at `site`."""
    return replace(site, parameter=name, aliases=aliases)
