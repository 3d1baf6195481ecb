"""Ctrl-C at the command line: what was done is kept and told of, and can be taken up to the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.tiny_runs import adapter_bytes, answered_rows, labelled_rows, record_of, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "graftlm", *words], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_and_resume(tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "answered.jsonl", answered_rows())
    words = [str(data), "-m", str(tiny_base), "--steps", "400", "--batch", "4", "--method",
             "lora(rank=2,targets=attention,dropout=0.1)", "--set", "train.threads=1", "--set", "train.save_every=50",
             "--set", "train.eval_every=100"]  # fmt: skip
    whole = command("train", *words, "-o", str(tmp_path / "whole"))
    assert whole.wait(timeout=300) == 0, whole.communicate()[1]
    running = command("train", *words, "-o", str(tmp_path / "run"))
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
    resumed = command("train", "-o", str(tmp_path / "run"), "--resume")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert err == ""
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert record_of(tmp_path / "run")["results"] == record_of(tmp_path / "whole")["results"]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_comparison_that_was_stopped_goes_on(jobs: str, tiny_bert: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(60))
    words = ["compare", str(data), "-m", str(tiny_bert), "--methods", "lora,bitfit", "--seeds", "3", "--trials", "2",
             "--steps", "60", "--waive", "D129", "--jobs", jobs, "--threads", "1"]  # fmt: skip
    whole = command(*words, "-o", str(tmp_path / "whole"))
    assert whole.wait(timeout=300) == 0, whole.communicate()[1]
    running = command(*words, "-o", str(tmp_path / "stopped"))
    runs = tmp_path / "stopped" / "runs"
    until_s = time.monotonic() + 200
    while not (runs.exists() and list(runs.glob("lora-*.json"))) and time.monotonic() < until_s:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=200)
    assert running.returncode == 130, err
    assert f"stopped: the same command goes on in {tmp_path / 'stopped'}" in err
    assert "Traceback" not in err
    place = tmp_path / "stopped" / "comparison.json"
    assert json.loads(place.read_text())["status"] == "running"
    before = {path: path.read_bytes() for path in runs.glob("*.json")}
    again = command(*words, "-o", str(tmp_path / "stopped"))
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert all(path.read_bytes() == kept for path, kept in before.items())  # nothing is done twice
    ends = [json.loads((tmp_path / name / "comparison.json").read_text())["summary"] for name in ("whole", "stopped")]
    scores = [[(row["name"], row["score"], row["low"], row["high"]) for row in end["contestants"]] for end in ends]
    assert scores[0] == scores[1]
