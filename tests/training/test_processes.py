"""Two processes take the step that one takes: the same loss and the same gradient, for every objective."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.test_invariance import CASES
from training.two_processes import step

FEW = [("classify", "classify", "tiny_bert"), ("sft", "sft", "tiny_base"), ("kto", "kto", "tiny_base")]


def check(cases: list[tuple[str, str, str]], folder: Path, request: pytest.FixtureRequest) -> None:
    bases = [request.getfixturevalue(base) for _, _, base in cases]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(Path(__file__).with_name("two_processes.py")), str(folder)]
    command += [f"{rows},{task},{base}" for (rows, task, _), base in zip(cases, bases, strict=True)]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for at, ((rows, task, _), base) in enumerate(zip(cases, bases, strict=True)):
        two, one = load_file(folder / f"{at}.safetensors"), step(rows, task, base, folder)
        assert two.keys() == one.keys()
        torch.testing.assert_close(two.pop("loss"), one.pop("loss"), atol=1e-6, rtol=1e-5)
        for name, gradient in one.items():
            torch.testing.assert_close(
                two[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda said, of=task: f"{of}: {said}"
            )


def test_two_processes_take_the_step_of_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check(FEW, tmp_path, request)


@pytest.mark.slow
def test_so_it_is_for_every_objective(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check([case for case in CASES if case not in FEW], tmp_path, request)
