"""The survey of a model: which module plays which role, found by watching data flow and, failing that, by names.

For a transformers model the roles are read off the computation itself. A twin without storage (meta device) runs one
small batch through a probe attention function; every linear map is tagged with the autograd node of its output, and
walking the graph backwards tells what feeds what:

- query, key, value: the maps that reach those arguments of an attention call (one map for all three is `qkv`);
- output: the map that only an attention call feeds;
- down: a map fed only by other maps of its block's feed-forward part; those are its up and gate maps, the gate
  being the one that passes through the non-linearity (one map twice as wide as needed is `gate_up`).

The same run tells how each module's input is laid out (one entry a row, a token, or one for all), which routing needs.
Models that cannot run this way (own attention code, modules that read values) get their roles from module names.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.fused import gate_up_columns, qkv_columns
from graftlm.core.kind import is_encoder_decoder
from graftlm.core.sequence import takes
from graftlm.core.sites import Site, Survey, linear_kind, with_parameter

__all__ = ["survey"]

_PROBE = "graftlm_probe"
# Distinct sizes, so that a tensor's first dimension tells what it counts.
_ROWS, _TOKENS, _DECODER_TOKENS = 3, 5, 7
_NONLINEAR = re.compile(r"Silu|Gelu|Relu|Elu|Sigmoid|Tanh|Mish|Softplus|Hardswish|Hardtanh|Pow|Erf", re.IGNORECASE)

_BY_NAME = [
    ("qkv", r"(query_key_value|qkv|qkv_proj|c_attn|Wqkv|in_proj|W_pack|attn_qkv)"),
    ("query", r"(q_proj|query|q|wq|q_lin|query_proj|q_b_proj)"),
    ("key", r"(k_proj|key|k|wk|k_lin|key_proj)"),
    ("value", r"(v_proj|value|v|wv|v_lin|value_proj)"),
    ("gate_up", r"(gate_up_proj)"),
    ("gate", r"(gate_proj|w1|wi_0)"),
    ("up", r"(up_proj|w3|wi_1|wi|fc1|fc_in|c_fc|dense_h_to_4h|lin1|intermediate\.dense|linear1)"),
    (
        "down",
        r"(down_proj|w2|fc2|fc_out|dense_4h_to_h|lin2|(?<!attention\.)output\.dense|linear2|mlp\.c_proj|DenseReluDense\.wo)",
    ),
    ("output", r"(o_proj|out_proj|out_lin|wo|o|attention\.dense|attention\.output\.dense|attn\.c_proj|dense)"),
]

_cache: OrderedDict[tuple[type, str], _Flow | None] = OrderedDict()


def survey(model: nn.Module) -> Survey:
    """Every site of `model`, with roles. The model is only read; results are cached by class and configuration.

    Example:
        >>> from torch import nn
        >>> block = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 8)})
        >>> [(site.path, site.role) for site in survey(nn.ModuleList([block]))]
        [('0.q_proj', 'query'), ('0.up_proj', 'up')]
    """
    flow = _flow_of(model)
    by_flow = flow is not None and bool(flow.roles)
    modules = dict(model.named_modules())
    heads = _head_paths(model, modules)
    embeddings = _embedding_paths(model, modules, flow)
    two_stacks = is_encoder_decoder(model)

    sites: list[Site] = []
    owners: dict[str, Site] = {}
    layers: set[int] = set()
    for path, module in modules.items():
        kind = linear_kind(module)
        is_norm = "norm" in type(module).__name__.lower()
        if kind is None and not is_norm and not module._parameters:
            continue
        layer = _layer(path)
        in_head = any(path == head or path.startswith(head + ".") for head in heads)
        role: str | None
        if in_head:
            role = "head"
        elif path in embeddings:
            role = "embed"
        elif is_norm:
            role = "norm"
        elif kind in ("linear", "conv1d") and layer is not None:
            role = flow.roles.get(path) if flow and by_flow else _role_by_name(path)
        else:
            role = None
        if layer is not None and kind is not None and not in_head:
            layers.add(layer)
        stack = "cross" if two_stacks and flow and path in flow.cross else _stack_of(path, two_stacks)
        width_in, width_out = _widths(module, kind)
        site = Site(
            path=path,
            kind=kind or ("norm" if is_norm else "other"),
            role=role,
            layer=layer,
            stack=stack,
            rows=flow.rows.get(path, "unknown") if flow else "unknown",
            in_features=width_in,
            out_features=width_out,
        )
        owners[path] = site
        if kind is not None or is_norm:
            sites.append(site)

    return Survey(
        model_name=type(model).__name__,
        sites=tuple(sites),
        parameters=tuple(_parameter_sites(modules, owners)),
        layer_count=max(layers, default=-1) + 1,
        source="data flow" if by_flow else "names",
        rows=flow.rows if flow else {},
        slices=tuple(_slices(sites, flow)),
        branches=tuple(_branches(sites, flow if by_flow else None, two_stacks)),
        attentions=tuple(_attentions(flow, two_stacks)),
        sequences=tuple(_sequences(model, modules, flow, two_stacks)),
    )


def _stack_of(path: str, two_stacks: bool) -> str:
    return next((s for s in ("encoder", "decoder") if s in path.split(".")), "") if two_stacks else ""


def _slices(sites: list[Site], flow: _Flow | None) -> Iterator[Site]:
    """The parts of fused maps, as sites of their own."""
    for site in sites:
        for part, columns in (flow.columns.get(site.path, {}) if flow else {}).items():
            width = sum(stop - start for start, stop in columns)
            yield replace(site, role=part, part=part, columns=columns, out_features=width)


def _branches(sites: list[Site], flow: _Flow | None, two_stacks: bool) -> Iterator[Site]:
    """Where sublayers add to the residual stream, in the order of the modules."""
    if flow is None:
        # By names: a sublayer begins at its first map and ends at its last.
        for ending, role, beginnings in (("output", "attention", ("qkv", "query")), ("down", "ffn", ("gate_up", "up"))):
            for site in sites:
                first = next((s for s in sites if s.layer == site.layer and s.role in beginnings), None)
                if site.role == ending and first is not None:
                    yield replace(site, kind="sublayer", role=role, entry=first.path, in_features=first.in_features)
        return
    for found in flow.sublayers:
        layer, stack = _layer(found.exit), _stack_of(found.exit, two_stacks)
        if found.role == "cross":
            stack = "cross"
        yield Site(
            found.exit, "sublayer", found.role, layer, stack, flow.rows.get(found.exit, "unknown"), found.width_in,
            found.width, entry=found.entry,
        )  # fmt: skip
        if found.stream:
            path, how = found.stream
            yield Site(
                path, "stream", found.role, layer, stack, flow.rows.get(path, "unknown"), found.width, found.width,
                entry=how,
            )  # fmt: skip


def _attentions(flow: _Flow | None, two_stacks: bool) -> Iterator[Site]:
    for call in flow.attentions if flow else ():
        yield Site(
            path=call.path,
            kind="attention",
            role="cross" if call.cross else "attention",
            layer=_layer(call.path),
            stack="cross" if call.cross else _stack_of(call.path, two_stacks),
            rows=flow.rows.get(call.path, "unknown") if flow else "unknown",
            in_features=call.width,
            out_features=call.width,
            heads=call.heads,
            kv_heads=call.kv_heads,
            head_width=call.head_width,
            causal=call.causal,
        )


def _sequences(model: nn.Module, modules: dict[str, nn.Module], flow: _Flow | None, two_stacks: bool) -> Iterator[Site]:
    """Where embeddings enter a stack: the backbone, or the encoder and the decoder."""
    table = _call(model, "get_input_embeddings")
    if not isinstance(table, nn.Embedding):
        return
    stacks: list[tuple[str, Any]] = [("", getattr(model, "base_model", model))]
    if two_stacks:
        stacks = [(stack, _call(model, f"get_{stack}")) for stack in ("encoder", "decoder")]
    for stack, module in stacks:
        path = _path_of(modules, module)
        if path is None:
            continue
        # The innermost that is called: a causal OPT calls its backbone's decoder and never the backbone.
        inner = [
            name
            for name, each in modules.items()
            if (name == path or name.startswith(f"{path}." if path else ""))
            and (flow is None or name in flow.rows)
            and takes(each, "inputs_embeds")
            and takes(each, "attention_mask")
        ]
        if not inner:
            continue
        path = max(inner, key=lambda name: name.count(".") + bool(name))
        calls = [call.causal for call in flow.attentions if not call.cross] if flow else []
        causal = (stack == "decoder") if two_stacks else (any(calls) if calls else bool(_call(model, "can_generate")))
        yield Site(
            path, "sequence", "embed", None, stack, "batch", table.embedding_dim, table.embedding_dim, causal=causal
        )


def _parameter_sites(modules: dict[str, nn.Module], owners: dict[str, Site]) -> Iterable[Site]:
    places: dict[int, list[tuple[str, str]]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((path, name))
    for first, *others in places.values():
        path, name = first
        site = with_parameter(owners[path], name, tuple(others))
        yield _experts(site, modules[path]) if site.kind == "other" else site


def _experts(site: Site, module: nn.Module) -> Site:
    """`site` as one of kind `experts`, with the widths of an expert, where its parameter is a stack of maps."""
    parameter = module._parameters[site.parameter or ""]
    if parameter is None or parameter.dim() != 3 or parameter.shape[0] < 2 or hasattr(module, "kernel_size"):
        return site
    width_out, width_in = (int(width) for width in parameter.shape[1:])
    if getattr(module, "is_transposed", False):
        width_out, width_in = width_in, width_out
    return replace(site, kind="experts", in_features=width_in, out_features=width_out)


def _widths(module: nn.Module, kind: str | None) -> tuple[int, int]:
    if kind == "linear":
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if kind == "conv1d":
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight = module._parameters.get("weight")
    return (int(weight.shape[-1]), int(weight.shape[-1])) if weight is not None and weight.dim() else (0, 0)


def _layer(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _call(model: nn.Module, name: str) -> Any:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _path_of(modules: dict[str, nn.Module], wanted: Any) -> str | None:
    return next((path for path, module in modules.items() if module is wanted), None) if wanted is not None else None


def _embedding_paths(model: nn.Module, modules: dict[str, nn.Module], flow: _Flow | None) -> set[str]:
    """The input embedding; where it is only a store that others share (T5, BART), the modules that are called."""
    store = _call(model, "get_input_embeddings")
    paths = {path for path, module in modules.items() if module is store}
    if flow and not paths & flow.rows.keys():
        paths = {
            path
            for path, module in modules.items()
            if path in flow.rows and isinstance(module, nn.Embedding) and module.weight is store.weight
        }
    return paths


def _head_paths(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Modules beside the backbone that hold parameters; for a model that is all backbone, its output embedding."""
    backbone = getattr(model, "base_model", model)
    if backbone is not model:
        return [
            name
            for name, child in model.named_children()
            if child is not backbone and any(True for _ in child.parameters())
        ]
    path = _path_of(modules, _call(model, "get_output_embeddings"))
    return [path] if path else []


