"""The tree of a model's sites with roles and shapes, alike layers told once, and what a method would train of it.

The model is built on the meta device from its configuration: no weights are read or needed.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from graftlm.cli.output import harmless
from graftlm.cli.usage import UsageFault
from graftlm.core import Site, Survey, attach, survey
from graftlm.data.recognise import TASKS
from graftlm.data.wording import number
from graftlm.errors import Finding, GraftError, ModelError, nearest
from graftlm.methods import read_method
from graftlm.models import HEADS, bundled_base, head_of
from graftlm.quantisation.dynamic import multiplied_in_integers
from graftlm.quantisation.unpacking import unpacked_by

__all__ = ["describe_model", "show_model"]

_TASKS = ("auto", *TASKS)
_BYTES = 4  # of a number in an adapter file: float32, whatever the base's type


@dataclass
class _Node:
    """A module of the tree: its own parameters, and the modules inside; alike numbered neighbours share one node."""

    name: str
    path: str
    site: Site | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    inside: list[_Node] = field(default_factory=list)
    times: int = 1

    @property
    def form(self) -> object:
        """What two nodes share when they are alike, whatever their number."""
        site = self.site
        said = (site.role, site.kind, site.stack, site.in_features, site.out_features) if site else None
        return (said, tuple(self.shapes.items()), tuple((n.name, n.times, n.form) for n in self.inside))

    @property
    def size(self) -> int:
        """Numbers held in it, over all that it stands for; a tied tensor counts where it comes first."""
        own = sum(_product(shape) for name, shape in self.shapes.items() if name not in self.tied)
        return self.times * (own + sum(node.size for node in self.inside))

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "parameters": self.size}
        if self.times > 1:
            found["times"] = self.times
        if self.site is not None:
            found |= {"role": self.site.role, "kind": self.site.kind}
            if self.site.stack:
                found["stack"] = self.site.stack
        if self.shapes:
            found["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        if self.tied:
            found["tied"] = self.tied
        return found | ({"inside": [node.as_json() for node in self.inside]} if self.inside else {})


def describe_model(what: str, task: str = "auto", method: str | None = None) -> dict[str, Any]:
    """What there is to say of the model `what` (folder, hub id or "bundled"), as plain JSON.

    Raises:
        ModelError, MethodError, SiteError: no such model; a method that cannot be read or does not fit.
        UsageFault: an unknown task.
    """
    if task not in _TASKS:
        close = nearest(task, _TASKS, most=1)
        raise UsageFault(
            Finding("L103", f"no task {task!r}; there are {', '.join(_TASKS)}", fix="--task " + (close or ["lm"])[0])
        )
    chosen = read_method(method) if method is not None else None
    model = _on_meta(what, task)
    found = survey(model)
    root = _tree(model, found)
    described: dict[str, Any] = {
        "kind": "model",
        "name": what,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": found.layer_count,
        "roles_by": found.source,
        "roles": dict(Counter(site.role for site in found if site.role)),
        "tree": [node.as_json() for node in root.inside],
        "sites": [
            {"path": s.path, "role": s.role, "kind": s.kind, "layer": s.layer, "stack": s.stack,
             "in": s.in_features, "out": s.out_features}
            for s in found
        ],
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    described["four_bits"] = {"device": device, "unpacked_by": unpacked_by("nf4", device=device)}
    described["eight_bits"] = {"device": device, "in_integers": multiplied_in_integers(device)}
    if chosen is not None:
        described["method"] = _would_train(model, chosen, described["parameters"])
    return described


def show_model(found: Mapping[str, Any]) -> None:
    """Print what `describe_model` gave."""
    click.echo(
        f"{found['name']}  {found['class']}  {number(found['parameters'])} parameters  {found['layers']} layers  "
        f"(roles by {found['roles_by']})"
    )
    lines = [line for node in found["tree"] for line in _lines(node, 1)]
    wide = max((len(name) for name, *_ in lines), default=0)
    roles = max((len(role) for _, role, _, _ in lines), default=0)
    for name, role, shape, tied in lines:
        click.echo(harmless(f"{name:{wide}}  {role:{roles}}  {shape}{tied}".rstrip()))
    held = found["four_bits"]
    click.echo(f"\nwith --quantize nf4 its maps are unpacked by {held['unpacked_by']} here ({held['device']})")
    held = found["eight_bits"]
    manner = "whole numbers" if held["in_integers"] else "numbers, which is no faster,"
    click.echo(f"with --quantize int8-dynamic they are multiplied in {manner} here ({held['device']})")
    if method := found.get("method"):
        click.echo(
            f"\n{method['text']}  trains {number(method['parameters'])} numbers ({method['percent']:.3g} % of the "
            f"model), {_size(method['bytes'])} on disk"
        )
        for role, part in method["by_role"].items():
            click.echo(f"  {role}  {part['sites']} sites  {number(part['parameters'])}")


def _would_train(model: nn.Module, method: Any, whole: int) -> dict[str, Any]:
    roles = {site.path: site.role for site in survey(model)}
    adapter = attach(model, method)
    by_role: dict[str, dict[str, int]] = {}
    for part in adapter.parts:
        role = roles.get(part.site.path) or part.site.path.rpartition(".")[2]
        entry = by_role.setdefault(role, {"sites": 0, "parameters": 0})
        entry["sites"] += 1
        entry["parameters"] += sum(parameter.numel() for parameter in part.delta.parameters())
    count = adapter.parameter_count
    return {
        "text": str(method),
        "parameters": count,
        "percent": 100 * count / max(whole, 1),
        "bytes": count * _BYTES,
        "by_role": by_role,
    }


def _on_meta(what: str, task: str) -> nn.Module:
    """The model without weights: a folder's configuration is enough, and no code of the folder is run."""
    import transformers
    from transformers.utils import logging as transformers_logging

    where = str(bundled_base()) if what == "bundled" else str(Path(what).expanduser())
    local = Path(where).is_dir()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(where, local_files_only=local, trust_remote_code=False)
        kind = _class_for(config, task, transformers)
        with torch.device("meta"):
            model: nn.Module = kind.from_config(config)
    except OSError as error:
        if local:
            raise ModelError(Finding("M116", f"cannot read {what}: {_first_line(error)}")) from error
        message = f"{what!r} is no folder here, and the hub did not give it: {_first_line(error)}"
        raise ModelError(Finding("M117", message, fix="graftlm inspect FOLDER")) from error
    except GraftError:
        raise
    except Exception as error:  # a faulty configuration surfaces as many kinds of error
        raise ModelError(Finding("M116", f"cannot read the configuration of {what}: {_first_line(error)}")) from error
    finally:
        transformers_logging.set_verbosity(before)
    return model.eval()


