"""Adapters: named sets of deltas on a base model: attach, route, merge, unmerge, detach.

Everything that can fail is done before the first change: sites are chosen and deltas built, then they are put in place.
The base keeps its class, repr, parameter names and checkpoint keys while adapters are attached, and is bit-identical
after the last one is detached. Merging puts new parameters in place of the originals and keeps those, so unmerging is
bit-exact.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlm.core.attention import IMPLEMENTATIONS, attention_function, implementation_of
from graftlm.core.delta import (
    BranchDelta,
    EmbedDelta,
    KeyValueDelta,
    LinearDelta,
    ParameterDelta,
    ReadingDelta,
    WholeParameterDelta,
    acts,
    folds,
)
from graftlm.core.junction import Junction, Replay, Switch, columns_of, junction_of
from graftlm.core.kind import is_encoder_decoder
from graftlm.core.method import Method, Part, Samples, device_at
from graftlm.core.routing import Routing, Spec, read_spec
from graftlm.core.sites import Site, Survey, linear_kind
from graftlm.core.storage import dense, is_offloaded, is_packed, plain_weight, turned
from graftlm.core.survey import survey
from graftlm.errors import AdapterError, Finding, GraftError, MethodError, NotMergeable, RoutingError, nearest

__all__ = [
    "Adapter",
    "Part",
    "Using",
    "adapters",
    "attach",
    "keep_merged",
    "original_parameters",
    "parts_of",
    "trainable",
    "use",
    "without_adapters",
]

_KEY = "_graftlm"
_ENTRY = "_graftlm_entry"
#: The attribute under which transformers keeps a block's checkpointing function.
_CHECKPOINTING = "_gradient_checkpointing_func"
#: The room that reads and writes adapters, found by name because it lies above this one.
_FORMATS = "graftlm.formats"


@dataclass
class _Graft:
    """What a base model carries while adapters are attached to it; lives in the model's `__dict__`."""

    switch: Switch = field(default_factory=Switch)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)  # parameters that required a gradient before
    tied: bool | None = None  # config.tie_word_embeddings before a merge untied the weights
    keep_zeros: bool = False  # whether merged weights are zero wherever a merged adapter prunes
    handles: list[RemovableHandle] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)  # what transformers may checkpoint


