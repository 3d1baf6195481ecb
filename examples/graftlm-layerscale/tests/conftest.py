"""Puts graftlm's tests on the path: GRAFTLM_TESTS names them, or they are those of the clone this example lies in."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), os.environ.get("GRAFTLM_TESTS", str(HERE.parents[2] / "tests"))]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)
