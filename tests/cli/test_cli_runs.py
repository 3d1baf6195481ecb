"""`init`, `check`, `runs` and `doctor` at the command line, where no model is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftlm.cli.doctor import TESTED, _number, _tried, _version, examine
from graftlm.settings import resolve


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rate in (("faq-1", 1e-3), ("faq-2", 2e-3)):
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        record = {"status": "done", "settings": {"train": {"learning_rate": rate}, "output": name}, "method": "lora"}
        (place / "run.json").write_text(json.dumps(record))


def test_init_writes_a_run_file_that_can_be_read_and_overwrites_nothing(cli: Callable[..., Any]) -> None:
    Path("tickets.csv").write_text("text,label\na,b\n")
    assert cli("init", "tickets.csv", "-m", "models/x").code == 0
    settings = resolve(Path("run.yaml")).settings
    assert (settings.data.path, settings.model.name) == ("tickets.csv", "models/x")
    assert "# " in Path("run.yaml").read_text()
    again = cli("init", "tickets.csv")
    assert (again.code, "[L107]" in again.err, "-o run-2.yaml" in again.err) == (2, True, True)
    assert "[D101]" in cli("init", "tickts.csv", "-o", "x.yaml").err
    assert "[L103]" in cli("init").err


def test_init_lists_what_it_changed(cli: Callable[..., Any]) -> None:
    Path("ax.yaml").write_text("lora_r: 8\nnum_epochs: 2\nwandb_project: x\n")
    done = cli("init", "--from", "ax.yaml")
    assert done.code == 0
    assert "num_epochs: 2 is train.epochs: 2" in done.err
    assert "wandb_project: x is left out" in done.err
    assert resolve(Path("run.yaml")).settings.method == "lora(rank=8)"


def test_check_tells_settings_without_torch(cli: Callable[..., Any]) -> None:
    Path("run.yaml").write_text("train:\n  learning_rte: 1\n  epocs: 2\n")
    told = json.loads(cli("check", "-c", "run.yaml", "--json").out)
    assert [(one["code"], one["kind"], one["place"]) for one in told] == [
        ("S101", "error", "run.yaml:2:3"), ("S101", "error", "run.yaml:3:3"),
    ]  # fmt: skip
    plain = cli("check", "-c", "run.yaml")
    assert plain.code == 2
    assert plain.out.splitlines()[-1].startswith("2 to mend, 0 to know of")


def test_runs_are_listed_shown_told_apart_and_removed(cli: Callable[..., Any]) -> None:
    assert [row["run"] for row in json.loads(cli("runs", "--json").out)] == ["faq-1", "faq-2"]
    assert "faq-1" in cli("runs").out
    assert json.loads(cli("runs", "show", "faq-1", "--json").out)["status"] == "done"
    told = json.loads(cli("runs", "diff", "faq-1", "faq-2", "--json").out)
    assert told == {"settings.train.learning_rate": [1e-3, 2e-3]}
    asked = cli("runs", "remove", "faq-2")
    assert (asked.code, "[L108]" in asked.err, Path("runs/faq-2").is_dir()) == (2, True, True)
    assert cli("runs", "remove", "faq-2", "--yes").code == 0
    assert not Path("runs/faq-2").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("runs", "lst"), "L103", "graftlm runs list"),
        (("runs", "show", "fq-1"), "U101", "graftlm runs show faq-1"),
        (("runs", "diff", "faq-1"), "L103", "wants 2 runs, got 1"),
    ],
)
def test_what_runs_cannot_do_is_told(words: tuple[str, ...], code: str, says: str, cli: Callable[..., Any]) -> None:
    done = cli(*words)
    assert done.code == 2
    assert f"[{code}]" in done.err
    assert says in done.err


def test_doctor_finds_this_machine_able(cli: Callable[..., Any]) -> None:
    lines = list(examine())
    assert {line.subject for line in lines} >= {
        "Python",
        "disk",
        "memory",
        "threads",
        "offline",
        "cpu float32",
        *TESTED,
    }
    assert not [line for line in lines if line.state == "fail"]
    assert all(line.mend for line in lines if line.state != "pass")


def test_doctor_tells_of_types_that_are_slow_wrong_or_missing() -> None:
    def missing(device: str, name: str) -> float:
        raise RuntimeError(f"{name} is not implemented for {device}\nat some place")

    def always(value: float) -> Callable[[str, str], float]:
        return lambda _device, _name: value

    lines = [_tried("cpu", "bfloat16", *given) for given in (
        (always(0.001), always(1.2)), (always(0.001), always(25)), (always(0.5), always(1)), (missing, always(1)),
    )]  # fmt: skip
    assert [line.state for line in lines] == ["pass", "warn", "fail", "warn"]
    assert "25 times as long as in float32" in lines[1].found
    assert {line.mend for line in lines[1:]} == {"--set model.dtype=float32"}


def test_doctor_tells_of_versions(cli: Callable[..., Any]) -> None:
    assert _number("2.13.0+cpu") == (2, 13, 0)
    assert _number("2.9") < _number("2.13")
    assert _version("click", "99", "100").state == "fail"
    assert _version("click", "1", "2").state == "warn"
    assert (missing := _version("no-such-package", "1", "2")).state == "fail"
    assert missing.mend == "pip install 'no-such-package>=1,<2'"
