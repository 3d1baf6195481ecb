"""Packages that count as installed: the metadata that pip would write beside a package's modules."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["installed", "installed_as_in"]

GROUP = "graftlm.methods"


def installed(folder: Path, name: str, points: Mapping[str, str], version: str = "0.1.0", group: str = GROUP) -> Path:
    """Make `folder`, once it is on the path, hold the package `name` with entry points (name to `module:attribute`)."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    return folder


def installed_as_in(project: Path, folder: Path) -> Path:
    """The same, by what the package's own `pyproject.toml` says."""
    told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    ((group, points),) = told["entry-points"].items()
    return installed(folder, told["name"], points, told["version"], group)
