"""Ctrl-C at the command line: the run is saved, scored and told of, and can be taken up to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.tiny_runs import adapter_bytes, answered_rows, record_of, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "graftlm", "train", *words], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_and_resume(tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "answered.jsonl", answered_rows())
    words = [str(data), "-m", str(tiny_base), "--steps", "400", "--batch", "4", "--method",
             "lora(rank=2,targets=attention,dropout=0.1)", "--set", "train.threads=1", "--set", "train.save_every=50",
             "--set", "train.eval_every=100"]  # fmt: skip
    whole = command(*words, "-o", str(tmp_path / "whole"))
    assert whole.wait(timeout=300) == 0, whole.communicate()[1]
    running = command(*words, "-o", str(tmp_path / "run"))
    ready = tmp_path / "run" / "checkpoints" / "checkpoint-50"
    until_s = time.monotonic() + 200
    while not ready.exists() and time.monotonic() < until_s:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, err
    assert err == ""
    assert "stopped" in out
    assert f"graftlm train -o {tmp_path / 'run'} --resume" in out
    record = record_of(tmp_path / "run")
    assert record["status"] == "stopped"
    assert 50 <= record["steps"] < 400
    for name in ("report.html", "README.md", "adapter/adapter_model.safetensors", "eval/samples.jsonl"):
        assert (tmp_path / "run" / name).is_file()
    resumed = command("-o", str(tmp_path / "run"), "--resume")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert err == ""
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert record_of(tmp_path / "run")["results"] == record_of(tmp_path / "whole")["results"]
