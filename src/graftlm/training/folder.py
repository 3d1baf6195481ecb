"""Run folders: one folder tells one run; where it lies, what it holds, and how it is read again.

run.json          settings with their origin, versions, device, hashes of the data, the base's fingerprint, results
adapter/          the adapter in PEFT's format with our facts
start/            the adapter before training, where preferences are told against it and it is not the base
checkpoints/      what resuming needs
metrics.jsonl     losses and rates by step
data/rejected.jsonl   rows left out, with the reason
data/cut.jsonl        rows longer than max_length, with the tokens that they had
eval/             predictions or sample outputs on the held-out rows
report.html, README.md, log.txt
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graftlm.errors import EnvironmentFault, Finding, RunError, half_character
from graftlm.formats.atomic import write_json
from graftlm.settings import Resolved, RunSettings, dump, recorded

__all__ = ["RunFolder", "free_folder", "lines_of", "resolved_of", "standing"]

_NEEDED_BYTES = 64 * 2**20


def free_folder(data_name: str, *, parent: Path = Path("runs")) -> Path:
    """The first free `runs/<data>-<n>`."""
    stem = re.sub(r"[^\w-]+", "-", Path(data_name).stem.rpartition(":")[2]).strip("-") or "run"
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def standing(settings: RunSettings, directory: str | Path) -> RunSettings:
    """`settings` that were given in `directory`, with paths that hold in every other one."""
    there, data, model = Path(directory), settings.data, settings.model

    def place(value: str) -> str:
        named = value.startswith(("bundled:", "hub:"))
        return value if named else str(there / Path(value).expanduser())

    given = {"path": data.path, "eval_path": data.eval_path, "test": _file(data.test)}
    paths: dict[str, Any] = {name: place(value) for name, value in given.items() if value}
    paths["mixture"] = {place(path): weight for path, weight in data.mixture.items()}
    base = there / Path(model.name).expanduser()
    names = {"name": str(base)} if base.is_dir() and model.name != "bundled" else {}
    changed: dict[str, Any] = {"data": data.model_copy(update=paths), "model": model.model_copy(update=names)}
    if settings.start is not None:
        changed["start"] = place(settings.start)
    return settings.model_copy(update=changed)


def _file(test: str | None) -> str | None:
    """The test rows' file; None where they are a share."""
    try:
        return None if test is None or float(test) >= 0 else test
    except ValueError:
        return test


def resolved_of(record: Mapping[str, Any]) -> Resolved:
    """What the run of `record` was asked, settings and their origin, to be asked again from any directory.

    Raises SettingsError where the record has settings that this version does not know.
    """
    settings, there = recorded(record["settings"]), record.get("directory", os.getcwd())
    if there != os.getcwd():
        settings = standing(settings, there)
    return Resolved(settings, dict(record.get("origin", {})))


