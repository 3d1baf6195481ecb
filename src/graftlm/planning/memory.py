"""Amounts of memory as people write them, and what a process holds besides tensors."""

from __future__ import annotations

import re
from pathlib import Path

from graftlm.errors import Finding, PlanError

__all__ = ["RUNTIME_BYTES", "available_bytes", "held_bytes", "memory_bytes", "said"]

#: What a process holds before any tensor of a run: Python, torch and transformers; on CUDA the driver's context and
#: workspaces too. Seen once on the processor with torch 2.13 and transformers 5.23, a rule of thumb for CUDA.
RUNTIME_BYTES: dict[str, int] = {"cpu": 480_000_000, "cuda": 1_000_000_000}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"(\d+(?:[.,]\d+)?)\s*([kmgt]?i?)(?:b|bytes?)?", re.IGNORECASE)


def memory_bytes(amount: str | float) -> int:
    """The bytes that `amount` means: a number of bytes, or a text such as 24GB, 24 GiB, 512M. G is 10^9, Gi is 2^30.

    Raises PlanError for anything else.

    Example:
        >>> memory_bytes("24GB"), memory_bytes("1.5 GiB")
        (24000000000, 1610612736)
    """
    if isinstance(amount, (int, float)) and not isinstance(amount, bool) and amount > 0:
        return int(amount)
    match = _AMOUNT.fullmatch(str(amount).strip())
    found = float(match[1].replace(",", ".")) * _UNITS[match[2].lower()] if match and match[2].lower() != "i" else 0
    if found <= 0:
        raise PlanError(Finding("P103", f"{amount!r} is no amount of memory", fix="24GB"))
    return int(found)


def said(amount: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point.

    Example:
        >>> said(5_120_000_000), said(830_000), said(0)
        ('5.1 GB', '830 kB', '0 B')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(amount) >= 0.9995 * size:
            number = amount / size
            return f"{number:.0f} {unit}" if abs(number) >= 99.5 or unit == "kB" else f"{number:.1f} {unit}"
    return f"{amount:.0f} B"


def available_bytes(device: str = "cpu") -> int:
    """What this process could hold on the device, with what it holds already; 0 where it cannot be told."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0
    limits = [_first_number("/sys/fs/cgroup/memory.max")]  # a container's own limit, where it has one
    lines = _lines("/proc/meminfo")
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    if free:
        limits.append(free + held_bytes())
    return min((limit for limit in limits if limit), default=0)


def held_bytes() -> int:
    """The memory that this process holds now; 0 where it cannot be told."""
    lines = _lines("/proc/self/status")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _first_number(path: str) -> int:
    return next((int(line) for line in _lines(path) if line.isdigit()), 0)