def _role_by_name(path: str) -> str | None:
    return next((role for role, pattern in _BY_NAME if re.search(rf"(^|\.){pattern}$", path)), None)


# --- data flow ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """One attention call."""

    path: str
    cross: bool
    heads: int
    kv_heads: int
    head_width: int
    width: int
    causal: bool


@dataclass(frozen=True)
class _Sublayer:
    """One sublayer: where its input is read, what it adds, and where the stream stands after the add."""

    role: str
    entry: str
    exit: str
    width_in: int
    width: int
    stream: tuple[str, str] | None


class _Flow:
    """What one run of the twin showed: roles and row layouts by module path, and the cross-attention maps."""

    def __init__(self) -> None:
        self.roles: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        self.cross: set[str] = set()
        self.attentions: list[_Attention] = []
        self.sublayers: list[_Sublayer] = []
        #: Output columns of the parts of fused maps: path -> part -> (start, stop) ranges.
        self.columns: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {}


def _flow_of(model: nn.Module) -> _Flow | None:
    transformers = sys.modules.get("transformers")  # a transformers model cannot exist without it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    key = (type(model), model.config.to_json_string(use_diff=False))
    if key not in _cache:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                _cache[key] = _watch(_twin(model))
        except Exception:  # any model code may refuse to run without values: names are the fallback
            _cache[key] = None
        while len(_cache) > 32:
            _cache.popitem(last=False)
    return _cache[key]


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Stands in for attention: right shape, gradient from all three arguments, and a record of the call."""
    groups = query.shape[1] // value.shape[1]
    wide = value.repeat_interleave(groups, dim=1).mean(2, keepdim=True)
    wide_key = key.repeat_interleave(groups, dim=1).mean((2, 3), keepdim=True)
    out = (query.mean(-1, keepdim=True) * wide * wide_key).transpose(1, 2).contiguous()
    module.__dict__["_graftlm_calls"].append((query, key, value, out))
    return out, None


def _twin(model: Any) -> Any:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_PROBE, _probe_attention)
    AttentionMaskInterface.register(_PROBE, lambda *_, **__: None)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        twin = type(model)._from_config(config, attn_implementation=_PROBE, dtype=torch.float32)
    torch.random.set_rng_state(state)
    return twin.train(False).requires_grad_(True)


def _watch(twin: Any) -> _Flow:
    flow = _Flow()
    linears: dict[str, tuple[Tensor, Tensor]] = {}
    calls: dict[str, _Call] = {}
    attentions: list[tuple[str, Tensor, Tensor, Tensor, Tensor]] = []
    paths = {module: path for path, module in twin.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None:
            return
        path = paths[module]
        y = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(y, Tensor):
            calls.setdefault(path, _Call(module, args, kwargs, x, y))
        layout = _layout(x)
        if isinstance(output, Tensor) and _layout(output) not in (layout, "broadcast"):
            layout = "unknown"
        flow.rows[path] = layout if flow.rows.get(path, layout) == layout else "unknown"
        if linear_kind(module) in ("linear", "conv1d") and isinstance(output, Tensor):
            linears[path] = (x, output)

    for module in twin.modules():
        module.__dict__["_graftlm_calls"] = []
        if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
            # Experts (3-D parameters) pick tokens by value, which a meta tensor lacks.
            module.forward = lambda hidden, *_, **__: hidden * 1.0
        module.register_forward_hook(note, with_kwargs=True)

    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.long, device="meta")
    # With a mask given, no model looks into the ids for packed documents.
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(twin):
        inputs["decoder_input_ids"] = torch.zeros(_ROWS, _DECODER_TOKENS, dtype=torch.long, device="meta")
    if hasattr(twin, "generate"):
        inputs["use_cache"] = False
    result = twin(**inputs)
    for module, path in paths.items():
        attentions += [(path, *call) for call in module.__dict__["_graftlm_calls"]]
    if attentions:  # else the model has attention code of its own: names tell the roles
        _assign(flow, linears, attentions)
        _find_attentions(flow, attentions, calls)
        _find_sublayers(flow, linears, attentions, calls, dict(twin.named_modules()))
        _find_columns(flow, calls, dict(twin.named_modules()))
    del result
    return flow


@dataclass(frozen=True)
class _Call:
    """One call of a module: its arguments, its first tensor, and its (first) output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    y: Tensor