def _class_for(config: Any, task: str, transformers: Any) -> Any:
    """The class that training would load for `task`; `auto` goes by what the architecture is made for."""

    def has(kind: Any) -> bool:
        return type(config) in kind._model_mapping

    causal, labels = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    both, encoder = transformers.AutoModelForSeq2SeqLM, has(transformers.AutoModelForMaskedLM)
    if task in ("lm", "sft"):
        order = [both if getattr(config, "is_encoder_decoder", False) else causal]
    elif task != "auto":
        order = [getattr(transformers, HEADS[head_of(task, config)])]
    elif getattr(config, "is_encoder_decoder", False):
        order = [both, transformers.AutoModel]
    else:
        order = [labels, causal] if encoder else [causal, labels]
        order.append(transformers.AutoModel)
    for kind in order:
        if has(kind):
            return kind
    raise ModelError(Finding("M113", f"{type(config).__name__} has no model for task {task}", fix="leave out --task"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _tree(model: nn.Module, found: Survey) -> _Node:
    """The modules that hold parameters, nested by path, alike numbered neighbours merged."""
    sites = {site.path: site for site in found}
    owners = {place: f"{site.path}.{site.parameter}" for site in found.parameters for place in site.aliases}
    root = _Node("", "")
    for path, module in model.named_modules():
        shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
        if not shapes:
            continue
        node = root
        for word in path.split("."):
            below = next((inner for inner in node.inside if inner.name == word), None)
            if below is None:
                below = _Node(word, f"{node.path}.{word}".lstrip("."))
                node.inside.append(below)
            node = below
        node.site, node.shapes = sites.get(path), shapes
        node.tied = {name: owners[path, name] for name in shapes if (path, name) in owners}
    _merge(root)
    return root


def _merge(node: _Node) -> None:
    """Numbered neighbours of the same form become one node, `0-11`."""
    merged: list[_Node] = []
    for inner in node.inside:
        _merge(inner)
        last = merged[-1] if merged else None
        if last and inner.name.isdigit() and last.name.partition("-")[0].isdigit() and last.form == inner.form:
            first = last.name.partition("-")[0]
            last.name, last.times = f"{first}-{inner.name}", last.times + 1
        else:
            merged.append(inner)
    node.inside = merged


def _lines(node: Mapping[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, role, shape and remark of a node and of those inside; a module with one inside shares its line."""
    name = f"{prefix}{node['name']}"
    inside = node.get("inside", [])
    if "shapes" not in node and (len(inside) == 1 or _all_numbered(inside)):
        for inner in inside:
            yield from _lines(inner, depth, f"{name}.")
        return
    role = node.get("role") or ""
    role = f"{node['stack']}/{role}" if role and node.get("stack") else role
    tied = "".join(f"  (is {owner})" for owner in node.get("tied", {}).values())
    times = node.get("times", 1)
    each = f"{times} x " if times > 1 else ""
    shape = _shape(node) if "shapes" in node else f"{each}{number(node['parameters'] // times)} parameters"
    yield "  " * depth + name, role, shape, tied
    for inner in inside:
        yield from _lines(inner, depth + 1)


def _all_numbered(nodes: list[Mapping[str, Any]]) -> bool:
    return bool(nodes) and all(re.fullmatch(r"\d+(-\d+)?", node["name"]) for node in nodes)


def _shape(node: Mapping[str, Any]) -> str:
    shapes = node["shapes"]
    kind = node.get("kind")
    weight = shapes.get("weight")
    if kind in ("linear", "conv1d") and weight and len(weight) == 2:
        width_in, width_out = (weight[1], weight[0]) if kind == "linear" else weight
        said = f"{width_in} -> {width_out}" + (" + bias" if "bias" in shapes else "")
        return said + (" (conv1d)" if kind == "conv1d" else "")
    if kind == "embedding" and weight:
        return f"{weight[0]} x {weight[1]}"
    if kind == "norm" and weight:
        return " x ".join(map(str, weight)) + (" + bias" if "bias" in shapes else "")
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for width in shape:
        size *= width
    return size


def _size(count_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} GB"