class Adapter:
    """A named set of deltas on one base model; made by `attach` or `load_adapter`.

    Example:
        >>> adapter = attach(model, LoRA(rank=16), name="support")   # doctest: +SKIP
        >>> adapter.merge(); adapter.unmerge(); adapter.detach()     # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, name: str, method: Method, parts: tuple[Part, ...]) -> None:
        self.model, self.name, self.method, self.parts = model, name, method, parts

    def __repr__(self) -> str:
        state = "merged" if self.merged else ("attached" if self.attached else "detached")
        return f"Adapter({self.name!r}, {self.method}, {self.parameter_count:,} parameters, {state})"

    # --- what it holds ---

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its name `<site>.<parameter>`; a tied tensor appears once."""
        for part in self.parts:
            for name, parameter in part.delta.named_parameters():
                yield _state_key(part, name), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the adapter."""
        return (parameter for _, parameter in self.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, detached but not copied."""
        found = {name: parameter.detach() for name, parameter in self.named_parameters()}
        for part in self.parts:
            found.update({_state_key(part, name): buffer for name, buffer in part.delta.named_buffers()})
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy `state` (as `state()` gives it) into this adapter.

        Deltas whose sizes only a state tells take those of `state`: their parameters are then new ones.
        Raises AdapterError naming every misfit, before any copy.
        """
        own, keys = self.state(), sorted(state)
        for part in self.parts if own.keys() == state.keys() else ():
            if part.delta.sizes_from_state:
                _adopt(part, state, keys)
        own = self.state()
        faults = [Finding("A101", f"adapter {self.name!r} lacks {key}") for key in own.keys() - state.keys()]
        faults += [Finding("A102", f"adapter {self.name!r} has no {key}") for key in state.keys() - own.keys()]
        for key in own.keys() & state.keys():
            if own[key].shape != state[key].shape:
                faults.append(
                    Finding("A103", f"{key} has shape {tuple(state[key].shape)}, wanted {tuple(own[key].shape)}")
                )
        if faults:
            raise AdapterError(sorted(faults, key=lambda finding: finding.message))
        with torch.no_grad():
            for key, tensor in state.items():
                own[key].copy_(tensor)
        if self.merged:
            _refold(self.model, _require_graft(self.model).switch.merged)

    @property
    def parameter_count(self) -> int:
        """How many numbers the adapter holds."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def attached(self) -> bool:
        """True until `detach`."""
        graft = _graft_of(self.model)
        return graft is not None and graft.adapters.get(self.name) is self

    @property
    def merged(self) -> bool:
        """True between `merge` and `unmerge`."""
        graft = _graft_of(self.model)
        return graft is not None and self.name in graft.switch.merged

    def requires_grad_(self, wanted: bool = True) -> Adapter:
        """Make the adapter's parameters trainable, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad_(wanted)
        return self

    # --- training ---

    def groups(self, learning_rate: float | Callable[[Method], float], **options: Any) -> list[dict[str, Any]]:
        """The trainable parameters as an optimizer takes them, in groups of one learning rate each (LoRA+).

        `learning_rate` may be a function that gives each part of a sum of methods its own.
        """
        by_rate: dict[float, list[nn.Parameter]] = {}
        for part in self.parts:
            rate = learning_rate(part.method) if callable(learning_rate) else learning_rate
            for name, parameter in part.delta.named_parameters():
                if parameter.requires_grad:
                    by_rate.setdefault(rate * part.method.learning_rate_factor(name), []).append(parameter)
        return [{"params": parameters, "lr": rate, **options} for rate, parameters in sorted(by_rate.items())]

    def penalty(self) -> Tensor | None:
        """What the method adds to the mean loss of a step (AdaLoRA's orthogonality); None for nothing."""
        found = [method.penalty(parts) for method, parts in self._by_method()]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else None

    def after_step(self, step: int, total: int) -> None:
        """Let the method take part in training: to be called after optimizer step `step` (from 1) of `total`.

        Before the gradients are cleared: AdaLoRA reads them.
        """
        for method, parts in self._by_method():
            method.after_step(parts, step, total)

    def _by_method(self) -> list[tuple[Method, list[Part]]]:
        return [(kind, [part for part in self.parts if part.method is kind]) for kind in self.method.parts]

    def baked(self) -> Adapter:
        """The adapter as it is stored: without what only training needs (the MLP of a prefix). Not attached."""
        parts: list[Part] = []
        methods: list[Method] = []
        for kind in self.method.parts:
            own = [kind.bake(part) for part in self.parts if part.method is kind]
            found: list[Method] = []  # equal methods are one: each delta may have been given its own copy
            for part in own:
                if part.method not in found:
                    found.append(part.method)
            parts += [replace(part, method=found[found.index(part.method)]) for part in own]
            methods += found or [kind]
        if list(map(id, methods)) == list(map(id, self.method.parts)):
            return Adapter(self.model, self.name, self.method, tuple(parts))
        return Adapter(self.model, self.name, functools.reduce(operator.add, methods), tuple(parts))

    def without_readers(self) -> Adapter:
        """The adapter as others use it: without what its objective alone reads (a value head). Not attached."""
        parts = tuple(part for part in self.parts if not isinstance(part.delta, ReadingDelta))
        if len(parts) in (0, len(self.parts)):
            return self
        reading = {id(part.method) for part in self.parts} - {id(part.method) for part in parts}
        methods = [kind for kind in self.method.parts if id(kind) not in reading]
        return Adapter(self.model, self.name, functools.reduce(operator.add, methods), parts)

    # --- what it does ---

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write the adapter in Hugging Face PEFT's format; see `graftlm.formats.save_adapter`."""
        written: Path = importlib.import_module(_FORMATS).save_adapter(self, folder, **options)
        return written

    def merge(self, *, keep_zeros: bool = False) -> Adapter:
        """Fold the adapter into the base's weights; the originals are kept for `unmerge`.

        All rows then have it, whatever the routing: `use` refuses to leave a merged adapter out. With `keep_zeros` what
        this or another merged adapter prunes stays zero: the changes of others are left out there, so the merged model
        is sparse and differs from the attached one. It holds until nothing is merged.
        Raises NotMergeable naming every delta that has no folded form, and where there are no zeros to keep, before
        anything changes.
        """
        graft = self._at_home()
        if keep_zeros and not any(_zeros(graft.adapters[name]) for name in {*graft.switch.merged, self.name}):
            raise NotMergeable(
                Finding(
                    "R203",
                    f"{self.name} prunes nothing, and no adapter that is merged does: there are no zeros to keep",
                    fix="merge()",
                )
            )
        if self.merged and graft.keep_zeros >= keep_zeros:
            return self
        for part in self.parts:
            if not folds(part.delta):
                why = f": {reason}" if (reason := getattr(part.delta, "why_not", "")) else ""
                raise NotMergeable(
                    Finding("R201", f"{part.method.name} at {part.site.key} cannot be folded into a weight" + why)
                )
        if fixed := next((part.site for part in self.parts if not _takes_weights(self.model, part)), None):
            what = type(self.model.get_submodule(fixed.path)).__name__
            raise NotMergeable(
                Finding(
                    "R202",
                    f"the {what} at {fixed.path} has no place for a merged weight",
                    fix="merged_copy(model)",
                )
            )
        merged, kept = graft.switch.merged, graft.keep_zeros
        graft.keep_zeros = kept or keep_zeros
        try:
            _refold(self.model, merged if self.merged else (*merged, self.name))
        except BaseException:
            graft.keep_zeros = kept
            _refold(self.model, merged)
            raise
        return self

    def unmerge(self) -> Adapter:
        """Put the original weights back, bit for bit; the routing is again what was asked for."""
        graft = self._at_home()
        if self.merged:
            _refold(self.model, tuple(name for name in graft.switch.merged if name != self.name))
        return self

    def detach(self) -> Adapter:
        """Take the adapter off the model; after the last one the model is bit-identical to before the first."""
        graft = self._at_home()
        self.unmerge()
        modules = dict(self.model.named_modules())
        for module in modules.values():
            if junction := junction_of(module):
                junction.take(self.name, module)
        for module in modules.values():  # decoders whose encoder has lost its virtual tokens
            if junction := junction_of(module):
                junction.take(self.name, module)
        del graft.adapters[self.name]
        graft.switch.route(graft.switch.asked.without({self.name}))
        if not graft.adapters:
            for handle in graft.handles:
                handle.remove()
            for entry in _entries(self.model):
                entry.__dict__.pop(_ENTRY, None)
            for block in graft.blocks:
                if isinstance(replay := block.__dict__.get(_CHECKPOINTING), Replay):
                    block.__dict__[_CHECKPOINTING] = replay.checkpoint
            for name in graft.frozen:
                _thaw(self.model, name)
            self.model.__dict__.pop(_KEY, None)
        return self

    def _at_home(self) -> _Graft:
        graft = _graft_of(self.model)
        if graft is None or graft.adapters.get(self.name) is not self:
            raise AdapterError(Finding("A104", f"adapter {self.name!r} is not attached to this model any more"))
        return graft


class Using:
    """The result of `use`: as a context manager it puts the previous routing back at its end."""

    def __init__(self, graft: _Graft, before: Routing) -> None:
        self._graft, self._before = graft, before

    def __enter__(self) -> Using:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        detached = self._before.names - self._graft.adapters.keys()
        self._graft.switch.route(self._before.without(detached))


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    trainable: bool = True,
    state: Mapping[str, Tensor] | None = None,
    samples: Samples | Iterable[Mapping[str, Any]] | None = None,
) -> Adapter:
    """Build `method`'s deltas on `model`, attach them as adapter `name`, and make it the acting adapter.

    The base is frozen while adapters are attached. Deltas start as the identity (unless their method says otherwise),
    on the device of their module, in float32; with `state` (as `Adapter.state` gives it) they start from that, and no
    random number is drawn. A failed attach leaves no trace. `samples` are some batches of the task, for methods that
    choose by data what to change (scores from gradients, pruning by activations); others do not look at them.

    Raises AdapterError for a name that is taken or unusable, SiteError and MethodError where the method does not fit.

    Example:
        >>> adapter = attach(model, LoRA(rank=16, targets="attention"), name="support")   # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(
            Finding(
                "A108", f"attach wants a model, got {type(model).__name__}", fix="model, tokenizer = load_base(...)"
            )
        )
    if not isinstance(method, Method):
        raise MethodError(Finding("T103", f"attach wants a method such as LoRA(rank=16), got {method!r}"))
    graft = _graft_of(model)
    taken = graft.adapters if graft else {}
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise AdapterError(Finding("A105", f"{name!r} cannot name an adapter: use letters, digits, - and _"))
    if name in taken:
        free = next(f"{name}-{n}" for n in range(2, len(taken) + 3) if f"{name}-{n}" not in taken)
        raise AdapterError(Finding("A106", f"the model has an adapter {name!r} already", fix=f'name="{free}"'))
    if inner := next((path for path, m in model.named_modules() if path and _KEY in m.__dict__), None):
        raise AdapterError(Finding("A107", f"adapters are attached to its submodule {inner}: use that model"))
    if any(_foreign(junction_of(module), graft) for module in model.modules()):
        raise AdapterError(Finding("A107", "adapters are attached to a larger model that holds this one: use that"))

    found = survey(model)
    parts = _build(model, method, found, values=state is None)
    adapter = Adapter(model, name, method, parts)
    if state is not None:
        modules, keys = dict(model.named_modules()), sorted(state)
        for part in parts:
            part.delta.adopt(_shapes_in(state, keys, part))
            part.delta.to_empty(device=device_at(modules, part.site.path))
        adapter.load_state(dict(state))
    else:
        _measure(model, method, parts, samples)
    # Nothing fails from here on.
    if graft is None:
        graft = _Graft()
        model.__dict__[_KEY] = graft
        for entry in _entries(model):
            entry.__dict__[_ENTRY] = graft.switch
            graft.handles.append(entry.register_forward_pre_hook(_at_entry, with_kwargs=True))
        graft.blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                graft.frozen.append(path)
                parameter.requires_grad_(False)
    _place(name, parts, dict(model.named_modules()), found, graft.switch)
    adapter.requires_grad_(trainable)
    graft.adapters[name] = adapter
    graft.switch.route(Routing(whole=(name,)))
    return adapter


def _entries(model: nn.Module) -> list[nn.Module]:
    """Where batches enter: the model, its backbone, and the stacks of an encoder-decoder, each callable by itself."""
    found = [model]
    backbone = getattr(model, "base_model", None)
    stacks = ("get_encoder", "get_decoder") if is_encoder_decoder(model) else ()
    for module in (backbone, *(getattr(model, name)() for name in stacks if hasattr(model, name))):
        if isinstance(module, nn.Module) and all(module is not other for other in found):
            found.append(module)
    return found


def _foreign(junction: Junction | None, graft: _Graft | None) -> bool:
    return junction is not None and (graft is None or junction.switch is not graft.switch)


def parts_of(model: nn.Module, method: Method) -> tuple[Part, ...]:
    """What `attach` would build for `method` on `model`, without values (meta tensors); the model is only read.

    Raises SiteError and MethodError as `attach` does.
    """
    return _build(model, method, survey(model), values=False)


def original_parameters(model: nn.Module) -> dict[tuple[str, str], nn.Parameter | None]:
    """What merged adapters replaced, by (module path, parameter name); None where the base has no such parameter."""
    graft = _graft_of(model)
    return dict(graft.switch.originals) if graft else {}


def _build(model: nn.Module, method: Method, found: Survey, *, values: bool = True) -> tuple[Part, ...]:
    """Every delta of `method`, on the device of its module, or on the meta device where no values are wanted."""
    modules = dict(model.named_modules())
    chosen: list[tuple[Method, list[Site]]] = []
    faults: list[Finding] = []
    for part in method.parts:
        try:
            chosen.append((part, list(part.sites(found))))
        except GraftError as error:
            faults += error.findings
    if faults:
        raise MethodError(faults)
    if not any(sites for _, sites in chosen):
        raise MethodError(Finding("T104", f"{method} changes nothing in {type(model).__name__}"))
    parts: list[Part] = []
    whole: set[str] = set()  # parameters that stand for themselves already: twice would be the same thing
    for part, sites in chosen:
        wanted = [site for site in sites if site.key not in whole]
        for site, delta in zip(wanted, part.build_all(wanted, modules, values=values), strict=True):
            if isinstance(delta, WholeParameterDelta):
                whole.add(site.key)
            parts.append(Part(part, site, delta))
    faults = [fault for part in parts for fault in _misfits(part, modules[part.site.path])]
    if faults:
        raise MethodError(faults[:1])
    keys = Counter(_state_key(part, name) for part in parts for name in part.delta.state_dict())
    if twice := sorted(key for key, count in keys.items() if count > 1):
        raise MethodError(
            Finding(
                "T105",
                f"{method}: two parts have a {twice[0]} ({len(twice)} names twice)",
                fix="give each its own targets",
            )
        )
    return tuple(parts)


def _misfits(part: Part, module: nn.Module) -> Iterator[Finding]:
    """Why the delta of `part` cannot act at its place."""
    if isinstance(part.delta, KeyValueDelta):
        implementation = implementation_of(module)
        if implementation not in IMPLEMENTATIONS or attention_function(module, implementation or "") is None:
            yield Finding(
                "T120",
                f"{part.method.name}: keys and values cannot be added to attention {implementation!r} of "
                f"{part.site.path}",
                fix='model.set_attn_implementation("sdpa")' if implementation else "another method",
            )
    if isinstance(part.delta, LinearDelta) and part.site.part and acts(part.delta, "before"):
        yield Finding(
            "T121",
            f"{part.method.name} changes the input of {part.site.path}, which its parts share",
            fix=f"targets={part.site.path.rpartition('.')[2]}",
        )


def _measure(
    model: nn.Module, method: Method, parts: Sequence[Part], samples: Samples | Iterable[Mapping[str, Any]] | None
) -> None:
    """Let methods that look at data first do so; no adapter acts meanwhile."""
    needing = [part for part in method.parts if part.needs_samples]
    if not needing:
        return
    if samples is None:
        raise MethodError(
            Finding("T122", f"{needing[0].name} chooses by data, and none was given", fix="attach(..., samples=[...])")
        )
    given = samples if isinstance(samples, Samples) else Samples(list(samples))
    given = replace(given, batches=list(given.batches))
    with without_adapters(model):
        for kind in needing:
            own = [part for part in parts if part.method is kind]
            kind.apply_measured(own, kind.measure(model, [part.site for part in own], given), model)


def _place(name: str, parts: Sequence[Part], modules: dict[str, nn.Module], found: Survey, switch: Switch) -> None:
    """Put the deltas of adapter `name` at their junctions."""

    def at(path: str) -> Junction:
        module = modules[path]
        return junction_of(module) or Junction(module, path, found.rows.get(path, "unknown"), switch)

    for part in parts:
        if isinstance(part.delta, ReadingDelta):
            continue
        for path, parameter_name in part.site.places:
            at(path).put(name, part.delta, part.site, parameter_name)
        if isinstance(part.delta, BranchDelta) and part.delta.reads_input and part.site.kind == "sublayer":
            at(part.site.entry).watchers.add(name)
        if isinstance(part.delta, EmbedDelta):
            entry = at(part.site.path)
            entry.causal = part.site.causal
            entry.keeps_virtual = part.site.stack == "encoder"
            for other in found.sequences if part.site.stack == "encoder" else ():
                if other.stack == "decoder":
                    at(other.path).encoder = entry
        if isinstance(part.delta, KeyValueDelta):
            for sequence in found.sequences:
                if sequence.stack == part.site.stack or not sequence.stack:
                    shifts = at(sequence.path).shifts
                    moved = part.delta.length if part.delta.shifts_positions else 0
                    shifts[name] = max(shifts.get(name, 0), moved)


def _state_key(part: Part, name: str) -> str:
    """The name of a tensor of the adapter: the site's address, and `name` behind it unless it stands for itself."""
    return part.site.key if isinstance(part.delta, WholeParameterDelta) else f"{part.site.key}.{name}"


