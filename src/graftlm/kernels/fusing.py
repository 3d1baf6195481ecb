"""Fusing: a model with adapters is given faster forwards for training, where they are checked to be the same.

Classes, names and checkpoints of the base stay; a fused module has a `forward` of its own beside its class's, which
looks at each call whether what acts there is what it can do, and else calls the class's. Recognised by pattern, never
by the name of a model: linear maps with low-rank changes, gated and plain feed-forward parts, norms, attention. Norms
and feed-forward parts are run once on random numbers, forward and backward, beside their class's forward; one that
differs is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import KeyValueDelta, LinearDelta, LowRank, in_eval_mode, linear_kind, survey, without_adapters
from graftlm.core.attention import implementation_of, named_attention
from graftlm.core.junction import MapChange, junction_of
from graftlm.core.lane import lane_of
from graftlm.core.storage import Packed
from graftlm.kernels.attention import attention_forward
from graftlm.kernels.feedforward import Map, feed_forward
from graftlm.kernels.linear import low_rank_linear
from graftlm.kernels.native import LARGE_BYTES, give_back_large_memory
from graftlm.kernels.norm import frozen_norm, invertible

__all__ = ["RECOMPUTE", "Fused", "Recompute", "fuse", "given_back_bytes"]

Recompute = Literal["none", "feedforward", "blocks"]
#: What is computed again in the backward instead of being kept: each level needs less memory and more time.
RECOMPUTE: tuple[Recompute, ...] = ("none", "feedforward", "blocks")

_LEAST_GAIN = 1e-2
_EPSILON = ("variance_epsilon", "eps", "epsilon")


@dataclass
class Fused:
    """What `fuse` has done to a model; `undo` takes it back. Also a context manager.

    `fused` has the paths of the fused modules by kind (`linear`, `feed-forward`, `norm`, `attention`), `left` those
    that look alike and were found to compute something else, with the reason.
    """

    model: Any
    fused: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    checkpointing: bool = False
    configs: dict[str, Any] = field(default_factory=dict)  # what attention modules had, by path

    def undo(self) -> None:
        """Give every module its class's forward back."""
        modules = dict(self.model.named_modules())
        for path in (path for paths in self.fused.values() for path in paths):
            if (lane := lane_of(modules[path])) is not None:
                lane.fused = None
            else:
                modules[path].__dict__.pop("forward", None)
        for path, config in self.configs.items():
            modules[path].config = config
        self.fused, self.configs = {}, {}
        if self.checkpointing:
            disable = getattr(self.model, "activation_checkpointing_disable", None)
            (disable or self.model.gradient_checkpointing_disable)()
            self.checkpointing = False

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def given_back_bytes(recompute: Recompute) -> int:
    """From which size on freed memory is given back in training: who has parts computed again pays time for memory."""
    return LARGE_BYTES if recompute == "none" else 2**20


