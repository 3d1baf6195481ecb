"""What cannot be understood is answered with the nearest right thing, and exit code 2."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_stand_ins import Rooms, Screen

from graftlm.errors import Finding, RunError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x.csv"], "fix: graftlm train x.csv"),
        (["finetune", "x.csv"], "Did you mean train?"),
        (["help", "chat"], "fix: graftlm chat --help"),
        (["zzzz"], "There are: init, check, plan, train, evaluate"),
        (["--epochs", "3"], "--epochs"),
        (["train", "--epoch", "3"], "no such flag --epoch. Did you mean --epochs?"),
        (["train", "--max_length=64"], "fix: --max-length 64"),
        (["train", "--num_train_epochs", "3"], "fix: --epochs 3"),
        (["train", "--learning-rate", "2e-4"], "fix: --lr 2e-4"),
        (["train", "--train.batch=8"], "fix: --batch 8"),
        (["train", "--warmup", "0.1"], "fix: --set train.warmup=0.1"),
        (["train", "--gradient_accumulation_steps=2"], "fix: --set train.accumulate=2"),
        (["train", "--dataset", "x.csv"], "fix: x.csv"),
        (["train", "--batch_size", "4"], "--batch_size is called --batch here (rows per optimizer step)"),
        (["train", "--report_to", "none"], "--report_to has no counterpart here: leave it out"),
        (["train", "--qqqqq"], "no such flag --qqqqq; train has --test --map"),
        (["train", "--lr"], "requires an argument"),
        (["train", "a.csv", "b.csv"], "unexpected extra argument"),
        (["train", "--lr", "20"], "fix: --lr 2e-4"),
        (["train", "--task", "clasify"], "fix: --task classify"),
        (["train", "run.yaml"], "fix: -c run.yaml"),
        (["train", "-c", "nothing.yaml"], "no file 'nothing.yaml'"),
        (["evaluate"], "missing argument 'RUN'"),
        (["generate", "bundled", "x", "--max_tokens", "4"], "fix: --max-new-tokens 4"),
        (["generate", "bundled", "x", "--top-p", "7"], "--top-p"),
        (["generate", "bundled", "x", "--top-p", "0.5"], "fix: --temperature 0.7"),
        (["generate", "bundled", "x", "--vs", "base"], "nothing to compare"),
        (["generate", "bundled", "-5"], "write -- before a text"),
        (["generate", "bundeld", "x"], "Did you mean bundled?"),
        (["generate", "bundled"], "no text was given"),
        (["generate", "bundled", "x", "--file", "y.txt"], "exclude each other"),
        (["generate", "./nothing", "x"], "there is no './nothing'"),
        (["generate", "x.csv", "hi"], "x.csv is a data file"),
        (["predict", "bundled", "x"], "is a base model"),
        (["evaluate", "runs/nothing"], "there is no 'runs/nothing'"),
        (["chat", "runs/nothing"], "there is no 'runs/nothing'"),
        (["inspect", "faq.jsnl"], "no file 'faq.jsnl'"),
        (["inspect", "faq.jsonl"], "no file 'faq.jsonl'"),
        (["inspect", "bundled", "--map", "a=b"], "fix: leave out --map"),
        (["inspect", "bundled:messages", "--method", "lora"], "fix: leave out --method"),
        (["inspect", "bundled:mesages"], "Did you mean bundled:messages?"),
        (["explain", "D9"], "there is no code 'D9'"),
        (["methods", "lorra"], "Did you mean lora?"),
    ],
)
def test_wrong_words(cli: Callable, rooms: Rooms, tmp_path: Path, monkeypatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    answer = cli(*words)
    assert answer.code == 2
    assert answer.out == ""
    assert said in answer.err
    assert len(answer.err.splitlines()) <= 12
    assert "Traceback" not in answer.err
    assert "\x1b" not in answer.err
    assert not rooms.named("train_resolved")


def test_all_strange_flags_are_told_at_once_and_the_methods_together(cli: Callable, rooms: Rooms) -> None:
    err = cli("train", "--lora_r", "8", "--lora_alpha=16", "--num_train_epochs", "3").err
    assert "--method 'lora(rank=8,alpha=16)'" in err
    assert "fix: --epochs 3" in err


def test_a_value_that_looks_like_a_flag_is_left_alone(cli: Callable, rooms: Rooms) -> None:
    assert cli("train", "-o", "--lora_r").code == 0
    assert rooms.named("train_resolved")[0][0][0].settings.output == "--lora_r"
    assert cli("train", "-o--lora_r").code == 0


def test_a_file_in_place_of_a_verb(cli: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my data.csv").write_text("text,label\na,b\n")
    assert "fix: graftlm train 'my data.csv' --epochs 2" in cli("my data.csv", "--epochs", "2").err


def test_nearest_run_is_named(cli: Callable, adapter_folder: str) -> None:
    for words in (
        ["evaluate", "runs/faq-2"],
        ["chat", "runs/fq-1"],
        ["predict", "faq-1", "x"],
        ["inspect", "runs/faq1"],
    ):
        answer = cli(*words)
        assert (answer.code, "Did you mean runs/faq-1?" in answer.err) == (2, True), answer.err
    assert "fix: runs/faq-1" in cli("evaluate", "runs").err
    assert "fix: runs/faq-1" in cli("evaluate", "runs/faq-1/run.json").err


def test_a_run_without_an_adapter(cli: Callable, adapter_folder: str) -> None:
    Path(adapter_folder, "adapter", "adapter_config.json").unlink()
    assert "fix: graftlm train --resume -o runs/faq-1" in cli("chat", adapter_folder).err


def test_a_users_error_has_no_traceback_and_a_defect_has_one(cli: Callable, rooms: Rooms) -> None:
    rooms.error = RunError(Finding("U199", "no luck \x1b[2J", fix="try again"))
    answer = cli("train")
    assert (answer.code, answer.err) == (2, "no luck \ufffd[2J [U199]\n  fix: try again\n")
    rooms.error = ZeroDivisionError("defect")
    with pytest.raises(ZeroDivisionError):
        cli("train")


def test_interrupt(cli: Callable, rooms: Rooms) -> None:
    rooms.error = KeyboardInterrupt()
    assert cli("train").code == 130


def test_errors_are_red_on_a_terminal_only(monkeypatch) -> None:
    from graftlm.cli.output import show_error

    error = RunError(Finding("U199", "no luck", fix="try again"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for no_color, wanted in (("", "\x1b[31mno luck [U199]\x1b[0m\n  fix: try again\n"), ("1", f"{error}\n")):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stderr", Screen())
        show_error(error)
        assert sys.stderr.getvalue() == wanted


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-m", "graftlm", "explain"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ran.stderr == ""
    assert ran.returncode == 1


def test_telemetry_is_off() -> None:
    script = (
        "import os; from graftlm.cli import main; main(['--version']); print(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TOKENIZERS"))}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert ran.stdout.splitlines()[-1] == "1"


def test_other_libraries_do_not_speak_between(cli: Callable) -> None:
    cli("--version")
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