def _shapes_in(state: Mapping[str, Tensor], keys: Sequence[str], part: Part) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `part` in `state`, by their names in the delta; `keys` are the state's, sorted."""
    lead = _state_key(part, "")
    # Those that begin so lie together: a look through all of them for each part would be parts times names.
    start = stop = bisect_left(keys, lead)
    while stop < len(keys) and keys[stop].startswith(lead):
        stop += 1
    return {key.removeprefix(lead): tuple(state[key].shape) for key in keys[start:stop]}


def _adopt(part: Part, state: Mapping[str, Tensor], keys: Sequence[str]) -> None:
    """Give the delta of `part` tensors of the sizes in `state`, where they differ; device and training stay."""
    delta = part.delta
    tensors = {**dict(delta.named_parameters()), **dict(delta.named_buffers())}
    shapes = _shapes_in(state, keys, part)
    if all(shapes.get(name) == tuple(tensor.shape) for name, tensor in tensors.items()):
        return
    trained = any(parameter.requires_grad for parameter in delta.parameters())
    device = next(iter(tensors.values())).device
    delta.adopt(shapes)
    delta.to(device)
    for parameter in delta.parameters():
        parameter.requires_grad_(trained)


# --- routing --------------------------------------------------------------------------------------------------------


def _graft_of(model: nn.Module) -> _Graft | None:
    return model.__dict__.get(_KEY)


