"""Folders that are written whole or not at all, and the manifest that shows whether one is still whole.

`atomic_folder` gives a temporary sibling to write into; its files reach the disk before it takes the place of the old
folder. Where the system can exchange two names (Linux), a reader sees the old or the new one at every moment. Elsewhere
the old one is moved aside first, and `recover` puts it back after a kill between the two renames.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.errors import EnvironmentFault, Finding

__all__ = ["atomic_folder", "check_manifest", "recover", "sha256_of", "write_json", "write_manifest"]

_MANIFEST = "manifest.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new empty folder to write into, which takes the place of `path` when the block ends without an error.

    A kill at any moment, a full disk or an error in the block leaves what was at `path` before. What killed writers
    left beside it is removed. Raises EnvironmentFault where `path` cannot be written, with the free bytes.

    Example:
        >>> with atomic_folder("runs/a/adapter") as folder:              # doctest: +SKIP
        ...     write_json(folder / "notes.json", {"steps": 100})
    """
    target = Path(path).absolute()
    fresh = _beside(target, "new")
    try:
        try:
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "a file of this name is in the way", str(target))
            target.parent.mkdir(parents=True, exist_ok=True)
            recover(target)
            fresh.mkdir()
            yield fresh
            _to_disk(fresh)
            _put(fresh, target)
        except OSError as error:
            raise _fault(error, target) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recover(path: str | Path) -> None:
    """Remove what killed writers left beside `path`; where one was killed while swapping, put the old folder back."""
    target = Path(path).absolute()
    lead = f".{target.name}.graftlm-{socket.gethostname()}-"
    for entry in sorted(target.parent.glob(f"{_escaped(lead)}*")):
        writer, _, kind = entry.name.removeprefix(lead).partition("-")
        if not writer.isdigit() or _alive(int(writer)):
            continue
        if kind.endswith(".old") and not target.exists():
            entry.rename(target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as JSON with sorted keys and two blanks of indentation, as PEFT does; the same data, the same bytes.

    Raises TypeError and ValueError for what JSON cannot hold (NaN included).
    """
    Path(path).write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False), encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of the file at `path`, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | Path) -> None:
    """Write `manifest.json` with the size and hash of every other file below `folder`."""
    root = Path(folder)
    files = {
        file.relative_to(root).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(root.rglob("*"))
        if file.is_file() and file != root / _MANIFEST
    }
    write_json(root / _MANIFEST, {"format": 1, "files": files})


def check_manifest(folder: str | Path) -> list[Finding]:
    """What is missing or changed in `folder` since `write_manifest`; empty where all is well. New files are allowed."""
    root = Path(folder)
    try:
        files = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [Finding("A231", f"no manifest can be read ({_why(error)})", place=str(root / _MANIFEST))]
    faults = []
    for name, (size_bytes, digest) in sorted(listed.items()):
        file = root / name
        if not file.is_file():
            faults.append(Finding("A232", "is missing", place=str(file)))
        elif file.stat().st_size != size_bytes:
            faults.append(Finding("A233", f"has {file.stat().st_size} bytes, wanted {size_bytes}", place=str(file)))
        elif sha256_of(file) != digest:
            faults.append(Finding("A234", "was changed since it was written (its hash differs)", place=str(file)))
    return faults


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(
        f".{target.name}.graftlm-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}"
    )


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _to_disk(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
    elif _exchange(fresh, target):
        shutil.rmtree(fresh, ignore_errors=True)  # the old one, under the new one's name
    else:
        old = _beside(target, "old")
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once where the system can: renameat2 with RENAME_EXCHANGE."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _fault(error: OSError, target: Path) -> EnvironmentFault:
    near = next((parent for parent in (target, *target.parents) if parent.exists()), Path("/"))
    free_bytes = shutil.disk_usage(near).free
    if error.errno in _FULL:
        found = Finding(
            "E111", f"the disk is full: {free_bytes:,} bytes are free", place=str(target), fix="free some space"
        )
    else:
        found = Finding(
            "E112", f"cannot be written: {_why(error)} ({free_bytes:,} bytes are free)", place=str(target),
            fix="choose another folder",
        )  # fmt: skip
    return EnvironmentFault(found)


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