def _find_attentions(
    flow: _Flow, attentions: list[tuple[str, Tensor, Tensor, Tensor, Tensor]], calls: dict[str, _Call]
) -> None:
    for path, query, key, value, _ in attentions:
        if path not in calls or key.shape[-1] != value.shape[-1]:
            continue  # keys and values of different widths have no prefix of one width
        cross = any(name.startswith(f"{path}.") for name in flow.cross)
        causal = bool(getattr(calls[path].module, "is_causal", True)) and not cross
        width = int(calls[path].x.shape[-1])
        flow.attentions.append(
            _Attention(path, cross, int(query.shape[1]), int(key.shape[1]), int(key.shape[-1]), width, causal)
        )


def _find_sublayers(
    flow: _Flow,
    linears: dict[str, tuple[Tensor, Tensor]],
    attentions: list[tuple[str, Tensor, Tensor, Tensor, Tensor]],
    calls: dict[str, _Call],
    modules: dict[str, nn.Module],
) -> None:
    tags: dict[Any, str] = {output.grad_fn: path for path, (_, output) in linears.items()}
    tags.update({out.grad_fn: f"@{path}" for path, *_, out in attentions})
    outputs = {path: _sources(x, tags) for path, (x, _) in linears.items() if flow.roles.get(path) == "output"}
    for attention, query, *_ in attentions:
        last = next((path for path, sources in outputs.items() if f"@{attention}" in sources), None)
        first = next((p for p in _sources(query, tags) if not p.startswith("@")), None)
        if last is None or first is None:
            continue
        role = "cross" if first in flow.cross else "attention"
        _add_sublayer(flow, role, first, last, calls)
    experts = {
        path.rpartition(".")[0]
        for path, module in modules.items()
        if any(p is not None and p.dim() == 3 for p in module._parameters.values())
    }
    experts = {path for path in experts if path and not path.rpartition(".")[2].isdigit() and path in calls}
    for path in sorted(experts, key=list(modules).index):
        _add_sublayer(flow, "ffn", path, path, calls)
    for path, role in list(flow.roles.items()):
        if role != "down" or any(path.startswith(f"{block}.") for block in experts):
            continue
        first = next((p for p in _sources(linears[path][0], tags) if flow.roles.get(p) in ("up", "gate_up")), None)
        if first is not None:
            _add_sublayer(flow, "ffn", first, path, calls)
    order = {path: number for number, path in enumerate(modules)}
    flow.sublayers.sort(key=lambda found: order[found.exit])