def _require_graft(model: nn.Module) -> _Graft:
    inner = model
    while _graft_of(inner) is None and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # type: ignore[assignment]  # a wrapper such as DistributedDataParallel
    graft = _graft_of(inner)
    if graft is None:
        raise RoutingError(
            Finding("R109", f"no adapter is attached to this {type(model).__name__}", fix="attach(model, ...)")
        )
    return graft


def use(model: nn.Module, spec: Spec) -> Using:
    """Say which adapters act: None, a name, a tuple of names (together), or a list with one of these for each row.

    It holds until the next `use`; as a context manager, until the end of the block.
    Raises RoutingError for names that are not attached and for routings that leave out a merged adapter.

    Example:
        >>> use(model, ["support", None, ("support", "tone")])       # doctest: +SKIP
        >>> with use(model, None): base = model(**batch)             # doctest: +SKIP
    """
    graft = _require_graft(model)
    routing = read_spec(spec)
    unknown = sorted(routing.names - graft.adapters.keys())
    if unknown:
        raise RoutingError(
            [
                Finding(
                    "R110",
                    f"no adapter {name!r}; attached: {', '.join(sorted(graft.adapters))}",
                    fix=next((f'use(model, "{close}")' for close in nearest(name, graft.adapters)), ""),
                )
                for name in unknown
            ]
        )
    for choice in routing.rows if routing.rows is not None else (routing.whole,):
        if missing := [name for name in graft.switch.merged if name not in choice]:
            raise RoutingError(
                Finding(
                    "R111",
                    f"adapter {missing[0]!r} is merged into the weights and cannot be left out",
                    fix="adapter.unmerge()",
                )
            )
    before = graft.switch.asked
    graft.switch.route(routing)
    return Using(graft, before)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base alone for the block, with what is merged into it; the routing is put back afterwards."""
    graft = _graft_of(model)
    if graft is None:
        yield
        return
    with use(model, graft.switch.merged or None):
        yield


def _at_entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook where batches enter: check the batch against the routing, and remember that for recomputation."""
    switch: Switch = module.__dict__[_ENTRY]
    mask = kwargs.get("attention_mask")
    switch.batch.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if not (torch.compiler.is_compiling() and switch.routing.rows is None):  # a graph has its routing as a guard
        _admit(module, switch, args, kwargs)


