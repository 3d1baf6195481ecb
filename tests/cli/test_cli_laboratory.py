"""The verbs of the laboratory: what they hand over, what they show, and how mistakes are answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm import comparison
from graftlm.comparison import comparing
from graftlm.comparison.settings import ComparisonSettings
from graftlm.formats.exporting import Exported

SUMMARY: dict[str, Any] = {
    "measure": "accuracy",
    "contestants": [
        {"name": "lora", "kind": "trained", "score": 0.9, "low": 0.88, "high": 0.92,
         "cost": {"parameters": 12_000, "seconds": 3.25}},
        {"name": "ia3", "kind": "trained", "score": 0.8, "low": 0.78, "high": 0.82,
         "cost": {"parameters": 900, "seconds": 2.0}},
        {"name": "tfidf", "kind": "baseline", "score": 0.6, "low": 0.5, "high": 0.7},
    ],
    "pairs": [{"one": "lora", "other": "ia3", "verdict": "better", "p_corrected": 0.01}],
}  # fmt: skip


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ComparisonSettings, dict[str, Any]]]:
    calls: list[tuple[ComparisonSettings, dict[str, Any]]] = []

    def compare_with(settings: ComparisonSettings, **options: Any) -> Any:
        calls.append((settings, options))
        return SimpleNamespace(record={"summary": SUMMARY}, report=Path("comparisons/a b/report.html"))

    monkeypatch.setattr(comparing, "compare_with", compare_with)
    return calls


def test_compare_hands_over_what_was_given_and_shows_verdicts(cli: Callable, handed: list[Any]) -> None:
    said = cli(
        "compare", "x.csv", "-m", "y/z", "--methods", "lora(rank=4,alpha=8),ia3", "--seeds", "3", "--budget", "0.3%",
        "--shots", "2, 4", "--map", "text=body", "--no-full", "--waive", "D129, D132", "-o", "out",
        "--set", "data.drop_bad_rows=true", "--set", "data.group=who",
    )  # fmt: skip
    assert said.code == 0, said.err
    settings, options = handed[0]
    assert settings.methods == ("lora(rank=4,alpha=8)", "ia3")
    assert (settings.seeds, settings.budget, settings.shots, settings.full) == (3, "0.3%", (2, 4), False)
    assert (settings.mapping, settings.waive, options["output"]) == ({"text": "body"}, ("D129", "D132"), "out")
    assert (settings.drop_bad_rows, settings.group) == (True, "who")
    assert "--shots" in options["command"]
    for part in ("lora  ", "best", "worse (p 0.01)", "baseline", "12,000", "'comparisons/a b/report.html'"):
        assert part in said.out, part
    assert json.loads(cli("compare", "x.csv", "--json").out) == SUMMARY


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("compare", "x.csv", "--shots", "two"), "no list of whole numbers"),
        (("compare", "x.csv", "--seeds", "0"), "seeds"),
        (("compare", "x.csv", "--budget", "lots"), "U155"),
        (("compare", "x.csv", "--set", "train.batch=4"), "not train.batch"),
        (("choose", "x.csv", "--set", "data.drop_bad_rows=maybe"), "data.drop_bad_rows"),
        (("compare", "x.csv", "--steps", "3", "--epochs", "2"), "exclude each other"),
        (("compare", "no-such.csv", "--trials", "1"), "no-such.csv"),
        (("compare", "bundled:mesages", "--trials", "1"), "no bundled data"),
        (("choose", "x.csv", "--memory", "2XB"), "no number with a unit"),
        (("choose", "x.csv", "--time", "soon"), "no number with a unit"),
        (("choose", "no-such.csv"), "no-such.csv"),
        (("export", "runs/none"), "there is no 'runs/none'"),
        (("export", "bundled"), "is a base model"),
        (("export", "x", "--to", "gguf"), "gguf"),
        (("report", "runs/none"), "no folder 'runs/none'"),
        (("report", "."), "neither a run nor a comparison"),
        (("comapre", "x.csv"), "Did you mean compare"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(
    cli: Callable, words: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli(*words)
    assert said.code == 2
    assert why in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_choose_shows_the_margin(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def choose(data: Any, **options: Any) -> Any:
        calls.append((data, options))
        record = {
            "chosen": {"parameters": 1200, "test_score": 0.91}, "measure": "accuracy",
            "dropped": [{"method": "full", "why": "memory"}],
            "final": {"runner_up": {"method": "ia3"}, "margin": 0.02, "margin_low": -0.01, "margin_high": 0.05,
                      "p_value": 0.2, "verdict": "not distinguishable"},
        }  # fmt: skip
        return SimpleNamespace(record=record, method="lora", learning_rate=1e-3, command="graftlm train x.csv")

    monkeypatch.setattr(comparison, "choose", choose)
    said = cli("choose", "x.csv", "--memory", "2 GB", "--time", "1.5min", "--candidates", "lora(rank=2,alpha=4),ia3")
    assert said.code == 0, said.err
    data, options = calls[0]
    assert data == "x.csv"
    assert (options["memory_bytes"], options["time_s"]) == (2 * 10**9, 90)
    assert options["candidates"] == ["lora(rank=2,alpha=4)", "ia3"]
    for part in ("left out full: memory", "chosen   lora", "+0.0200 (-0.0100 to +0.0500) over ia3", "graftlm train"):
        assert part in said.out, part


def test_export_says_how_it_was_proven(cli: Callable, adapter_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm import training

    def export(path: Any, folder: Path, **options: Any) -> Exported:
        assert options == {"to": "merged", "base": None, "rows": 8}
        return Exported(folder, "merged", 2.5e-6, 1.0, 8, "graftlm generate x")

    monkeypatch.setattr(training, "export", export)
    out = cli("export", adapter_folder).out
    assert "exports/faq-1-merged" in out
    assert "largest difference of a logit 2.5e-06, 100.0 % of choices equal" in out


def test_report_writes_what_is_there(cli: Callable, tmp_path: Path) -> None:
    from report.conftest import classification
    from report.test_comparison import RECORD

    run = classification(tmp_path / "run")
    said = cli("report", str(run))
    assert said.code == 0, said.err
    assert (run / "report.html").is_file()
    assert (run / "README.md").is_file()
    record = json.loads(json.dumps(RECORD))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(record))
    assert "table.tex" in cli("report", str(tmp_path / "c")).out
