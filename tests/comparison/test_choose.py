"""Choosing: halving, limits, importance, the margin."""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from graftlm.cli import usage
from graftlm.comparison.bench import Bench, open_bench
from graftlm.comparison.choosing import choose, importance, proposals
from graftlm.comparison.settings import ComparisonSettings
from graftlm.errors import GraftError
from graftlm.settings import resolve
from training.tiny_runs import labelled_rows, write_jsonl

SMALL: dict[str, Any] = {"steps": 4, "batch": 4, "waive": ("D129",)}
FEW = ["lora(rank=2)", "bitfit", "norm"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", labelled_rows(40))


def test_the_better_ones_go_on_and_the_margin_is_told(rows: Path, tiny_bert: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = choose(rows, base=tiny_bert, candidates=FEW, rounds=2, output=tmp_path / "out", say=said.append, **SMALL)
    record = json.loads((tmp_path / "out" / "choice.json").read_text())
    first, second = ([t for t in record["trials"] if t["round"] == n] for n in (1, 2))
    assert [len(first), len(second)] == [6, 2]
    assert {t["steps"] for t in first} == {1}
    assert {t["steps"] for t in second} == {4}
    best = sorted(first, key=lambda trial: trial["value"])[:2]
    assert {(t["method"], t["factor"]) for t in best} == {(t["method"], t["factor"]) for t in second}
    final = record["final"]
    assert final["margin_low"] <= final["margin"] <= final["margin_high"]
    assert final["verdict"] in ("better", "not distinguishable")
    assert found.method == final["winner"]["method"] == record["chosen"]["method"]
    assert found.method in found.command
    assert len(said) == 2 + 6 + 2 + 2
    with pytest.raises(GraftError, match="holds a choice already"):
        choose(rows, base=tiny_bert, candidates=FEW, output=tmp_path / "out", **SMALL)


def test_the_command_reads_and_trains_as_the_choice_did(tiny_bert: Path, tmp_path: Path) -> None:
    given = [
        {"who": f"w{at // 4}", "body": row["text"], "kind": row["label"]} for at, row in enumerate(labelled_rows(40))
    ]
    rows = write_jsonl(tmp_path / "my rows.jsonl", [*given, {"who": "w9", "body": None, "kind": None}])
    settings = SMALL | {"mapping": {"text": "body", "label": "kind"}, "drop_bad_rows": True, "group": "who"}
    found = choose(rows, base=tiny_bert, candidates=["norm"], rounds=1, **settings)
    words = shlex.split(found.command)
    assert words[:3] == ["graftlm", "train", str(rows)]
    verb = importlib.import_module("graftlm.cli.train").verb
    assert not list(usage._strange_flags(verb, words[2:]))
    sets = [word for before, word in itertools.pairwise(words) if before == "--set"]
    read = resolve(sets=sets).settings.data
    assert (read.drop_bad_rows, read.group, read.waive) == (True, "who", "D129")
    assert "--map text=body,label=kind" in found.command
    assert "--steps 4" in found.command
    assert "--batch 4" in found.command


def test_groups_stay_whole_in_every_part(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [row | {"who": f"w{at % 10}"} for at, row in enumerate(labelled_rows(60))]
    settings = ComparisonSettings(
        data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), base=str(tiny_bert), group="who", **SMALL
    )
    bench = open_bench(settings)
    parts = [{item["example"].raw["who"] for item in part} for part in (bench.train, bench.validation, bench.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10


def test_what_does_not_fit_is_not_trained(rows: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_bench(ComparisonSettings(data=str(rows), base=str(tiny_bert), **SMALL))
    from graftlm.methods import read_method

    held = {text: bench.memory_bytes(read_method(text)) for text in ("norm", "full")}
    assert held["full"] > held["norm"]
    limit = (held["full"] + held["norm"]) // 2
    found = choose(rows, base=tiny_bert, candidates=["norm", "full"], rounds=1, memory_bytes=limit, **SMALL)
    assert found.record["dropped"] == [{"method": "full", "why": "memory", "memory_bytes": held["full"]}]
    assert {trial["method"] for trial in found.record["trials"]} == {"norm"}
    monkeypatch.setattr(Bench, "fitted", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(GraftError, match=r"the smallest holds") as caught:
        choose(rows, base=tiny_bert, candidates=["norm"], memory_bytes=10, **SMALL)
    assert caught.value.findings[0].code == "U158"
    with pytest.raises(GraftError, match="lorra"):
        choose(rows, base=tiny_bert, candidates=["lorra"], **SMALL)


def test_what_is_too_slow_is_dropped(rows: Path, tiny_bert: Path) -> None:
    with pytest.raises(GraftError, match="the fastest takes"):
        choose(rows, base=tiny_bert, candidates=["norm"], time_s=1e-9, **SMALL)


def test_importance_finds_the_layer_that_the_loss_depends_on(rows: Path, tmp_path: Path) -> None:
    from training.tiny_runs import save_llama

    base = save_llama(tmp_path / "deep", layers=4)
    bench = open_bench(ComparisonSettings(data=str(rows), base=str(base), **SMALL))
    before = bench.weights_sha256()
    ranked = importance(bench)
    assert sum(ranked["layer"].values()) == pytest.approx(1)
    assert sum(ranked["role"].values()) == pytest.approx(1)
    assert bench.weights_sha256() == before
    # A layer whose output is cut off has no gradient, so it must come last.
    import torch

    with torch.no_grad():
        bench.model.model.layers[1].self_attn.o_proj.weight.zero_()
        bench.model.model.layers[1].mlp.down_proj.weight.zero_()
        for name in ("o_proj",):
            getattr(bench.model.model.layers[1].self_attn, name).weight.zero_()
    again = importance(bench)["layer"]
    assert again["1"] < ranked["layer"]["1"]
    texts = proposals(importance(bench))
    assert len(texts) == 2
    assert "layers=[" in texts[0]
    assert all("targets" in text for text in texts)
