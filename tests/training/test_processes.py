"""Two processes take the step that one takes, for every objective, and together make the run that one makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftlm.objectives import PPO
from graftlm.training.processes import Part, Parts, void_apart
from training.test_invariance import CASES, Ready
from training.tiny_runs import answered_rows, metrics_of, record_of, rows_for, save_llama, weights, write_jsonl
from training.two_processes import step


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
        torch.testing.assert_close(two.pop("loss"), one.pop("loss"), atol=1e-6, rtol=1e-6)
        for name, gradient in one.items():
            torch.testing.assert_close(
                two[name], gradient, atol=1e-6, rtol=1e-6, msg=lambda said, of=task: f"{of}: {said}"
            )


def test_two_processes_take_the_step_of_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check(CASES, tmp_path, request)


def started(*words: str, processes: int = 2) -> subprocess.Popen[str]:
    several = [
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
    ]
    command = [sys.executable, "-m", *(several if processes > 1 else []), "graftlm", "train", *words]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )  # fmt: skip


def ended(*words: str, processes: int = 2) -> str:
    running = started(*words, processes=processes)
    out, err = running.communicate(timeout=280)
    assert running.returncode == 0, err[-3000:]
    return out


def words_for(data: Path, base: Path, **settings: Any) -> list[str]:
    chosen = {"train.batch": 4, "train.accumulate": 2, "train.epochs": 2, "train.eval_every": 5, "train.save_every": 5,
              "generate.samples": 0, "method": "lora(rank=2,targets=attention)", **settings}  # fmt: skip
    sets = [
        word
        for name, value in chosen.items()
        if value is not None
        for word in ("--set", f"{name}={json.dumps(value) if isinstance(value, bool) else value}")
    ]
    return [str(data), "-m", str(base), *sets]


def alike(one: Path, other: Path, near: float = 1e-6) -> None:
    """Whether the runs saw the same losses and came to the same weights; `near`: of the first step."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate")
    both = [[(row["step"], [row.get(name, 0.0) for name in names]) for row in metrics_of(run)] for run in (one, other)]
    assert [step for step, _ in both[0]] == [step for step, _ in both[1]]
    # Both begin with the same weights; later ones differ in roundings, which Adam makes larger.
    assert both[1][0][1] == pytest.approx(both[0][0][1], rel=near, abs=near)
    for (_, first), (_, second) in zip(*both, strict=True):
        assert second == pytest.approx(first, rel=2e-6, abs=2e-6)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(other)[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task", ["sft", "stream"])
def test_a_run_of_two_is_the_run_of_one(task: str, tiny_base: Path, tmp_path: Path) -> None:
    # 33 rows to train on: the last batch of a pass is one row, which one of two processes has not.
    data = write_jsonl(tmp_path / "rows.jsonl", answered_rows(41))
    given: dict[str, Any] = {"data.eval_share": 0.2}
    if task == "stream":
        given = {"data.stream": True, "data.buffer": 8, "train.steps": 14, "train.epochs": None}
    words = words_for(data, tiny_base, **given)
    ended(*words, "-o", str(tmp_path / "one"), processes=1)
    out = ended(*words, "-o", str(tmp_path / "two"))
    assert out.count("done ") == out.count("next ") == 1
    alike(tmp_path / "one", tmp_path / "two")
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["data"] == two["data"]
    assert one["results"]["scores"][0]["loss"] == pytest.approx(two["results"]["scores"][0]["loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["ppo", *(pytest.param(task, marks=pytest.mark.slow) for task in ("grpo", "rloo"))])
def test_a_run_of_two_writes_and_learns_what_one_does(task: str, tiny_base: Path, tmp_path: Path) -> None:
    """Four prompts a step, the last one alone in a step of 13; answers are drawn by their place among all."""
    rows = [{"prompt": f"Say something, number {at}" + " please" * (at % 4)} for at in range(15)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    code = tmp_path / "early.py"
    code.write_text("def early(prompt, answer, row):\n    return sum(c < 'm' for c in answer) / max(len(answer), 1)\n")
    given = {"task": task, "reinforcement.reward": f"{code}:early", "reinforcement.answers": 3,
             "generate.max_new_tokens": 6, "data.eval_share": 0.1,
             "train.batch": 4, "train.accumulate": 2, "train.epochs": None, "train.eval_every": None, "train.steps": 8, "reinforcement.updates": 2 if task == "ppo" else 1}  # fmt: skip
    words = words_for(data, tiny_base, **given)
    ended(*words, "-o", str(tmp_path / "one"), processes=1)
    ended(*words, "-o", str(tmp_path / "two"))
    # PPO's loss is a hundredth, and the sum of terms near one that cancel.
    alike(tmp_path / "one", tmp_path / "two", near=2e-6 if task == "ppo" else 1e-6)
    told = [
        [(row["reward"], row["answer_tokens"]) for row in metrics_of(tmp_path / run) if "answer_tokens" in row]
        for run in ("one", "two")
    ]
    assert told[0] == [pytest.approx(each) for each in told[1]]
    assert len({reward for reward, _ in told[0]}) == (4 if task == "ppo" else 8)


@pytest.mark.slow
def test_answers_that_steps_share_are_each_process_s_own(tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say something, number {at}"} for at in range(15)])
    given = {"task": "ppo", "reinforcement.reward": "regex:a", "reinforcement.answers": 2, "generate.max_new_tokens": 6,
             "data.eval_share": 0.1, "train.epochs": None, "train.steps": 8, "train.save_every": 2,
             "train.eval_every": None}  # fmt: skip
    words = words_for(data, tiny_base, **given)
    ended(*words, "-o", str(tmp_path / "whole"))
    ended(*words, "-o", str(tmp_path / "run"))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "checkpoint-6" / "answers.1.safetensors").is_file()
    shutil.rmtree(checkpoints / "checkpoint-8")
    record = record_of(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    alone = started("-o", str(tmp_path / "run"), "--resume", processes=1)
    assert "torchrun --nproc_per_node 2" in alone.communicate(timeout=200)[1]
    ended("-o", str(tmp_path / "run"), "--resume")
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("rows", ["kto", "dpo"])
def test_rows_that_another_process_has_count_for_nothing(rows: str, tiny_base: Path, tmp_path: Path) -> None:
    """In what all micro-batches of a step share: KTO's baseline, and the whitening of PPO's advantages."""
    ready = Ready(rows, rows, tiny_base, tmp_path)
    objective: Any = ready.objective if rows == "kto" else PPO(answers=2)
    batches = [ready.collate(ready.rows[:4]), ready.collate(ready.rows[4:6])]
    for batch in batches:
        for name in ("reference", "policy"):
            shape = (*batch["labels"].shape, 2) if rows == "dpo" else batch["labels"].shape[:1]
            batch[name] = torch.randn(shape) + (3.0 if name == "policy" else 0.0)
        batch["rewards"] = torch.randn(len(batch["labels"]))
    alone, beside = dict(batches[0]), [dict(batches[0]), batches[1] | {"void": torch.tensor(True)}]
    objective.before_step([alone], lambda value: value)
    objective.before_step(beside, lambda value: value)
    shared = "baseline" if rows == "kto" else "advantages"
    assert torch.equal(beside[0][shared], alone[shared])
    counted = [dict(batch) for batch in batches]
    objective.before_step(counted, lambda value: value)
    assert not torch.equal(counted[0][shared], alone[shared])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "tag", "dpo", "kto", "tfew", "regress", "choice", "reward"])
def test_so_it_is_for_other_tasks(task: str, tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_for(task, 41))
    # The head for tags drops entries by itself, and processes draw masks of their own.
    base = save_llama(tmp_path / "base", classifier_dropout=0.0) if task == "tag" else tiny_base
    words = words_for(data, base, **{"task": task, "data.eval_share": 0.2})
    ended(*words, "-o", str(tmp_path / "one"), processes=1)
    ended(*words, "-o", str(tmp_path / "two"))
    alike(tmp_path / "one", tmp_path / "two")


def test_ctrl_c_stops_both_at_one_step_and_both_go_on(tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", answered_rows(40))
    given = {"train.steps": 80, "train.epochs": None, "method": "lora(rank=2,targets=attention,dropout=0.2)",
             "train.save_every": 20, "train.eval_every": 80}  # fmt: skip
    words = words_for(data, tiny_base, **given)
    ended(*words, "-o", str(tmp_path / "whole"))
    running = started(*words, "-o", str(tmp_path / "run"))
    until_s = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "checkpoint-20").exists() and time.monotonic() < until_s:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    out, err = running.communicate(timeout=200)
    record = record_of(tmp_path / "run")
    assert record["status"] == "stopped", err[-2000:]
    assert 20 <= record["steps"] < 80
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert out.count("stopping") == 1
    ended("-o", str(tmp_path / "run"), "--resume")
    assert record_of(tmp_path / "run")["status"] == "done"
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_is_wrong_is_told_once_and_nothing_is_written(tiny_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", answered_rows(20))
    cases = {"U110": {"train.batch": 3, "train.accumulate": 1}, "D110": {"data.map": "prompt=none"}}
    for code, given in cases.items():
        running = started(*words_for(data, tiny_base, **given), "-o", str(tmp_path / "run"))
        _, err = running.communicate(timeout=200)
        assert running.returncode != 0
        told = [line for line in err.splitlines() if line.endswith(f"[{code}]") or "[D112]" in line]
        assert len([line for line in told if not line.startswith("process 1: ")]) == 1
        assert not (tmp_path / "run").exists()


def test_each_row_of_a_pass_is_one_process_s() -> None:
    """What counts is every row once, in batches of one process; void rows fill the last one up."""
    for rows in range(1, 14):
        for processes in (1, 2, 3):
            parts = [list(Part(range(rows), 6, processes, rank)) for rank in range(processes)]
            assert {len(part) for part in parts} == {-(-rows // 6)}
            batches = [[at for part in parts for at in part[batch] if at >= 0] for batch in range(len(parts[0]))]
            assert [at for batch in batches for at in batch] == list(range(rows))
            assert [len(batch) for batch in batches[:-1]] == [6] * (len(batches) - 1)
    items = Parts([{"row": 7}, {"row": 8}])
    assert (items[1], items[-2]) == ({"row": 8}, {"row": 8, "void": True})
    assert "void" in void_apart(lambda items: {})([items[-1]])
    assert "void" not in void_apart(lambda items: {})([items[0]])