def _add_sublayer(flow: _Flow, role: str, entry: str, last: str, calls: dict[str, _Call]) -> None:
    """Follow the output of `last` through dropout and norm to what is added to the stream, and find the stream."""
    end, y = last, calls[last].y
    while True:
        behind = next(
            (
                path
                for path, call in calls.items()
                if path != end
                and call.x.grad_fn is y.grad_fn
                and not path.startswith(f"{end}.")
                and (isinstance(call.module, nn.Dropout) or "norm" in type(call.module).__name__.lower())
            ),
            None,
        )
        if behind is None or (calls[behind].y is y and behind == end):
            break
        if calls[behind].y.grad_fn is y.grad_fn and calls[end].y.grad_fn is y.grad_fn and end != last:
            break  # a second dropout on the very same tensor
        end, y = behind, calls[behind].y
    stream: tuple[str, str] | None = None
    if role == "ffn":
        for path, call in calls.items():
            is_norm = "norm" in type(call.module).__name__.lower()
            if is_norm and call.x.grad_fn is not y.grad_fn and _adds(call.x.grad_fn, y.grad_fn):
                if path.startswith(_block(last) + "."):
                    stream = (path, "norm")
                break
        block = _block(last)
        if stream is None and block in calls and _adds(calls[block].y.grad_fn, y.grad_fn):
            stream = (block, "output")
    width_in = int(calls[entry].x.shape[-1])
    flow.sublayers.append(_Sublayer(role, entry, end, width_in, int(y.shape[-1]), stream))