def _admit(module: nn.Module, switch: Switch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    given = next((kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)), None)
    if given is None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    cache = kwargs.get("past_key_values")
    filled = getattr(cache, "get_seq_length", None)
    switch.going_on = bool(filled is not None and filled())
    if not switch.going_on:
        switch.epoch += 1
    switch.batch.admit(switch.current(), given, cached=cache is not None)
    graft = _graft_of(module)
    if module.training and graft is not None:
        switch.remember()
        for block in graft.blocks:
            checkpointing = block.__dict__.get(_CHECKPOINTING)
            if checkpointing is not None and not isinstance(checkpointing, Replay):
                block.__dict__[_CHECKPOINTING] = Replay(checkpointing, switch)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters attached to `model`, by name, in the order they came."""
    graft = _graft_of(model)
    return dict(graft.adapters) if graft else {}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of `model` by name: those of its adapters (`<adapter>/<site>.<name>`), or its own."""
    found = adapters(model)
    if not found:
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        f"{name}/{key}": parameter
        for name, adapter in found.items()
        for key, parameter in adapter.named_parameters()
        if parameter.requires_grad
    }


# --- merging --------------------------------------------------------------------------------------------------------


def keep_merged(model: nn.Module) -> None:
    """Make merged weights the model's own, for good: the merged adapters leave, and nothing is left to unmerge."""
    graft = _require_graft(model)
    leaving = [graft.adapters[name] for name in graft.switch.merged]
    graft.switch.originals.clear()
    graft.switch.merged, graft.tied = (), None
    for adapter in leaving:
        adapter.detach()


