"""What an adapter on disk is: its method, its base, its tensors with their norms, and whether its files are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from graftlm.cli.output import harmless, print_table
from graftlm.errors import AdapterError, Finding, GraftError

__all__ = ["describe_adapter", "show_adapter"]

_SHOWN = 60  # tensors in the table; JSON has all


def describe_adapter(path: Path) -> dict[str, Any]:
    """What there is to say of the adapter in `path` (a run's folder or its own), as plain JSON.

    Raises AdapterError where its files cannot be read.
    """
    folder = path if (path / "adapter_config.json").is_file() else path / "adapter"
    from graftlm.formats import check_manifest, read_facts

    facts = dict(read_facts(folder))
    config = _read_json(folder / "adapter_config.json")
    faults = [str(finding) for finding in check_manifest(folder)] if (folder / "manifest.json").is_file() else None
    tensors = _tensors(folder)
    return {
        "kind": "adapter",
        "folder": str(folder),
        "method": facts.get("method") or config.get("peft_type"),
        "base": facts.get("base") or config.get("base_model_name_or_path"),
        "fingerprint": facts.get("fingerprint"),
        "task": facts.get("task") or config.get("task_type"),
        "labels": (facts.get("labels") or {}).get("names"),
        "parameters": sum(tensor["size"] for tensor in tensors),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "checksums": None if faults is None else not faults,
        "faults": faults or [],
        "tensors": tensors,
        "facts": facts,
    }


def show_adapter(found: Mapping[str, Any]) -> None:
    """Print what `describe_adapter` gave."""
    checksums = {True: "ok", False: "DAMAGED", None: "none kept"}[found["checksums"]]
    said = {
        "adapter": found["folder"],
        "method": found["method"],
        "base": found["base"],
        "fingerprint": found["fingerprint"],
        "task": found["task"],
        "labels": ", ".join(found["labels"]) if found["labels"] else None,
        "holds": f"{found['parameters']:,} numbers in {len(found['tensors'])} tensors".replace(",", " "),
        "checksums": checksums,
    }
    for name, value in said.items():
        if value is not None:
            click.echo(harmless(f"{name:12}{_text(value)}"))
    for fault in found["faults"]:
        click.echo(harmless(f"  {fault}"))
    click.echo()
    rows = [
        (t["name"], " x ".join(map(str, t["shape"])) or "one number", t["dtype"], f"{t['norm']:.4g}")
        for t in found["tensors"][:_SHOWN]
    ]
    print_table(["tensor", "shape", "type", "norm"], rows, right=(3,))
    if (more := len(found["tensors"]) - _SHOWN) > 0:
        click.echo(f"and {more} more (--json has all)")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(Finding("A211", f"cannot be read ({type(error).__name__})", place=str(path))) from None
    if not isinstance(found, dict):
        raise AdapterError(Finding("A211", "is not a JSON object", place=str(path)))
    return found


def _tensors(folder: Path) -> list[dict[str, Any]]:
    """Every tensor of the adapter's safetensors files with shape, type and Euclidean norm."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        why = f"; {pickled[0]} is pickled, and graftlm unpickles nothing" if pickled else ""
        raise AdapterError(Finding("A212", f"there is no .safetensors file in {folder}{why}"))
    found: list[dict[str, Any]] = []
    for file in files:
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
                    })  # fmt: skip
        except (SafetensorError, OSError, GraftError) as error:
            raise AdapterError(Finding("A213", f"cannot be read: {error}", place=str(file))) from None
    return found
