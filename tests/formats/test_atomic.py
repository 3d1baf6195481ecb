"""Folders are written whole or not at all: kills, full disks and errors leave the old one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import graftlm.formats.atomic as atomic
from graftlm.errors import EnvironmentFault
from graftlm.formats import atomic_folder, check_manifest, sha256_of, write_json, write_manifest

ROOT = Path(__file__).parents[2]
#: Rewrites one folder for ever: a manifest and 3 files of the same generation.
WRITER = """
import itertools, os, sys
sys.path.insert(0, sys.argv[2])
import importlib.util as u
spec = u.spec_from_file_location("atomic", sys.argv[2] + "/graftlm/formats/atomic.py")
atomic = u.module_from_spec(spec); spec.loader.exec_module(atomic)
if sys.argv[3] == "plain": atomic._exchange = lambda one, other: False
for n in itertools.count():
    with atomic.atomic_folder(sys.argv[1]) as folder:
        for name in "abc":
            (folder / name).write_bytes(f"{os.getpid()}-{n} ".encode() * 20_000)
        atomic.write_manifest(folder)
"""


def put(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "text").write_text(text)


def put_and_raise(path: Path, error: Exception) -> None:
    with atomic_folder(path) as folder:
        (folder / "text").write_text("two")
        raise error


def beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)


@pytest.mark.parametrize(("swap", "kills"), [("exchange", 20), ("plain", 8)])
def test_a_writer_killed_at_random_moments_leaves_a_whole_folder(swap, kills, tmp_path):
    path, chance = tmp_path / "a", random.Random(swap)
    with atomic_folder(path) as folder:
        write_manifest(folder)
    generations = set()
    for _ in range(kills):
        command = [sys.executable, "-S", "-c", WRITER, str(path), str(ROOT / "src"), swap]
        writer = subprocess.Popen(command)
        start, before = time.monotonic(), _generation(path)
        while _generation(path) == before and time.monotonic() - start < 10:  # it writes now
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if swap == "plain":
            atomic.recover(path)  # the one moment when the name is missing
        assert check_manifest(path) == []
        generations.add(_generation(path))
    assert len(generations) == kills
    put(path, "last")
    assert beside(path) == []


def _generation(path: Path) -> bytes:
    try:
        return (path / "a").read_bytes()[:20]
    except OSError:
        return b""


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_is_replaced_and_nothing_stays_beside(swap, tmp_path, monkeypatch):
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    path = tmp_path / "deep" / "a"
    put(path, "one")
    (path / "old file").write_text("")
    put(path, "two")
    assert [entry.name for entry in path.iterdir()] == ["text"]
    assert (path / "text").read_text() == "two"
    assert beside(path) == []


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path):
    put(tmp_path / "a", "one")
    with pytest.raises(ZeroDivisionError):
        put_and_raise(tmp_path / "a", ZeroDivisionError())
    assert (tmp_path / "a" / "text").read_text() == "one"
    assert beside(tmp_path / "a") == []


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "E111"), (errno.EDQUOT, "E111"), (errno.EROFS, "E112")])
def test_a_full_disk_is_named_with_its_free_bytes(number, code, tmp_path):
    put(tmp_path / "a", "one")
    with pytest.raises(EnvironmentFault) as caught:
        put_and_raise(tmp_path / "a", OSError(number, os.strerror(number)))
    (finding,) = caught.value.findings
    assert finding.code == code
    assert finding.place == str(tmp_path / "a")
    assert "bytes are free" in finding.message
    assert (tmp_path / "a" / "text").read_text() == "one"
    assert beside(tmp_path / "a") == []


def test_a_disk_that_fills_up_while_safetensors_writes(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from graftlm.core import attach
    from graftlm.formats import load_adapter
    from graftlm.formats import peft as module
    from graftlm.methods import LoRA

    from .conftest import tiny

    adapter = attach(tiny("llama"), LoRA())
    adapter.save(tmp_path / "a")

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(EnvironmentFault, match="E111"):
        adapter.save(tmp_path / "a")
    assert load_adapter(tiny("llama"), tmp_path / "a").attached


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(EnvironmentFault, match="in the way"):
        put(tmp_path / "a", "one")
    with pytest.raises(EnvironmentFault, match="E112"):
        put(tmp_path / "a" / "b", "one")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_the_right_to_write(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(EnvironmentFault, match="E112"):
        put(tmp_path / "locked" / "a", "one")


def test_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lead = f".a.graftlm-{socket.gethostname()}-"
    for name in (
        f"{lead}{dead.pid}-00.new",
        f"{lead}{os.getpid()}-00.new",
        f".b.graftlm-{socket.gethostname()}-1-0.new",
    ):
        (tmp_path / name).mkdir()
    put(tmp_path / "a", "one")
    assert len(beside(tmp_path / "a")) == 2
    # A writer that died between its two renames: the old folder comes back, also for a reader.
    shutil.move(tmp_path / "a", tmp_path / f"{lead}{dead.pid}-00.old")
    atomic.recover(tmp_path / "a")
    assert (tmp_path / "a" / "text").read_text() == "one"


def test_a_manifest_shows_every_change(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("same", "gone", "longer", "sub/other"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    assert check_manifest(tmp_path) == []
    (tmp_path / "new").write_text("")
    assert check_manifest(tmp_path) == []
    (tmp_path / "gone").unlink()
    (tmp_path / "longer").write_text("longer and longer")
    (tmp_path / "sub" / "other").write_text("sub/othes")
    found = {(finding.code, Path(finding.place).name) for finding in check_manifest(tmp_path)}
    assert found == {("A232", "gone"), ("A233", "longer"), ("A234", "other")}


@pytest.mark.parametrize("text", [None, "", "[]", '{"files": 3}', '{"files": {"a": {}}}'])
def test_a_manifest_that_cannot_be_read(text, tmp_path):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    (finding,) = check_manifest(tmp_path)
    assert finding.code == "A231"


def test_json_is_the_same_bytes_for_the_same_data(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, None]})
    write_json(tmp_path / "b", {"a": [1.5, None], "b": 1})
    assert (tmp_path / "a").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}'
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", float("nan"))
