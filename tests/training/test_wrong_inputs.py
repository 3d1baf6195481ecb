"""Mistakes of every day at the command line: exit code 2, what is wrong and how to mend it, and nothing left behind."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graftlm.cli import main
from graftlm.training import GraftTrainer
from training.tiny_runs import Tiny, answered_rows, labelled_rows, write_jsonl

ANSWERED, LABELLED = answered_rows(), labelled_rows()


@dataclass(frozen=True)
class Mistake:
    """`rows` make data.jsonl (or `files` more), `words` follow `train`; the answer has `code` and every one of `says`."""

    words: str
    code: str
    says: tuple[str, ...]
    rows: Any = ()
    files: tuple[tuple[str, str], ...] = ()


MISTAKES = {
    "unknown key": Mistake("-c run.yaml", "S101", ("run.yaml:2:3", "learning_rte", "train.learning_rate"), ANSWERED,
        (("run.yaml", "train:\n  learning_rte: 2e-4\n"),)),
    "foreign keys": Mistake("-c run.yaml", "S103", ("num_train_epochs", "train.epochs", "lora_r", "rank"), ANSWERED,
        (("run.yaml", "num_train_epochs: 3\nlora_r: 8\n"),)),
    "foreign flag": Mistake("data.jsonl --num_train_epochs 3", "L102", ("--epochs",), ANSWERED),
    "learning rate": Mistake("data.jsonl --lr 20", "S105", ("20 000 times above the usual range", "Meant 2e-4?"), ANSWERED),
    "unknown method": Mistake("data.jsonl --method lorra", "T101", ("lorra", "Did you mean lora?"), ANSWERED),
    "option of another method": Mistake("data.jsonl --method 'bitfit(alpha=4)'", "T112", ("bitfit has no 'alpha'",), ANSWERED),
    "missing file": Mistake("data.jsnl", "D101", ("data.jsnl", "data.jsonl"), ANSWERED),
    "broken line": Mistake("broken.jsonl", "D105", ("broken.jsonl:3:", "^"), (),
        (("broken.jsonl", '{"prompt": "a", "completion": "b"}\n' * 2 + '{"prompt": "a", "completion": "b\n'
          + '{"prompt": "a", "completion": "b"}\n' * 9),)),
    "wrong columns": Mistake("data.jsonl --task sft", "D110", ("source", "--map"), [{"q": "a", "a": "b", "source": "c"}] * 9),
    "null content": Mistake("data.jsonl", "D120", ("6", "null"), [*ANSWERED[:5], {"prompt": "x", "completion": None}, *ANSWERED]),
    "answers cut away": Mistake("data.jsonl --max-length 8", "D143", ("lose their whole answer", "--max-length 64"), ANSWERED),
    "nothing supervised": Mistake("data.jsonl", "D124", ("assistant",),
        [{"messages": [{"role": "user", "content": f"Hello {n}"}]} for n in range(9)]),
    "wrong targets": Mistake("data.jsonl --method 'lora(targets=query_key_value)'", "C101", ("query_key_value", "q_proj"), ANSWERED),
    "eval rows in train": Mistake("data.jsonl --set data.eval_path=eval.jsonl", "D131", ("of 5", "also in"), ANSWERED,
        (("eval.jsonl", "".join(json.dumps(row) + "\n" for row in ANSWERED[:4]) + '{"prompt": "n", "completion": "n"}\n'),)),
    "label typos": Mistake("data.jsonl", "D126", ("differ only by case or space", "merge"),
        [*LABELLED, *({"text": f"t {n}", "label": "Return "} for n in range(3))]),
    "model folder missing": Mistake("data.jsonl -m ./modles/llama", "M102", ("./modles/llama",), ANSWERED),
    "two lengths of training": Mistake("data.jsonl --epochs 2 --steps 10", "S107", ("each says how long",), ANSWERED),
    "indivisible batch": Mistake("data.jsonl --batch 5 --set train.accumulate=2", "S107", ("5", "2"), ANSWERED),
    "too long": Mistake("data.jsonl --max-length 999", "U132", ("--max-length 128",), ANSWERED),
    "one row": Mistake("data.jsonl", "", (), ANSWERED[:1]),
    "resume of nothing": Mistake("data.jsonl --resume", "U106", ("nothing to resume",), ANSWERED),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in; an optimizer step is an error there."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def step(*_: Any, **__: Any) -> None:
        raise AssertionError("a training step was made")

    monkeypatch.setattr(GraftTrainer, "training_step", step)
    return here


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What the command line says to `words`; it must refuse them in the way of all errors."""
    assert main(["train", *words]) == 2
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    assert 1 <= len(said.err.splitlines()) <= 12, said.err
    return said.err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered(name: str, place: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mistake = MISTAKES[name]
    if mistake.rows:
        write_jsonl(place / "data.jsonl", mistake.rows)
    for file, text in mistake.files:
        (place / file).write_text(text)
    words = shlex.split(mistake.words)
    if not {"-c", "-m"} & set(words):
        words += ["-m", str(tiny_base)]
    if "-c" in words:
        words += ["data.jsonl"]
    said = refused([*words, "-o", "run"], capfd)
    assert f"[{mistake.code}]" in said or not mistake.code, said
    for part in mistake.says:
        assert part in said, f"{part!r} is not in\n{said}"
    assert not (place / "run").exists()


def test_a_run_folder_that_exists_is_not_overwritten(
    tiny: Tiny, tiny_base: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tiny(answered)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    said = refused([str(answered), "-m", str(tiny_base), "-o", str(tmp_path / "run"), "--lr", "1e-3"], capfd)
    assert "[U103]" in said
    assert "train.learning_rate: None there, 0.001 asked for" in said
    assert f"-o {tmp_path / 'run-2'}" in said
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


@pytest.mark.parametrize("what", ["run", "run/adapter"])
def test_an_adapter_is_no_base(
    what: str, tiny: Tiny, tiny_base: Path, answered: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny(answered)
    said = refused([str(answered), "-m", str(tmp_path / what), "-o", str(tmp_path / "other")], capfd)
    assert "[M105]" in said
    assert f"fix: -m {tiny_base}" in said
    assert not (tmp_path / "other").exists()


def test_faults_of_data_method_and_base_are_told_together(
    place: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(place / "data.jsonl", [{"prompt": "x", "completion": None}] * 4)
    said = refused(["data.jsonl", "-m", str(tiny_base), "--method", "lorra", "--max-length", "999", "-o", "run"], capfd)
    for code in ("T101", "D120", "U132"):
        assert f"[{code}]" in said
    said = refused(["nothing.csv", "-m", "./nowhere", "--method", "lorra", "-o", "run"], capfd)
    for code in ("T101", "D101", "M102"):
        assert f"[{code}]" in said


def test_an_encoder_that_is_to_write_is_refused(
    place: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(place / "data.jsonl", ANSWERED)
    said = refused(["data.jsonl", "-m", str(tiny_bert), "-o", "run"], capfd)
    assert "[M113]" in said
    assert "--task classify" in said
    assert not (place / "run").exists()
