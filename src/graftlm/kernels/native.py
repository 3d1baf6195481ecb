"""Loops of native.c, built once with the machine's C compiler: what PyTorch makes in several passes over its memory.

They are of use in training on a processor, where the matrix products are fast and everything between them is not. The
library is built when it is first needed (some seconds) and kept in the user's cache (XDG_CACHE_HOME, or ~/.cache, in
`graftlm`), by the source, the compiler's options and the processor. Without a compiler, on another device, for other
types, or with GRAFTLM_NATIVE=0 in the environment, the forms in PyTorch beside each are used, which compute the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Loops", "give_back_large_memory", "giving_back", "loops_for", "why_not", "without_loops"]

_SOURCE = Path(__file__).with_name("native.c")
# Sums may be made in any order; what is not a number stays so. Compilers that know no OpenMP get the second line.
_ARITHMETIC = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
_OPTIONS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_BUILD_S = 120
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
#: A row of scores is held on the stack.
MOST_KEYS = 2**16

_M_MMAP_THRESHOLD = -3  # malloc.h
#: From which size on memory is given back where time counts.
LARGE_BYTES = 16 * 2**20
_asked: list[int] = []  # what the C library was told last

_left_out = False


class Loops:
    """The loops for one type; tensors are given as they are, and must be contiguous."""

    def __init__(self, library: ctypes.CDLL, kind: torch.dtype) -> None:
        self._library, self._suffix = library, _SUFFIX[kind]

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, f"{name}_{self._suffix}")

        def call(*arguments: Tensor | int | float | None) -> None:
            function(*map(_as_c, arguments), ctypes.c_int64(torch.get_num_threads()))

        self.__dict__[name] = call
        return call


class Unsigned(int):
    """A number of 32 bits without a sign, as the loops take it."""


def _as_c(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, Unsigned):
        return ctypes.c_uint32(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def loops_for(*tensors: Tensor | None) -> Loops | None:
    """The loops for tensors of one type on a processor; None where they cannot be had, or tensors are of others."""
    first = tensors[0]
    assert first is not None
    kind = first.dtype
    if _left_out or kind not in _SUFFIX or os.environ.get("GRAFTLM_NATIVE") == "0":
        return None
    if any(each is not None and (each.device.type != "cpu" or each.dtype != kind) for each in tensors):
        return None
    return _loops(kind)


@functools.cache
def _loops(kind: torch.dtype) -> Loops | None:
    library, _ = _library()
    return None if library is None else Loops(library, kind)


def why_not() -> str:
    """Why there are no loops on this machine; empty where there are."""
    return "GRAFTLM_NATIVE is 0" if os.environ.get("GRAFTLM_NATIVE") == "0" else _library()[1]


def give_back_large_memory(least_bytes: int) -> bool:
    """Have glibc give memory of `least_bytes` and more back when it is freed; False where the C library is another.

    It moves that limit up to the largest that was ever freed (32 MiB at most), and below it lets holes stand between
    tensors that are kept for the backward (before 2.38 it cannot put a tensor into the hole of one of its size). Each
    page that is given back is a fault when it is wanted again: from 16 MiB on that costs 4 % of a step, from 1 MiB on
    a tenth to a third, and takes off half of the peak or more. Stays so for the process.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    _asked[:] = [least_bytes]
    return bool(set_option(_M_MMAP_THRESHOLD, least_bytes))


@contextlib.contextmanager
def giving_back(least_bytes: int) -> Iterator[None]:
    """`give_back_large_memory` for the block; then as it was asked for last, or from `LARGE_BYTES` on."""
    before = list(_asked) or [LARGE_BYTES]
    give_back_large_memory(least_bytes)
    try:
        yield
    finally:
        give_back_large_memory(*before)


@contextlib.contextmanager
def without_loops() -> Iterator[None]:
    """Inside, the forms in PyTorch are used."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The built library, or why there is none."""
    compiler = os.environ.get("CC") or next(
        (found for each in ("cc", "gcc", "clang") if (found := shutil.which(each))), ""
    )
    if not compiler:
        return None, "there is no C compiler (cc, gcc, clang)"
    told = "\n".join(
        [_SOURCE.read_text(encoding="utf-8"), compiler, str(_OPTIONS), _ARITHMETIC.__repr__(), _processor()]
    )
    name = f"native-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftlm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / name
        if not place.exists():
            why = _build(compiler, place)
            if why:
                return None, why
        return ctypes.CDLL(str(place)), ""
    except OSError as error:
        return None, f"{folder / name}: {error}"


def _build(compiler: str, place: Path) -> str:
    """Build the library at `place`; what the compiler said where it could not."""
    said = ""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / place.name
        for options in _OPTIONS:
            command = [
                *compiler.split(),
                *_ARITHMETIC,
                *options,
                "-shared",
                "-fPIC",
                "-o",
                str(made),
                str(_SOURCE),
                "-lm",
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"{compiler}: {error}"
            if done.returncode == 0:
                made.replace(place)  # in one piece, whoever else builds it too
                return ""
            said = said or f"{compiler} could not build {_SOURCE.name}: {done.stderr.strip().splitlines()[-1:]}"
    return said


def _processor() -> str:
    """What tells the processor's instructions apart: a home folder may be shared between machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"{platform.machine()} {platform.processor()}"
