"""The benchmark of a training step runs, and its contenders do the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_quick_run_compares_equal_work(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words = [
        "--quick",
        "--repeats",
        "1",
        "--dtype",
        "f32",
        "--contenders",
        "ours,peft",
        "--out",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "training_speed.py"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitsandbytes" not in done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| ours", "| peft"))]
    assert [row[7].strip() for row in rows] == ["", ""]  # the products alone were not run: no share of them is known
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert found["contenders"]["ours"]["losses"][0] == pytest.approx(found["contenders"]["peft"]["losses"][0], abs=1e-4)
    assert found["contenders"]["ours"]["cpu_s"] > 0
    kept = (tmp_path / "found.json").read_bytes()
    again = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "training_speed.py"), *words, "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.stdout == done.stdout
    assert (tmp_path / "found.json").read_bytes() == kept
