"""Where a base model is: the folder or hub id that a name means, told without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from graftlm.errors import Finding, ModelError, nearest

__all__ = ["BUNDLED", "bundled_base", "resolve_base"]

#: The name of the base that ships with graftlm.
BUNDLED = "bundled"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def bundled_base() -> Path:
    """The folder of the bundled base model."""
    return Path(__file__).resolve().parent.parent / "bundled" / "base"


def resolve_base(name: str) -> str:
    """The folder or hub id that `name` means. Raises ModelError for a path that leads nowhere or to something else."""
    if name == BUNDLED:
        return str(bundled_base())
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path, name)
        return str(path)
    if path.is_file():
        raise ModelError(Finding("M101", f"{name} is a file; a model is a folder with config.json, or a hub id"))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or not _HUB_ID.fullmatch(name)
    if looks_local:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ModelError(
            Finding("M102", f"no model folder {name!r}", fix=f"-m {path.parent / close[0]}" if close else "-m bundled")
        )
    return name


def _check_folder(path: Path, name: str) -> None:
    if (path / "config.json").is_file():
        weights = [p.name for p in path.iterdir()]
        if not any(w.endswith(".safetensors") for w in weights):
            if any(w.endswith((".bin", ".pt", ".pth")) for w in weights):
                raise ModelError(
                    Finding("M103", f"{name} has pickled weights only; graftlm reads safetensors and unpickles nothing")
                )
            raise ModelError(Finding("M104", f"{name} has a config.json but no .safetensors weights"))
        return
    if (path / "adapter_config.json").is_file() or (path / "adapter").is_dir():
        inner = path if (path / "adapter_config.json").is_file() else path / "adapter"
        try:
            base = json.loads((inner / "adapter_config.json").read_text()).get("base_model_name_or_path")
        except (OSError, ValueError):
            base = None
        raise ModelError(
            Finding(
                "M105", f"{name} is an adapter, not a base model", fix=f"-m {base}" if base else "-m ITS_BASE_MODEL"
            )
        )
    raise ModelError(Finding("M106", f"{name} has no config.json: not a transformers model folder"))