def fuse(model: nn.Module, *, recompute: Recompute = "none", device: str = "") -> Fused:
    """Give the modules of `model` faster forwards for training with the adapters attached to it.

    Losses and gradients stay the same within rounding. `recompute` says what is computed again in the backward:
    nothing large, what is inside feed-forward parts, or whole blocks (the model's own gradient checkpointing).
    Adapters attached later are right but slower until it is called again. `device` is where a model without values is
    meant to run: "cpu" where nothing is said.

    Example:
        >>> adapter = attach(model, LoRA(rank=16, targets="all-linear"))       # doctest: +SKIP
        >>> with fuse(model, recompute="feedforward"): train(model)             # doctest: +SKIP
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is {recompute!r}, wanted one of {', '.join(RECOMPUTE)}")
    done = Fused(model)
    found = survey(model)
    modules = dict(model.named_modules())

    def put(kind: str, path: str, forward: Callable[..., Any], *plan: Any) -> None:
        made = functools.partial(forward, modules[path], *plan)
        if (lane := lane_of(modules[path])) is not None:
            lane.fused = made
        else:
            modules[path].__dict__["forward"] = made
        done.fused.setdefault(kind, []).append(path)

    with in_eval_mode(model), without_adapters(model):
        for path, module in modules.items():
            lane = lane_of(module)
            theirs = "forward" in module.__dict__ if lane is None else lane.before is not None or lane.fused is not None
            if theirs or module.__dict__.get("_hf_hook") is not None:
                continue  # somebody else's
            if _offers_low_rank(module):
                put("linear", path, _linear_forward)
            elif (norm := _norm_of(module)) is not None:
                if _is_same(module, functools.partial(_norm_forward, module, norm), norm.width):
                    put("norm", path, _norm_forward, norm)
                else:
                    done.left[path] = "a norm of another kind"
        roles = {site.path: site.role for site in found.sites if site.role in ("gate", "up", "down")}
        for path, part in _feed_forwards(modules, roles, recompute == "feedforward"):
            module = modules[path]
            width = _width_in(module._modules[part.inner[0]])
            if "forward" in module.__dict__:
                continue
            if _is_same(module, functools.partial(_feed_forward_forward, module, part), width):
                put("feed-forward", path, _feed_forward_forward, part)
            else:
                done.left[path] = "a feed-forward part of another kind"
    on_processor = (device or next(model.parameters()).device.type) in ("cpu", "meta")
    if on_processor and not next(model.parameters()).is_meta:
        give_back_large_memory(given_back_bytes(recompute))
    for site in found.attentions if on_processor else ():
        owner: Any = modules[site.path]
        if implementation_of(owner) == "sdpa" and not _has_prefixes(owner):
            done.configs[site.path] = owner.config
            owner.config = named_attention(owner.config, "graftlm_blocked", attention_forward)
            done.fused.setdefault("attention", []).append(site.path)
    if recompute == "blocks":
        _checkpoint(model)
        done.checkpointing = True
    return done


def _has_prefixes(module: nn.Module) -> bool:
    junction = junction_of(module)
    placed = [delta for each in junction.deltas.values() for _, _, delta in each] if junction else []
    return any(isinstance(delta, KeyValueDelta) for delta in placed)


def _checkpoint(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # the backward stops at the lowest delta


def _is_same(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether `forward` gives what the module's own gives, and the same gradient, on a few random tokens."""
    like = next(module.parameters())
    if like.is_meta:  # for planning: there are no numbers to compare
        return True
    types: list[Any] = [each.dtype for each in module.parameters() if each.is_floating_point()]
    types += [each.dtype for each in module.modules() if isinstance(each, Packed)]  # what it was before it was packed
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, width, generator=numbers).to(like.device, types[0])
    results: list[list[Tensor]] = []
    try:
        for each in (functools.partial(type(module).forward, module), forward):
            given = x.clone().requires_grad_()
            with torch.enable_grad():
                y = each(given)
                weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
                results.append([y.detach(), *torch.autograd.grad(y, given, weights)])
    except (RuntimeError, TypeError, AttributeError):  # it wants other arguments, or gives another thing
        return False
    close = {torch.float64: 1e-9, torch.float32: 1e-4}.get(x.dtype, 3e-2)
    return all(
        own.shape == other.shape and bool((own - other).norm() <= close * other.norm())
        for other, own in zip(*results, strict=True)
    )


# --- what acts at a linear map --------------------------------------------------------------------------------------


def _offers_low_rank(module: nn.Module) -> bool:
    junction = junction_of(module)
    if junction is None or not _is_bare(module):
        return False
    placed = [delta for each in junction.deltas.values() for _, _, delta in each]
    return any(
        isinstance(delta, LinearDelta)
        and (
            delta.low_rank() is not None
            or delta.as_shift() is not None
            or type(delta).low_rank_over is not LinearDelta.low_rank_over
        )
        for delta in placed
    )


def _is_bare(module: Any) -> bool:
    """Whether the module is a linear map over a plain tensor, not a subclass, or over what can be multiplied by."""
    if type(module) is not nn.Linear and linear_kind(module) != "conv1d":
        return isinstance(module, Packed)
    return type(module._parameters.get("weight")) in (Tensor, nn.Parameter)  # torchao puts a tensor of its own there


def _width_in(module: Any) -> int:
    return int(module.weight.shape[0] if linear_kind(module) == "conv1d" else module.in_features)