def _refold(model: nn.Module, merged: tuple[str, ...]) -> None:
    """Put the original parameters back, then fold the adapters `merged` into them, as they would act together."""
    graft = _require_graft(model)
    switch, originals = graft.switch, graft.switch.originals
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    for module in modules.values():
        if junction := junction_of(module):
            junction.settle(module)
    for (path, name), original in originals.items():
        now = modules[path]._parameters.get(name)
        if original is not None and now is not None and (original.dtype, original.device) != (now.dtype, now.device):
            # The model was moved or cast meanwhile; codes in place of numbers only move.
            original.data = original.data.to(now.device, now.dtype if original.is_floating_point() else None)
        modules[path]._parameters[name] = original
    originals.clear()
    if graft.tied is not None and config is not None:
        config.tie_word_embeddings, graft.tied = graft.tied, None
    switch.merged = merged
    switch.route(switch.asked)
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((path, name))

    def place(path: str, name: str, value: nn.Parameter) -> None:
        originals.setdefault((path, name), modules[path]._parameters.get(name))
        modules[path]._parameters[name] = value

    def put(places: Iterable[tuple[str, str]], value: Tensor, like: Tensor, dtype: torch.dtype) -> None:
        places = list(places)
        others = [other for other in holders.get(id(like), ()) if other not in places]
        if others and getattr(config, "tie_word_embeddings", False):
            # Only some of the places that shared this weight change. A saved copy needs every one of them: transformers
            # ties all of a model's embeddings or none, and writes shared storage once.
            graft.tied, config.tie_word_embeddings = True, False  # type: ignore[union-attr]
            for path, name in others[1:]:
                place(path, name, nn.Parameter(like.detach().clone(), requires_grad=False))
            others = others[:1]
        fresh = nn.Parameter(value.to(dtype).contiguous(), requires_grad=False)
        for path, name in places:
            place(path, name, fresh)
        # The next to change some of these places alone must know with which others they share it.
        holders[id(like)], holders[id(fresh)] = others, places

    with torch.no_grad():
        for part in _in_folding_order([part for name in merged for part in graft.adapters[name].parts]):
            module, delta = modules[part.site.path], part.delta
            if isinstance(delta, ParameterDelta):
                # Places that shared a tensor may hold one each by now.
                by_tensor: dict[int, list[tuple[str, str]]] = {}
                for path, name in part.site.places:
                    by_tensor.setdefault(id(modules[path]._parameters[name]), []).append((path, name))
                for places in by_tensor.values():
                    path, name = places[0]
                    now = modules[path]._parameters[name]
                    assert now is not None
                    original = originals.get((path, name))
                    stored = now if original is None else original
                    packed = name == "weight" and is_packed(module)
                    start = plain_weight(module, stored) if packed else stored
                    value = delta.parameter(start)
                    value = turned(module, value) if packed else value
                    # Where an adapter merged before stands already, the changes add up, as at a junction.
                    if now is not stored:
                        value = now + (value - (turned(module, start) if packed else start))
                    put(places, value.clone(), now, _held_as(module, now))
            elif isinstance(delta, LinearDelta):
                weight, bias = module._parameters["weight"], module._parameters.get("bias")
                assert weight is not None
                across = linear_kind(module) == "conv1d"  # stored [in, out]
                whole = dense(module).float()
                dtype = _held_as(module, weight)
                folded, shift = _fold(part, whole.T if across else whole, None if bias is None else bias.float())
                put([(part.site.path, "weight")], folded.T if across else folded, weight, dtype)
                if shift is not None:
                    put([(part.site.path, "bias")], shift, weight if bias is None else bias, dtype)
        graft.keep_zeros = graft.keep_zeros and bool(merged)
        for part, kept in (pair for name in merged if graft.keep_zeros for pair in _zeros(graft.adapters[name])):
            changed = modules[part.site.path]._parameters[part.site.parameter or ""]
            assert changed is not None
            module = modules[part.site.path]
            # A merge has put it there: the original is kept elsewhere.
            changed.mul_(turned(module, kept))


