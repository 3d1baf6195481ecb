"""Amounts of memory as people write them, and what a process holds besides tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from graftlm.errors import Finding, PlanError
from graftlm.kernels.attention import block_shapes
from graftlm.planning.operations import (
    BLOCKED,
    BLOCKED_BACKWARD,
    FUSED_BACKWARD,
    Operation,
    given_tensors,
    is_product,
)

__all__ = ["RUNTIME_BYTES", "available_bytes", "held_bytes", "memory_bytes", "said", "workspace_bytes"]

#: What a process holds before any tensor of a run: Python, torch and transformers; on CUDA the driver's context and
#: workspaces too. Seen once on the processor with torch 2.13 and transformers 5.23, a rule of thumb for CUDA.
RUNTIME_BYTES: dict[str, int] = {"cpu": 480_000_000, "cuda": 1_000_000_000}

#: What the libraries of a processor hold besides tensors, fitted on the measured cases of docs/plan.md.
_HELD_BYTES, _UNPACKED_HELD_BYTES = 3_200_000, 1_500_000  # small blocks between others
#: In float32, MKL packs the second matrix of a product, so much of it at once, where there are enough rows.
_PACKED_ROWS, _PACKED_COLUMNS, _LEAST_ROWS = 384, 9984, 512
_BLOCKS_BYTES = 4_000_000  # what attention in blocks holds between them
#: In bfloat16 on a processor with AVX-512, oneDNN writes code for every shape and layout of a product, and keeps it.
_CODE_BYTES, _BATCHED_CODE_BYTES, _CODE_KEPT = 550_000, 340_000, 1024
_TILES_BYTES, _FUSED_CODE_BYTES = 2_300_000, 6_000_000  # the first is AMX's

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


def workspace_bytes(operations: Iterable[Operation], *, unpacked: bool = False) -> int:
    """What the processor's libraries hold for `operations` besides tensors: packed matrices and code for products.

    Where weights are `unpacked` in every product, more is held between blocks that come and go.

    Example:
        >>> x, w = torch.empty(1024, 256, device="meta"), torch.empty(256, 4096, device="meta")
        >>> workspace_bytes([Operation.of(torch.ops.aten.mm.default, (x, w), {})]) > workspace_bytes([])
        True
    """
    packed = shapes = batched = in_blocks = fused = 0
    held = _HELD_BYTES + (_UNPACKED_HELD_BYTES if unpacked else 0)
    codes = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for one in operations:
        args = json.loads(one.given)[0]
        if is_product(one.name):
            left, right = given_tensors(one)[-2:]
            if right["d"] == "float32" and left["t"][-2] >= _LEAST_ROWS:
                rows, columns = right["t"][-2:]
                packed = max(packed, 4 * min(rows, _PACKED_ROWS) * min(columns, _PACKED_COLUMNS))
            shapes += right["d"] == "bfloat16"
        elif one.name in (BLOCKED, BLOCKED_BACKWARD):
            back = one.name == BLOCKED_BACKWARD
            query, key = (_empty(spec) for spec in args[back : 2 + back])
            in_blocks = _BLOCKS_BYTES
            if query.dtype == torch.bfloat16:
                at = 7 if back else 4
                batched += (4 if back else 2) * block_shapes(query, key, bool(args[at]) if len(args) > at else False)
        elif one.name == FUSED_BACKWARD:
            fused |= args[0]["d"] == "bfloat16"
    if not (shapes or batched) or not codes:
        return held + packed + in_blocks
    code = min(shapes, _CODE_KEPT) * _CODE_BYTES + min(batched, _CODE_KEPT) * _BATCHED_CODE_BYTES
    tiles = _TILES_BYTES if torch.cpu._is_amx_tile_supported() else 0
    return held + packed + code + tiles + (_FUSED_CODE_BYTES if fused else 0)


def _empty(spec: Any) -> Any:
    return torch.empty(spec["t"], dtype=getattr(torch, spec["d"]), device="meta")


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