def _map_at(module: nn.Module, x: Tensor) -> Map | None:
    """The frozen map at `module` with what acts there on all rows; None where the module must be called as it is."""
    if not _is_bare(module):
        return None
    weight: Tensor | None = module._parameters["weight"]
    bias: Tensor | None = module._parameters.get("bias")
    packed = module if type(module) is not nn.Linear and isinstance(module, Packed) else None
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    # Where a merge put numbers in place of the codes, the module itself knows best.
    if weight.dtype != x.dtype if packed is None else weight.is_floating_point():
        return None
    if linear_kind(module) == "conv1d":
        weight = weight.T
    junction = junction_of(module)
    change = MapChange() if junction is None else junction.change(module, x.device, weight if packed is None else None)
    if change is None:
        return None
    if packed is not None and bias is not None:
        bias = bias.to(x.dtype)
    for shift in change.shifts:
        bias = shift.to(x.dtype) if bias is None else bias + shift.to(bias.dtype)
    scaling = functools.reduce(torch.mul, change.scalings) if change.scalings else None
    return Map(weight if packed is None else packed, bias, _together(change.low) if change.low else None, scaling)


def _together(changes: Sequence[LowRank]) -> LowRank | None:
    """Several changes as one of their joint rank."""
    if len(changes) == 1:
        return changes[0]
    down = torch.cat([each.down for each in changes])
    up = torch.cat([each.scale * each.up for each in changes], dim=1)
    shifts = [each.scale * each.bias for each in changes if each.bias is not None]
    # Who makes one product of them must see that entries are dropped, by each for itself.
    dropout = max(each.dropout for each in changes)
    return LowRank(down, up, 1.0, dropout, torch.stack(shifts).sum(0) if shifts else None)


def _trains(x: Tensor) -> bool:
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.is_grad_enabled() and x.is_floating_point() and not cast


def _linear_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not (args or kwargs) and _trains(x):
        found = _map_at(module, x)
        junction = junction_of(module)
        # What scales the input has done so already.
        if found is not None and found.trains and junction is not None and not _drops_apart(junction):
            y = None
            if found.change is not None:
                y = low_rank_linear(x, found.weight, found.bias, found.change)
            elif isinstance(found.weight, Tensor):
                y = F.linear(x, found.weight, found.bias)
            if y is not None:
                junction.added()
                return y
    return type(module).forward(module, x, *args, **kwargs)


def _drops_apart(junction: Any) -> bool:
    """Whether several changes act of which one drops entries of its input: each has its own mask."""
    found = [delta.low_rank() for group in junction.plan() for delta, _ in group.adds]
    changes = [change for change in found if change is not None]
    return len(changes) > 1 and any(change.dropout for change in changes)


# --- feed-forward parts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FeedForwardPlan:
    """The names of a feed-forward part's maps, of its non-linearity, and of what may only do nothing there."""

    inner: tuple[str, ...]
    down: str
    activation: str
    idle: tuple[str, ...]
    recompute: bool


def _feed_forwards(
    modules: dict[str, nn.Module], roles: dict[str, Any], recompute: bool
) -> Iterator[tuple[str, _FeedForwardPlan]]:
    """The modules whose direct children are the maps of one feed-forward part, with a non-linearity."""
    for path, module in modules.items():
        lead = f"{path}." if path else ""
        named = {roles[lead + name]: name for name in module._modules if lead + name in roles}
        maps = {name for name, child in module._modules.items() if child is not None and linear_kind(child)}
        if "down" not in named or "up" not in named or maps != set(named.values()):
            continue
        if not all(_is_bare(module._modules[name]) for name in maps):
            continue
        others = {name: child for name, child in module._modules.items() if name not in maps and child is not None}
        idle = tuple(name for name, child in others.items() if isinstance(child, nn.Dropout))
        acting = [name for name in others if name not in idle]
        if not acting:  # a function kept as an attribute
            acting = [name for name, each in module.__dict__.items() if callable(each) and not name.startswith("_")]
        if len(acting) != 1 or (acting[0] in others and next(others[acting[0]].parameters(), None) is not None):
            continue
        inner = (named["gate"], named["up"]) if "gate" in named else (named["up"],)
        yield path, _FeedForwardPlan(inner, named["down"], acting[0], idle, recompute)


