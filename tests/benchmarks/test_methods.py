"""What the benchmark of every method makes of its runs: gains over the yardstick, spread, and what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import methods as benchmark


def runs_of(task: str, method: str, scores: list[float], start: float, times: float = 1.0) -> list[dict]:
    sizes = {} if method in benchmark.PROBES else dict.fromkeys(benchmark.COLUMNS, 1.0)
    common = {"task": task, "method": method, "times": times, "start_score": start, "trainable_share": 0.01}
    return [common | sizes | {"trainable_parameters": 10, "seed": s, "score": x} for s, x in enumerate(scores)]


@pytest.fixture
def found() -> dict:
    told = {"train_rows": 1, "held_rows": 1, "steps": 1, "batch": 1, "yardstick": "frozen base with its trained head"}
    runs = [
        *runs_of("sst2", "head", [0.5, 0.5, 0.5], 0.4),
        *runs_of("sst2", "probe", [0.6, 0.7, 0.65], 0.4),
        *runs_of("sst2", "lora", [0.8, 0.92, 0.85], 0.4),
        *runs_of("sst2", "lora", [0.0, 0.0, 0.0], 0.4, times=10.0),
        *runs_of("sst2", "bitfit", [0.7, 0.6, 0.65], 0.4),
        *runs_of("sst2", "full", [0.9], 0.4),
        {"task": "sst2", "method": "attempt", "seed": 0, "times": 1.0, "start_score": 0.4, "refused": "it cannot\nbe"},
        *runs_of("answers", "lora", [3.0, 3.2], 4.0),
    ]
    tasks = {
        "sst2": told | {"title": "SST-2", "metric": "accuracy", "better": "higher"},
        "answers": told | {"title": "answers", "metric": "loss", "better": "lower"},
    }
    made = {"tasks": tasks, "methods": {run["method"]: run["method"] for run in runs}, "runs": runs}
    return made | {"summary": benchmark.summarised(made)}


def test_the_yardstick_is_the_better_of_head_and_probe(found):
    rows = found["summary"]["sst2"]
    assert [name for name, row in rows.items() if row["yardstick"]] == ["probe"]
    assert rows["head"]["gain"] == pytest.approx(-0.15)
    assert rows["lora"]["gain"] == pytest.approx((0.2 + 0.22 + 0.2) / 3)  # paired by seed; rates times ten do not count
    assert rows["lora"]["gain_se"] == pytest.approx(0.02 / 3)
    assert rows["lora"]["score_sd"] == pytest.approx(0.0603, abs=1e-4)


def test_who_passes(found):
    rows = found["summary"]["sst2"]
    passes = {name: row["passes"] for name, row in rows.items()}
    # One seed says nothing; yardsticks are not measured against themselves.
    assert passes == {"head": None, "probe": None, "lora": True, "bitfit": False, "full": None}


def test_lower_is_better_for_losses(found):
    row = found["summary"]["answers"]["lora"]
    assert row["gain"] == pytest.approx(0.9)
    assert row["passes"] is True


def test_the_table_names_what_is_missing(found, monkeypatch):
    monkeypatch.setitem(benchmark.WHY, ("sst2", "bitfit"), "too few steps")
    found["summary"] = benchmark.summarised(found)
    text = benchmark.table(found)
    assert "| `lora` | 3 | 85.7 (6.0) | +20.7 (0.7) |" in text
    assert "- `bitfit`: too few steps" in text
    assert "- `attempt` cannot be there: it cannot\n" in text
    sst2, emotion, answers, e2e = text.split("### ")[1:]
    assert "`prefix`" in sst2.partition("Not run yet: ")[2].partition(".")[0]
    assert "`lora`" not in sst2.partition("Not run yet: ")[2].partition(".\n")[0]
    assert "Fewer than three seeds yet, so little is shown: `full`." in sst2
    assert "Fewer than three seeds yet, so little is shown: `lora`." in answers
    assert "Not run yet.\n" in emotion
    assert "Not run yet.\n" in e2e


def test_the_plot_is_drawn(found, tmp_path):
    benchmark.plot(found, tmp_path / "found.svg")
    assert (tmp_path / "found.svg").stat().st_size > 10_000


def test_validation_rows_are_not_test_rows():
    train, held = benchmark.drawn("answers", 0, Path("none"), valid=False)
    some, valid = benchmark.drawn("answers", 0, Path("none"), valid=True)
    texts = [row["prompt"] for row in valid]
    assert {row["prompt"] for row in held}.isdisjoint(texts)
    assert len(some) + len(valid) == len(train)
