"""`graftlm doctor`: whether this machine and this installation can do the work, each line with what mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from graftlm.cli.output import print_json, print_table
from graftlm.cli.usage import Verb

__all__ = ["TESTED", "Line", "examine", "verb"]

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.9", "3"),
    "transformers": ("5.23", "6"),
    "accelerate": ("1.10", "2"),
    "safetensors": ("0.5", "1"),
    "numpy": ("1.26", "3"),
    "scikit-learn": ("1.5", "2"),
    "pyarrow": ("18", "100"),
    "pydantic": ("2.10", "3"),
    "click": ("8.1", "9"),
    "rich": ("13.9", "16"),
}
"""Packages with the versions that graftlm is tested with: from the first on, below the second."""

_EXTRAS = {"bitsandbytes": "weights in 4 and 8 bits", "peft": "comparing with PEFT in the tests"}
_SPACE_BYTES, _MEMORY_BYTES = 2 * 10**9, 2 * 10**9
_SLOW = 5.0  # times float32


@dataclass(frozen=True)
class Line:
    """One thing looked at: `state` is pass, warn or fail; `mend` is what to do about it."""

    state: str
    subject: str
    found: str
    mend: str = ""


@click.command(
    "doctor",
    cls=Verb,
    examples=["graftlm doctor", "graftlm doctor --json"],
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(as_json: bool) -> int:
    """Look at versions, devices, memory, disk and threads, and say what mends each fault. Types are tried by computing.

    The exit code is 2 where anything fails; warnings alone give 0.
    """
    lines = list(examine())
    if as_json:
        print_json([asdict(line) for line in lines])
    else:
        print_table(
            ["", "what", "found", "to mend it"], [(line.state, line.subject, line.found, line.mend) for line in lines]
        )
    return 2 if any(line.state == "fail" for line in lines) else 0


def examine() -> Iterator[Line]:
    """Every line, in order; what heavy packages are needed for comes last."""
    yield _python()
    for name, (low, high) in TESTED.items():
        yield _version(name, low, high)
    for name, use in _EXTRAS.items():
        yield _extra(name, use)
    yield _disk(Path.cwd())
    yield _writeable(Path.cwd())
    yield _memory()
    yield _threads()
    yield _offline()
    yield from _devices()


def _python() -> Line:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Line("pass" if good else "fail", "Python", found, "" if good else "install Python 3.11 or later")


def _version(name: str, low: str, high: str) -> Line:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Line("fail", name, "not installed", f"pip install '{name}>={low},<{high}'")
    if _number(found) < _number(low):
        return Line("fail", name, f"{found}, older than {low}", f"pip install -U '{name}>={low},<{high}'")
    if _number(found) >= _number(high):
        return Line("warn", name, f"{found}, newer than what was tested", f"pip install '{name}>={low},<{high}'")
    return Line("pass", name, found)


def _number(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(letter for letter in part if letter.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def _extra(name: str, use: str) -> Line:
    try:
        return Line("pass", name, f"{importlib.metadata.version(name)} (optional: {use})")
    except importlib.metadata.PackageNotFoundError:
        return Line("pass", name, f"not installed (optional: {use})", f"pip install {name}")


def _disk(folder: Path) -> Line:
    free = shutil.disk_usage(folder).free
    good = free >= _SPACE_BYTES
    found = f"{free / 1e9:.1f} GB free in {folder}"
    return Line("pass" if good else "warn", "disk", found, "" if good else "free some space, or work in another folder")


def _writeable(folder: Path) -> Line:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return Line("pass", "folder", f"{folder} can be written to")
    except OSError as error:
        return Line("fail", "folder", f"{folder}: {error.strerror}", "cd to a folder of your own")


def _memory() -> Line:
    from graftlm.planning.memory import available_bytes

    free = available_bytes()
    if not free:
        return Line("warn", "memory", "cannot be told on this system", "graftlm plan --memory AMOUNT tells what fits")
    good = free >= _MEMORY_BYTES
    return Line("pass" if good else "warn", "memory", f"{free / 1e9:.1f} GB can be had",
                "" if good else "end other programs; graftlm plan tells what a run needs")  # fmt: skip


def _threads() -> Line:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked and asked.isdigit() and int(asked) > count:
        return Line(
            "warn", "threads", f"OMP_NUM_THREADS={asked}, {count} processors", f"export OMP_NUM_THREADS={count}"
        )
    return Line("pass", "threads", f"{count} processors" + (f", OMP_NUM_THREADS={asked}" if asked else ""))


def _offline() -> Line:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    found = "on: bases come from folders and what was fetched before" if offline else "off: a hub id may be fetched"
    return Line("pass", "offline", found)


def _devices() -> Iterator[Line]:
    try:
        import torch
    except Exception as error:  # a broken installation can fail in any way
        yield Line("fail", "torch", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for name in ("float32", "bfloat16", "float16"):
            yield _tried(device, name, _compute, _times_slower)
    if "cuda" not in devices:
        yield Line("pass", "cuda", "none: everything runs on the processor")


def _tried(device: str, name: str, work: Callable[[str, str], float], slower: Callable[[str, str], float]) -> Line:
    mend = "--set model.dtype=float32"
    try:
        off = work(device, name)
        times = slower(device, name)
    except Exception as error:  # whatever a driver says
        return Line("warn", f"{device} {name}", str(error).splitlines()[0][:80], mend)
    if off >= 0.1:
        return Line("fail", f"{device} {name}", f"wrong by {off:.2g}", mend)
    if times >= _SLOW:
        found = f"right, but a product takes {times:.0f} times as long as in float32"
        return Line("warn", f"{device} {name}", found, mend)
    return Line("pass", f"{device} {name}", "a step forward and back is right")


def _times_slower(device: str, name: str) -> float:
    """How many times as long as in float32 a product takes: a processor without the type goes number by number."""
    import torch

    if device != "cpu" or name == "float32":
        return 1.0
    seconds = {}
    for kind in ("float32", name):
        x = torch.ones(512, 512, dtype=getattr(torch, kind))
        taken = []
        for _ in range(4):
            start = time.thread_time()  # of this thread alone: others wait by turning
            x @ x
            taken.append(time.thread_time() - start)
        seconds[kind] = min(taken)
    return seconds[name] / max(seconds["float32"], 1e-6)


def _compute(device: str, name: str) -> float:
    """How far the gradient of a small product is from that in float64, relative."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    found = a.to(device, getattr(torch, name)).requires_grad_()
    (found @ b.to(found)).square().mean().backward()  # type: ignore[no-untyped-call]
    exact = a.clone().requires_grad_()
    (exact @ b).square().mean().backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    assert exact.grad is not None
    return float((found.grad.double().cpu() - exact.grad).norm() / exact.grad.norm())