def _feed_forward_forward(module: nn.Module, plan: _FeedForwardPlan, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    around = [module._modules[name] for name in (*plan.idle, plan.activation) if name in module._modules]
    if not (args or kwargs) and _trains(x) and all(_does_nothing_else(each) for each in around):
        maps: list[Map] = []
        for name in (*plan.inner, plan.down):
            child = module._modules[name]
            assert child is not None
            junction = junction_of(child)
            apart = junction is not None and _drops_apart(junction)
            found = _map_at(child, x) if _is_unwatched(child) and not apart else None
            if found is None or not _fits_in(found, last=name == plan.down):
                break
            maps.append(found)
        else:
            activation: Any = getattr(module, plan.activation)
            if isinstance(activation, nn.Module):
                activation = activation.forward
            if x.requires_grad or any(each.trains for each in maps):
                return feed_forward(x, maps[:-1], maps[-1], activation, recompute=plan.recompute)
    return type(module).forward(module, x, *args, **kwargs)


def _fits_in(part: Map, *, last: bool) -> bool:
    """Whether the operation for feed-forward parts can do what acts at one of its maps."""
    change = part.change
    if part.scaling is not None and not last:
        return False
    if change is None:
        return True
    if change.bias is not None:
        return False
    # What a gain next to zero multiplied is not had from the product.
    return change.gain is None or last or change.gain.is_meta or float(change.gain.detach().abs().min()) > _LEAST_GAIN


def _does_nothing_else(module: Any) -> bool:
    """Whether a module without parameters may be left out, or called by its function alone: no adapter's place now."""
    junction = junction_of(module)
    if isinstance(module, nn.Dropout) and module.training and module.p:
        return False
    return _is_unwatched(module) and (
        junction is None or junction.change(module, torch.device("cpu"), None) == MapChange()
    )


def _is_unwatched(module: nn.Module) -> bool:
    """Whether nobody but a junction wants to know of the module's calls, so that they may be left out."""
    junction = junction_of(module)
    own = 0 if junction is None else junction.hooks
    return (
        len(module._forward_hooks) == len(module._forward_pre_hooks) == own
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


# --- norms ----------------------------------------------------------------------------------------------------------


@dataclass
class _NormPlan:
    """What a norm does: whether it takes the mean away, what it adds to its weight, and its epsilon."""

    centred: bool
    plus: float
    eps: float
    width: int
    #: The weight that was found fit to divide by, by what tells it apart.
    fit: tuple[int, int] | None = None


def _norm_of(module: nn.Module) -> _NormPlan | None:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    eps = next((getattr(module, name) for name in _EPSILON if isinstance(getattr(module, name, None), float)), None)
    if weight is None or weight.dim() != 1 or eps is None or module._modules:
        return None
    if len([each for each in module._parameters.values() if each is not None]) != 1 + (bias is not None):
        return None
    width = int(weight.shape[0])
    if weight.is_meta:
        return _NormPlan(isinstance(module, nn.LayerNorm), 0.0, float(eps), width)
    x = torch.linspace(-2, 3, 2 * width, device=weight.device).view(1, 2, width).sin().to(weight.dtype)
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
    except (RuntimeError, TypeError):
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    wide = x.double()
    for centred in (False, True):
        z = wide - wide.mean(-1, keepdim=True) if centred else wide
        z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
        for plus in (0.0, 1.0):
            h = z * (weight.double() + plus) + (0 if bias is None else bias.double())
            if bool((y.double() - h).norm() <= (1e-4 if y.dtype == torch.float32 else 2e-2) * h.norm()):
                return _NormPlan(centred, plus, float(eps), width)
    return None


def _norm_forward(module: nn.Module, plan: _NormPlan, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    if (
        not (args or kwargs)
        and x.requires_grad
        and _trains(x)
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and type(weight) is nn.Parameter  # no adapter's in its place
        and (bias is None or type(bias) is nn.Parameter)
        and _is_fit(plan, weight, bias)
    ):
        scale = weight + plan.plus if plan.plus else weight
        own = functools.partial(type(module).forward, module)
        return frozen_norm(x, own, scale, bias, plan.eps, plan.centred, native=not plan.plus)
    return type(module).forward(module, x, *args, **kwargs)


def _is_fit(plan: _NormPlan, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.is_meta:
        return True
    known = (weight.data_ptr(), weight._version)
    if plan.fit != known:
        plan.fit = known if invertible(weight + plan.plus, bias) else None
    return plan.fit == known
