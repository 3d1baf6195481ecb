"""A disk that is full or cannot be written to: said before the training, or in it without losing what there was."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import EnvironmentFault, GraftError
from graftlm.training import checkpoint, train
from graftlm.training import folder as folder_module
from graftlm.training.progress import Progress
from training.test_checkpoints import LONG, seen
from training.tiny_runs import FAST, Tiny, adapter_bytes, leave_out_the_slow


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["random state", "metrics", "predictions"])
def test_a_full_disk_costs_only_the_work_since_the_last_checkpoint(
    where: str, tiny: Tiny, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(answered, out="whole", **LONG)
    with monkeypatch.context() as patch:
        calls = []

        def sometimes(real: Any, at: int) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                calls.append(1)
                return _full() if len(calls) == at else real(*args, **options)

            return call

        if where == "random state":
            patch.setattr(checkpoint, "_random_tensors", sometimes(checkpoint._random_tensors, 3))
        elif where == "metrics":
            patch.setattr(Progress, "on_log", sometimes(Progress.on_log, 6))
        else:
            patch.setattr(folder_module.RunFolder, "write_lines", _full_for_eval(folder_module.RunFolder.write_lines))
        with pytest.raises(EnvironmentFault, match="(?i)disk is full|no space left") as caught:
            tiny(answered, **LONG)
        assert len(str(caught.value).splitlines()) <= 12
        assert "free some space" in caught.value.findings[0].fix
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if not p.name.startswith("."))
    assert left[-1] == {"random state": "checkpoint-4", "metrics": "checkpoint-4", "predictions": "checkpoint-8"}[where]
    run = tiny(resume_only=True)
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)


def _full_for_eval(real: Any) -> Any:
    def write_lines(self: Any, name: str, rows: Any) -> None:
        return _full() if name.startswith("eval/") else real(self, name, rows)

    return write_lines


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path, tiny: Tiny, tiny_base: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_the_slow(monkeypatch.setattr)
    monkeypatch.setattr(folder_module, "_NEEDED_BYTES", 0)
    whole = tiny(answered, **LONG)
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * 310_000)
    options: dict[str, Any] = {"base": tiny_base, "quiet": True, **FAST, **LONG}
    options.pop("epochs")
    with pytest.raises(EnvironmentFault, match="(?i)disk is full|no space left"):
        train(answered, output=small_disk / "run", **options)
    assert checkpoint.latest(small_disk / "run" / "checkpoints")[0] is not None
    filler.unlink()
    run = train(output=small_disk / "run", resume=True, quiet=True)
    assert adapter_bytes(run.folder) == adapter_bytes(whole.folder)
    assert seen(run.folder) == seen(whole.folder)


def test_too_small_a_disk_is_said_before_the_training(small_disk: Path, tiny_base: Path, answered: Path) -> None:
    with pytest.raises(EnvironmentFault, match="a run needs 64 MB") as caught:
        train(answered, base=tiny_base, output=small_disk / "run", quiet=True, **FAST)
    assert caught.value.findings[0].code == "E103"
    assert not (small_disk / "run" / "run.json").exists()


def test_a_place_that_cannot_be_written_is_said(tiny_base: Path, answered: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError) as caught:
        train(answered, base=tiny_base, output=tmp_path / "file" / "run", quiet=True, **FAST)
    assert caught.value.findings[0].code == "E102"