def _block(path: str) -> str:
    """The block that holds the module at `path`: up to and with its number."""
    words = path.split(".")
    place = next((n for n, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return ".".join(words[: place + 1])


def _adds(node: Any, wanted: Any, depth: int = 4) -> bool:
    """Whether `node` adds `wanted` to something."""
    while node is not None and "View" in node.name():  # OPT flattens tokens and folds them back behind the add
        node = node.next_functions[0][0]
    if node is None or depth == 0 or not node.name().startswith("Add"):
        return False
    parents = [parent for parent, _ in node.next_functions]
    return any(parent is wanted for parent in parents) or any(_adds(parent, wanted, depth - 1) for parent in parents)


def _find_columns(flow: _Flow, calls: dict[str, _Call], modules: dict[str, nn.Module]) -> None:
    """The parts of fused maps; found once for each kind of module, since a model's blocks are alike."""
    known: dict[tuple[Any, ...], dict[str, tuple[tuple[int, int], ...]]] = {}
    for path, role in flow.roles.items():
        if role not in ("qkv", "gate_up"):
            continue
        if role == "qkv":
            found = next((c for c in flow.attentions if path.startswith(f"{c.path}.")), None)
            owner, shape = (found.path, (found.heads, found.kv_heads)) if found else (None, ())
        else:
            owner, shape = path.rpartition(".")[0], ()
        if owner is None or owner not in calls:
            continue
        call, fused = calls[owner], modules[path]
        width = int(calls[path].y.shape[-1])
        key = (type(call.module), role, width, *shape)
        if key not in known:
            known[key] = {}
            with contextlib.suppress(Exception):  # any model code may refuse: the map is then adapted as a whole only
                if role == "qkv":
                    known[key] = qkv_columns(call.module, fused, call.args, call.kwargs)
                else:
                    down = next(m for p, m in modules.items() if flow.roles.get(p) == "down" and _parent(p) == owner)
                    known[key] = gate_up_columns(call.module, fused, down, call.args, call.kwargs)
        if known[key]:
            flow.columns[path] = known[key]


def _layout(x: Tensor) -> str:
    if x.dim() == 0:
        return "unknown"
    layouts = {_ROWS: "batch", 1: "broadcast", _ROWS * _TOKENS: "tokens", _ROWS * _DECODER_TOKENS: "tokens"}
    return layouts.get(x.shape[0], "unknown")


def _assign(
    flow: _Flow,
    linears: dict[str, tuple[Tensor, Tensor]],
    attentions: list[tuple[str, Tensor, Tensor, Tensor, Tensor]],
) -> None:
    tags: dict[Any, str] = {output.grad_fn: path for path, (_, output) in linears.items()}
    tags.update({out.grad_fn: f"@{path}" for path, _, _, _, out in attentions})

    for _path, query, key, value, _out in attentions:
        reached = {name: _sources(tensor, tags) for name, tensor in (("query", query), ("key", key), ("value", value))}
        own = {name: {p for p in found if not p.startswith("@")} for name, found in reached.items()}
        for name, found in own.items():
            for path in found:
                shared = [n for n in own if path in own[n]]
                flow.roles[path] = "qkv" if len(shared) == 3 else (name if len(shared) == 1 else "qkv")
        queries, keys = own["query"], own["key"]
        if queries and keys and not (queries & keys):
            q_in, k_in = linears[next(iter(queries))][0], linears[next(iter(keys))][0]
            if q_in.grad_fn is not k_in.grad_fn and q_in.shape[1:2] != k_in.shape[1:2]:
                flow.cross |= queries | keys | own["value"]

    fed: dict[str, dict[str, bool]] = {path: _sources(x, tags) for path, (x, _) in linears.items()}
    for path, sources in fed.items():
        if path not in flow.roles and sources and all(s.startswith("@") for s in sources):
            flow.roles[path] = "output"
            if flow.cross and any(paths_q.startswith(_parent(path) + ".") for paths_q in flow.cross):
                flow.cross.add(path)
    for path, sources in fed.items():
        layer = _layer(path)
        candidates = {s for s in sources if s not in flow.roles and not s.startswith("@") and _layer(s) == layer}
        if path in flow.roles or layer is None or not sources or candidates != set(sources):
            continue
        flow.roles[path] = "down"
        width = linears[path][0].shape[-1]
        for source in candidates:
            activated = sources[source]
            if len(candidates) == 1:
                flow.roles[source] = "gate_up" if linears[source][1].shape[-1] == 2 * width else "up"
            else:
                flow.roles[source] = "gate" if activated else "up"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _sources(tensor: Tensor, tags: dict[Any, str]) -> dict[str, bool]:
    """The tagged nodes that `tensor` is computed from directly; True where a non-linearity lies between."""
    found: dict[str, bool] = {}
    seen: set[tuple[Any, bool]] = set()
    stack = [(tensor.grad_fn, False)]
    while stack:
        node, bent = stack.pop()
        if node is None or (node, bent) in seen:
            continue
        seen.add((node, bent))
        if node in tags:
            found[tags[node]] = found.get(tags[node], False) or bent
            continue
        bent = bent or bool(_NONLINEAR.search(node.name()))
        stack += [(parent, bent) for parent, _ in node.next_functions]
    return found
