"""The machine that a run ran on: versions, device, processor, memory."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["environment", "peak_memory_bytes"]


def environment(model: Any) -> dict[str, Any]:
    """What `run.json` says of the machine and the versions."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(model.device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
