"""What all tests share: one thread, a fixed seed, no network, and `tests/` on the path."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error",
)  # fmt: skip

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_make_parametrize_id(val: object) -> str | None:
    """The name of a parameter, the same in every process: those that share the work must collect the same names."""
    if isinstance(val, (set, frozenset)):
        return "{" + ", ".join(sorted(map(str, val))) + "}"
    if isinstance(val, (list, tuple)):
        return str(val) if "<" not in str(val) else None
    return getattr(val, "__name__", None) if callable(val) else None
