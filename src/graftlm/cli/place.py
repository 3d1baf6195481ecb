"""What a word on the command line points at: a base model, a trained adapter or a data file; told without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from graftlm.cli.usage import UsageFault
from graftlm.errors import Finding, nearest

__all__ = ["BUNDLED_DATA", "is_adapter", "is_model", "kind_of", "must_be_adapter"]

Kind = Literal["adapter", "data", "model"]

BUNDLED_DATA = {"bundled:messages": "messages.csv", "bundled:answers": "answers.jsonl"}
"""Names of the data sets that come with graftlm, each with its file."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DATA_ENDINGS = (".csv", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".tab", ".tsv", ".txt")
_SAID = 4  # names of neighbours in a message


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is an adapter, or a run with one."""
    return (folder / "adapter_config.json").is_file() or (folder / "adapter" / "adapter_config.json").is_file()


def is_model(folder: Path) -> bool:
    """Whether `folder` is a base model."""
    return (folder / "config.json").is_file() and not is_adapter(folder)


def kind_of(what: str, *, data: bool = False) -> Kind:
    """What `what` is: a folder by its files, a name by its form; `data` says whether a data file will do.

    Raises:
        UsageFault: nothing is there, or something else; with the nearest names.

    Example:
        >>> kind_of("bundled"), kind_of("bundled:answers", data=True)
        ('model', 'data')
    """
    wanted = "a model folder, a hub id, a run" + (" or a data file" if data else "")
    if what == "bundled":
        return "model"
    if data and what in BUNDLED_DATA:
        return "data"
    path = Path(what).expanduser()
    if path.is_file():
        if data and path.suffix != ".safetensors":
            return "data"
        folder = path.parent if is_adapter(path.parent) or is_model(path.parent) else None
        raise UsageFault(Finding("L104", f"{what} is a file; wanted {wanted}", fix=str(folder) if folder else ""))
    if path.is_dir():
        if is_adapter(path):
            return "adapter"
        if is_model(path):
            return "model"
        raise UsageFault(_empty_folder(what, path, wanted))
    names = ["bundled", *(BUNDLED_DATA if data else ())]
    if what.startswith("bund") and (close := nearest(what, names, most=1)):
        raise UsageFault(Finding("L104", f"there is no {what!r}. Did you mean {close[0]}?", fix=close[0]))
    if nearest(path.suffix, _DATA_ENDINGS):
        if data:
            return "data"  # reading it will name the file that was meant
        raise UsageFault(Finding("L104", f"{what} is a data file; wanted {wanted}"))
    looks_local = what.startswith((".", "/", "~", "runs/")) or not _HUB_ID.fullmatch(what)
    if looks_local or (path.parent != Path() and path.parent.is_dir()):
        raise UsageFault(_nothing_there(what, path, lambda folder: is_adapter(folder) or is_model(folder)))
    return "model"


def must_be_adapter(what: str) -> Path:
    """The folder of a run or an adapter. Raises UsageFault with the nearest ones."""
    path = Path(what).expanduser()
    if path.is_dir() and is_adapter(path):
        return path
    if what == "bundled" or (path.is_dir() and is_model(path)):
        raise UsageFault(Finding("L104", f"{what} is a base model; wanted a run or an adapter", fix="graftlm train"))
    if path.is_dir():
        raise UsageFault(_empty_folder(what, path, "a run or an adapter"))
    if path.is_file():
        fix = next((str(folder) for folder in path.parents[:2] if is_adapter(folder)), "")
        raise UsageFault(Finding("L104", f"{what} is a file; wanted the folder of a run or an adapter", fix=fix))
    raise UsageFault(_nothing_there(what, path, is_adapter))


def _empty_folder(what: str, path: Path, wanted: str) -> Finding:
    if (path / "run.json").is_file():
        fix = f"graftlm train --resume -o {what}"
        return Finding("L104", f"the run {what} has no adapter yet: it was stopped before its first save", fix=fix)
    inside = _names(folder for folder in sorted(path.iterdir()) if folder.is_dir() and is_adapter(folder))
    said = f"; it has {', '.join(inside[:_SAID])}" if inside else ""
    return Finding("L104", f"{what} is a folder, but not {wanted}{said}", fix=inside[-1] if inside else "")


def _nothing_there(what: str, path: Path, fits: Callable[[Path], bool]) -> Finding:
    beside = [folder for folder in (path.parent, Path("runs")) if folder.is_dir()]
    names = _names(f for parent in beside for f in sorted(parent.iterdir()) if f.is_dir() and fits(f))
    close = nearest(str(path), names, most=1) or [name for name in names if Path(name).name == path.name][:1]
    if close:
        return Finding("L104", f"there is no {what!r}. Did you mean {close[0]}?", fix=close[0])
    said = f"; there are {', '.join(names[:_SAID])}" if names else ""
    return Finding("L104", f"there is no {what!r}{said}", fix="" if names else "graftlm train")


def _names(folders: Iterable[Path]) -> list[str]:
    return list(dict.fromkeys(str(folder) for folder in folders))
