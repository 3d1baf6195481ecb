"""`runs repeat`, `runs resume` and reading older records: the same run again, from any directory, by any later version."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm.cli import main
from graftlm.errors import SettingsError
from graftlm.settings import recorded
from graftlm.training import evaluate, train
from training.tiny_runs import (
    Tiny,
    adapter_bytes,
    answered_rows,
    leave_out_the_slow,
    metrics_of,
    record_of,
    rows_for,
    write_jsonl,
)

TINY = "-o runs/first --steps 4 --set train.batch=4 --set train.threads=1 --set generate.samples=0".split()  # noqa: SIM905


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that runs are started in, with data by a relative name."""
    leave_out_the_slow(monkeypatch.setattr)
    folder = tmp_path / "there"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(folder / "rows.jsonl", answered_rows())
    monkeypatch.chdir(folder)
    return folder


def test_a_repeated_run_gives_the_same_adapter_from_any_directory(
    there: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "lora(rank=2,targets=attention,dropout=0.1)"
    assert main(["train", "rows.jsonl", "-m", str(tiny_base), "--method", method, *TINY]) == 0
    assert main(["runs", "repeat", "first"]) == 0
    monkeypatch.chdir(there.parent / "elsewhere")
    assert main(["runs", "repeat", "first", "--folder", "../there/runs", "-o", "third"]) == 0
    first = adapter_bytes(there / "runs" / "first")
    assert adapter_bytes(there / "runs" / "first-1") == first
    assert adapter_bytes(Path("third")) == first
    assert record_of(Path("third"))["results"] == record_of(there / "runs" / "first")["results"]
    capsys.readouterr()
    assert main(["runs", "diff", "first", "first-1", "--folder", "../there/runs"]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_a_call_from_python_is_told_whole(there: Path, tiny_base: Path) -> None:
    given: dict[str, Any] = {"base": str(tiny_base), "epochs": 1.0, "batch": 4, "threads": 1, "samples": 0}
    run = train("rows.jsonl", output="told", quiet=True, **given)
    seen: dict[str, Any] = {}
    eval(run.record["command"], {"graftlm": SimpleNamespace(train=lambda **all_: seen.update(all_))})
    assert seen == {"data": "rows.jsonl", "output": "told", **given}
    run = train(answered_rows(), output="rows", quiet=True, **given)
    assert run.record["command"].startswith(
        f"graftlm.train(data=..., base={str(tiny_base)!r}, output='rows', epochs=1.0"
    )


def test_what_was_asked_for_and_what_was_not_is_kept(there: Path, tiny_base: Path) -> None:
    """The method of T-Few is IA3 by itself, but one that was asked for stays, when the run is repeated too."""
    write_jsonl(there / "choices.jsonl", rows_for("tfew"))
    asked = ["train", "choices.jsonl", "-m", str(tiny_base), "--task", "tfew", *TINY]
    assert main([*asked, "-o", "runs/own"]) == 0
    assert main([*asked, "--method", "lora(rank=16,targets=all-linear)", "-o", "runs/lora"]) == 0
    for name in ("own", "lora"):
        assert main(["runs", "repeat", name, "-o", f"runs/{name}-again"]) == 0
        first, again = (record_of(there / "runs" / run) for run in (name, f"{name}-again"))
        assert first["method"] == again["method"]
        assert first["method"].startswith({"own": "ia3", "lora": "lora"}[name])


def test_a_broken_off_run_is_taken_up_from_any_directory(
    there: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "rows.jsonl", "-m", str(tiny_base), "--method", "lora(rank=2,targets=attention,dropout=0.1)",
             "--set", "train.save_every=2", *TINY]  # fmt: skip
    assert main([*words, "-o", "runs/whole"]) == 0
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        patch.setattr("graftlm.training.trainer.rotate_checkpoints", fail)
        with pytest.raises(ZeroDivisionError):
            main(words)
    monkeypatch.chdir(there.parent / "elsewhere")
    assert main(["runs", "resume", "../there/runs/first"]) == 0
    first, whole = there / "runs" / "first", there / "runs" / "whole"
    assert adapter_bytes(first) == adapter_bytes(whole)
    assert [row["step"] for row in metrics_of(first)] == [row["step"] for row in metrics_of(whole)]


def test_a_record_with_settings_of_an_earlier_version_is_read(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, recompute="blocks")
    record = record_of(run.folder)
    del record["settings"]["train"]["recompute"], record["settings"]["preferences"]
    record["settings"]["train"]["gradient_checkpointing"] = True
    (run.folder / "run.json").write_text(json.dumps(record))
    assert evaluate(run.folder)["scores"][0]["loss"] == pytest.approx(run.metrics["loss"])
    assert recorded(record["settings"]).train.recompute == "blocks"
    assert recorded({"train": {"gradient_checkpointing": False}}) == recorded({})
    with pytest.raises(SettingsError, match="S101"):
        recorded({"train": {"no_such_thing": 1}})
