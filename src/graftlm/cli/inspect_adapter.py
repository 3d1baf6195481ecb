"""What an adapter on disk is: its method, its base, its tensors with their norms, and whether they are as written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from graftlm.cli.output import harmless, print_table
from graftlm.data.wording import number
from graftlm.errors import AdapterError, Finding, GraftError

__all__ = ["describe_adapter", "show_adapter"]

_NUMBER = re.compile(r"\.\d+\.")


def describe_adapter(path: Path, model: str | None = None) -> tuple[dict[str, Any], GraftError | None]:
    """What there is to say of the adapter in `path` (a run's folder or its own) as plain JSON, and what is damaged.

    With a `model`, also whether the adapter fits it: both are loaded and compared as for use.

    Raises AdapterError where its files cannot be read.
    """
    from graftlm.formats import read_facts

    folder = path if (path / "adapter_config.json").is_file() else path / "adapter"
    facts = read_facts(folder)  # refuses what a newer graftlm wrote
    config = _read_json(folder / "adapter_config.json")
    ours = _read_json(folder / "graftlm.json") if (folder / "graftlm.json").is_file() else {}
    base, method = ours.get("base", {}), ours.get("method", {})
    tensors = _tensors(folder)
    faults = _changed(folder, tensors, ours["tensors"]) if ours else []
    found = {
        "kind": "adapter",
        "folder": str(folder),
        "method": method.get("text") or config.get("peft_type"),
        "base": facts.get("base") or base.get("name") or config.get("base_model_name_or_path"),
        "base_class": base.get("class"),
        "fingerprint": base.get("fingerprint"),
        "task": facts.get("task") or config.get("task_type"),
        "labels": (facts.get("labels") or {}).get("names"),
        "max_length": facts.get("max_length"),
        "parameters": sum(tensor["size"] for tensor in tensors),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "checksums_ok": not faults if ours else None,
        "tensors": tensors,
    }
    if folder != path and (path / "run.json").is_file():
        record = _read_json(path / "run.json")
        found["run"] = {
            "status": record.get("status"),
            "started": record.get("started"),
            "command": record.get("command"),
            "data": record.get("data", {}).get("line"),
            "steps": record.get("steps"),
            "scores": record.get("results", {}).get("scores", []),
        }
    if model is None or faults:
        return found, AdapterError(faults) if faults else None
    from graftlm.training import open_adapter

    try:
        open_adapter(folder, base=model)
    except GraftError as error:
        return found | {"fits": {model: False}}, error
    return found | {"fits": {model: True}}, None


def show_adapter(found: Mapping[str, Any]) -> None:
    """Print what `describe_adapter` gave; tensors that differ by their layer only share a line."""
    checksums = {True: "ok", False: "wrong", None: "none kept: not written by graftlm"}[found["checksums_ok"]]
    base = " ".join(str(word) for word in (found["base"], found["base_class"]) if word)
    said = {
        "adapter": found["folder"],
        "method": found["method"],
        "base": base + (f"  fingerprint {found['fingerprint']}" if found["fingerprint"] else ""),
        "task": found["task"],
        "labels": ", ".join(found["labels"]) if found["labels"] else None,
        "holds": f"{number(found['parameters'])} numbers in {len(found['tensors'])} tensors, "
        f"{number(found['bytes'])} bytes",
        "checksums": checksums,
    }
    if run := found.get("run"):
        for at, score in enumerate(run["scores"]):
            told = {key: value for key, value in score.items() if isinstance(value, float)}
            figures = "  ".join(f"{key} {value:.3f}" for key, value in list(told.items())[:3])
            said["scores" if not at else f"score {at + 1}"] = f"{score.get('title', score.get('name', ''))}: {figures}"
        said |= {name: run[name] for name in ("status", "started", "command", "data", "steps")}
    for base, fits in found.get("fits", {}).items():
        said["fits"] = f"{base}: {'yes' if fits else 'no'}"
    for name, value in said.items():
        if value is not None:
            click.echo(harmless(f"{name:10} {value}"))
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for tensor in found["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "one number"
        groups.setdefault((_NUMBER.sub(".*.", tensor["name"], 1), shape, tensor["dtype"]), []).append(tensor)
    rows = []
    for (name, shape, kind), tensors in groups.items():
        norms = sorted(
            {f"{tensor['norm']:.4g}" for tensor in (min(tensors, key=_norm), max(tensors, key=_norm))}, key=float
        )
        alone = len(tensors) == 1
        rows.append(
            (tensors[0]["name"] if alone else name, "" if alone else len(tensors), shape, kind, " to ".join(norms))
        )
    click.echo()
    print_table(["tensor", "times", "shape", "type", "norm"], rows, right=(1,))


def _norm(tensor: Mapping[str, Any]) -> float:
    return float(tensor["norm"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(Finding("A204", f"cannot be read ({type(error).__name__})", place=str(path))) from None
    if not isinstance(found, dict):
        raise AdapterError(Finding("A204", "is not a JSON object", place=str(path)))
    return found


def _tensors(folder: Path) -> list[dict[str, Any]]:
    """Every tensor of the adapter's file with shape, type, Euclidean norm and checksum."""
    import torch
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    found: list[dict[str, Any]] = []
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                tensor = opened.get_tensor(name)
                found.append({
                    "name": name,
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "size": tensor.numel(),
                    "norm": float(tensor.float().norm()),
                    "sha256": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
                })  # fmt: skip
    except FileNotFoundError:
        pickled = "; its .bin file is pickled, and graftlm unpickles nothing" if any(folder.glob("*.bin")) else ""
        raise AdapterError(Finding("A207", f"is missing{pickled}", place=str(file))) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(Finding("A207", f"is damaged or cut short: {error}", place=str(file))) from None
    return found


def _changed(folder: Path, tensors: list[dict[str, Any]], kept: Mapping[str, str]) -> list[Finding]:
    """Tensors that are not those that were written."""
    now = {tensor["name"]: tensor["sha256"] for tensor in tensors}
    place = str(folder)
    faults = [Finding("A208", f"{name} is missing", place) for name in kept if name not in now]
    faults += [Finding("A209", f"{name} was not written by graftlm", place) for name in now if name not in kept]
    changed = [name for name in now if name in kept and now[name] != kept[name]]
    return faults + [Finding("A212", f"{name} was changed (its checksum differs)", place) for name in changed]
