"""The comparison's page and tables from a record alone, and the treemap of a run's parameters."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.errors import RunError
from graftlm.report import charts, write_comparison, write_report

from .conftest import classification
from .test_page import Tags, text_of

COST = {
    "parameters": 12_000, "beside_head": 11_000, "memory_bytes": 150_000_000, "seconds": 12.5, "adapter_bytes": 50_000,
    "train_flops": 1e12, "query_flops": 1e9,
}  # fmt: skip


def row(name: str, score: float, kind: str = "trained", **more: Any) -> dict[str, Any]:
    found = {"name": name, "title": name, "kind": kind, "score": score, "low": score - 0.02, "high": score + 0.02,
             "seeds": 3, "by_seed": [score - 0.01, score, score + 0.01]}  # fmt: skip
    if kind == "trained":
        found |= {"method": f"{name}(rank=2)", "learning_rate": 1e-3, "factor": 1.0}
        found["cost"] = COST | {"parameters": 12_000 * len(name)}
    return found | more


def pair(one: str, other: str, difference: float, p: float, verdict: str) -> dict[str, Any]:
    return {"one": one, "other": other, "difference": difference, "low": difference - 0.01, "high": difference + 0.01,
            "p_value": p, "p_corrected": p, "verdict": verdict}  # fmt: skip


RECORD: dict[str, Any] = {
    "status": "done", "command": "graftlm compare a&b.csv", "steps": 40, "task": "classify",
    "settings": {"batch": 8, "seeds": 3, "trials": 4, "general": "books.txt"},
    "rows": {"train": 100, "validation": 20, "test": 50},
    "data": {"sha256": {"/home/me/a&b.csv": "9f86"}, "lines": ["a&b.csv  170 rows"]},
    "base": {"name": "bundled", "class": "X", "fingerprint": "ab", "parameters": 4_000_000, "sha256_before": "77aa",
             "sha256_after": "77aa"},
    "environment": {"torch": "2.13.0"},
    "summary": {
        "measure": "accuracy", "higher_is_better": True, "best_baseline": "tfidf",
        "contestants": [
            row("lora", 0.9), row("ia3_<b>", 0.89), row("full", 0.7),
            row("in-context-2", 0.6, "in-context", prompting={
                "query_flops": 9e9, "cached_query_flops": 2e9, "cache_bytes": 4e5, "query_seconds": 1.0,
                "cached_query_seconds": 0.5}),
            row("tfidf", 0.5, "baseline", title="TF-IDF"),
        ],
        "pairs": [
            pair("lora", "ia3_<b>", 0.01, 0.4, "not distinguishable"), pair("lora", "full", 0.2, 0.01, "better"),
            pair("lora", "in-context-2", 0.3, 0.001, "better"), pair("ia3_<b>", "full", 0.19, 0.01, "better"),
            pair("ia3_<b>", "in-context-2", 0.29, 0.01, "better"), pair("full", "in-context-2", 0.1, 0.2, "not distinguishable"),
        ],
        "against_baseline": [pair("lora", "tfidf", 0.4, 0.001, "better")],
        "fronts": {key: ["lora"] for key in ("parameters", "memory_bytes", "seconds", "adapter_bytes")},
    },
}  # fmt: skip


def written(place: Path) -> Path:
    """The record in a folder."""
    record = copy.deepcopy(RECORD)
    for line in record["summary"]["contestants"]:
        if line["kind"] == "trained":
            line["break_even"] = {"in-context-2": {"plain": 125.0, "cached": None}}
    place.mkdir(exist_ok=True)
    (place / "comparison.json").write_text(json.dumps(record))
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


def test_the_page_says_what_the_record_says_and_needs_nothing_from_outside(folder: Path) -> None:
    page = write_comparison(folder).read_text(encoding="utf-8")
    Tags(page)  # every tag is closed
    said = text_of(page)
    for part in (
        "lora leads, 1 of 3 are not distinguishable from it", "It cannot be told apart from ia3_<b>",
        "It is better than full and in-context-2", "It beats the strongest baseline, TF-IDF",
        "bit-identical before and after", "77aa", "= 0.010 p 0.4", "125", "never", "graftlm compare a&b.csv",
    ):  # fmt: skip
        assert part in said, part
    assert "<b>" not in page, "names are escaped"
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "/home/me" not in page
    assert write_comparison(folder).read_text(encoding="utf-8") == page


def test_tables_for_other_programs(folder: Path) -> None:
    write_comparison(folder)
    found = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert [line["name"] for line in found] == ["lora", "ia3_<b>", "full", "in-context-2", "tfidf"]
    assert float(found[0]["score"]) == 0.9
    assert found[-1]["parameters"] == ""
    tex = (folder / "table.tex").read_text()
    assert "ia3\\_" in tex
    assert tex.count("\\\\") == 6
    assert len({line.count("|") for line in (folder / "table.md").read_text().splitlines()}) == 1


def test_what_has_not_finished_has_no_page(folder: Path) -> None:
    (folder / "comparison.json").write_text('{"status": "running"}')
    with pytest.raises(RunError, match="not finished"):
        write_comparison(folder)
    (folder / "comparison.json").unlink()
    with pytest.raises(RunError, match="no comparison.json"):
        write_comparison(folder)


@given(st.lists(st.floats(0.5, 1000), min_size=1, max_size=30), st.floats(20, 800), st.floats(20, 800))
def test_areas_are_as_large_as_their_numbers_and_fill_the_box(sizes: list[float], width: float, height: float) -> None:
    boxes = charts._squares(sizes, (5.0, 7.0, width, height))
    for size, (x, y, w, h) in zip(sizes, boxes, strict=True):
        assert w * h == pytest.approx(size / sum(sizes) * width * height, rel=1e-6)
        assert 5 - 1e-6 <= x <= x + w <= 5 + width + 1e-6
        assert 7 - 1e-6 <= y <= y + h <= 7 + height + 1e-6
    for at, (x, y, w, h) in enumerate(boxes):
        for u, v, a, b in boxes[:at]:
            assert x + w <= u + 1e-6 or u + a <= x + 1e-6 or y + h <= v + 1e-6 or v + b <= y + 1e-6


def test_a_runs_page_shows_where_its_parameters_are_and_the_plan(tmp_path: Path) -> None:
    folder = classification(tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    run["trained_at"] = [
        {"layer": layer, "role": role, "parameters": 500 * (layer + 1)}
        for layer in (0, 1)
        for role in ("query", "value")
    ] + [{"layer": None, "role": "head", "parameters": 100}]
    run["plan"] = {
        "total_bytes": 800_000_000,
        "terms": {"weights": 600_000_000, "activations": 200_000_000, "logits": 0},
    }
    (folder / "run.json").write_text(json.dumps(run))
    page = write_report(folder).read_text()
    said = text_of(page)
    assert "Where its parameters are" in said
    assert 'aria-label="Trained parameters by place. layer 1: 64.5 %; layer 0: 32.3 %; whole model: 3.2 %"' in page
    assert "planned: weights" in said
    assert "planned: logits" not in said
    assert "held at most by the process" in said