class RunFolder:
    """The files of one run, by their purpose."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        #: False in processes beside the main one: what is to be written is left to that.
        self.writes = writes
        self.record_path = self.path / "run.json"
        self.adapter = self.path / "adapter"
        self.start = self.path / "start"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` says. Raises RunError where it cannot be read."""
        try:
            found: dict[str, Any] = json.loads(self.record_path.read_text())
            return found
        except FileNotFoundError:
            raise RunError(Finding("U101", f"{self.path} is not a run folder: it has no run.json")) from None
        except (OSError, ValueError) as error:
            raise RunError(Finding("U102", f"{self.record_path} cannot be read: {error}")) from error

    def check(self, settings: RunSettings, *, resume: bool) -> None:
        """Raise RunError where a run of `settings` would overwrite anything here, before anything is changed.

        A run can be taken up with the same settings only; what differs is named.
        """
        if self.record_path.exists():
            record = self.record
            here = os.getcwd()
            before = standing(recorded(record.get("settings", {})), record.get("directory", here))
            changed = _differences(dump(before), dump(standing(settings, here)))
            fresh = str(_next_free(self.path))
            if changed:
                raise RunError(
                    Finding(
                        "U103",
                        f"{self.path} holds a run with other settings; --resume is impossible",
                        detail=tuple(changed[:6]),
                        fix=f"-o {fresh}",
                    )
                )
            if not resume:
                state = record.get("status")
                raise RunError(
                    Finding(
                        "U104",
                        f"{self.path} holds this run already ({state})",
                        fix=f"-o {fresh}" if state == "done" else f"--resume, or -o {fresh}",
                    )
                )
            if record.get("status") == "done":
                raise RunError(Finding("U105", f"the run in {self.path} is done: nothing to resume", fix=f"-o {fresh}"))
        elif resume:
            raise RunError(Finding("U106", f"nothing to resume: {self.path} has no run.json", fix="leave --resume out"))
        elif self.path.is_file() or any(
            # Folders alone, the rows of a call and a record cut short are what a kill at the start leaves.
            inside.is_file() and inside.relative_to(self.path).as_posix() not in ("data/rows.jsonl", "run.tmp")
            for inside in self.path.rglob("*")
        ):
            raise RunError(
                Finding("U107", f"{self.path} is no run folder and not empty", fix=f"-o {_next_free(self.path)}")
            )

    def make(self) -> None:
        """Make the folder and those inside. Raises EnvironmentFault where that is impossible or the disk is full."""
        if not self.writes:
            return
        try:
            for folder in (self.path, self.checkpoints, self.path / "data", self.path / "eval"):
                folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise EnvironmentFault(
                Finding("E102", f"cannot write to {self.path}: {error.strerror}", fix="-o FOLDER")
            ) from error
        if not os.access(self.path, os.W_OK):
            raise EnvironmentFault(Finding("E102", f"cannot write to {self.path}", fix="-o FOLDER"))
        self.need_room(free)

    def need_room(self, free_bytes: int) -> None:
        """Raise EnvironmentFault where `free_bytes` are too few for a run."""
        if free_bytes < _NEEDED_BYTES:
            needed = f"a run needs {_NEEDED_BYTES / 2**20:.0f} MB"
            raise EnvironmentFault(Finding("E103", f"{free_bytes / 2**20:.0f} MB are free for {self.path}, {needed}"))

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace `run.json` at once."""
        if not self.writes:
            return
        temporary = self.record_path.with_suffix(".tmp")
        write_json(temporary, dict(record))
        os.replace(temporary, self.record_path)

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `rows` as JSON lines into the file `name`."""
        if not self.writes:
            return
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(lines_of(rows), encoding="utf-8")
        os.replace(temporary, self.path / name)

    def add_line(self, name: str, row: Mapping[str, Any]) -> None:
        """Add `row` as a JSON line to the file `name`."""
        if not self.writes:
            return
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(lines_of([row]))

    def cut_metrics(self, after_step: int) -> None:
        """Forget the metrics after `after_step`: resuming will write them again."""
        if self.metrics.exists():
            lines = [json.loads(line) for line in self.metrics.read_text().splitlines() if line.endswith("}")]
            self.write_lines(self.metrics.name, [line for line in lines if line["step"] <= after_step])


def lines_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """`rows` as JSON lines; what UTF-8 cannot write (half of a surrogate pair) in JSON's own signs for it."""
    told = ((row, json.dumps(row, ensure_ascii=False)) for row in rows)
    return "".join((json.dumps(row) if half_character(line) else line) + "\n" for row, line in told)


def _next_free(path: Path) -> Path:
    stem, number = re.fullmatch(r"(.*?)(?:-(\d+))?", path.name).groups()  # type: ignore[union-attr]
    count = int(number or 1) + 1
    while (path.parent / f"{stem}-{count}").exists():
        count += 1
    return path.parent / f"{stem}-{count}"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and key != "map":
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key != "output":
            found.append(f"{prefix}{key}: {old} there, {new} asked for")
    return found