def _held_as(module: nn.Module, weight: Tensor) -> torch.dtype:
    """The type of the numbers of a map's `weight`: of a packed one what it was before."""
    dtype: Any = weight.dtype if weight.is_floating_point() else module.dtype
    return dtype  # type: ignore[no-any-return]


def _zeros(adapter: Adapter) -> list[tuple[Part, Tensor]]:
    """The parts of `adapter` that make zeros, with what they let stand."""
    found = [(part, part.delta.kept()) for part in adapter.parts if isinstance(part.delta, ParameterDelta)]
    return [(part, kept) for part, kept in found if kept is not None]


def _thaw(model: nn.Module, name: str) -> None:
    """Let the base's parameter `name` have gradients again."""
    path, _, key = name.rpartition(".")
    own = model.get_submodule(path)._parameters
    parameter = own[key]
    assert parameter is not None
    if parameter.is_meta and parameter.is_inference():  # in place of one on disk, left by a call in inference mode
        own[key] = nn.Parameter(torch.empty_like(parameter))
    else:
        parameter.requires_grad_(True)


def _takes_weights(model: nn.Module, part: Part) -> bool:
    """Whether a merged weight can be put in place of the one that `part` changes."""
    module = model.get_submodule(part.site.path)
    if not isinstance(part.delta, LinearDelta) and part.site.parameter != "weight":
        return True
    weight = module._parameters.get("weight")
    return (
        weight is not None and not is_offloaded(module) and (hasattr(module, "dense_weight") or not is_packed(module))
    )


def _fold(part: Part, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The merged weight and bias; for a part of a fused map only its rows change."""
    assert isinstance(part.delta, LinearDelta)
    if not part.site.columns:
        return part.delta.fold(weight, bias)
    index = columns_of(part.site.columns, weight.device)
    own, own_bias = part.delta.fold(weight[index], None if bias is None else bias[index])
    if own_bias is not None:
        bias = (weight.new_zeros(weight.shape[0]) if bias is None else bias).index_copy(0, index, own_bias)
    return weight.index_copy(0, index, own), bias


def _in_folding_order(parts: list[Part]) -> list[Part]:
    """Parameters first, since maps fold over them; then additions, then scalings, as at a junction."""

    def place(part: Part) -> int:
        if isinstance(part.delta, ParameterDelta):
            return 0
        return 2 - (acts(part.delta, "add") or acts(part.delta, "add_over"))

    return sorted(parts, key=place)
