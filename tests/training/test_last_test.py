"""Test rows: neither trained on nor evaluated on while training, scored once at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import GraftError
from graftlm.training import evaluate
from training.tiny_runs import Tiny, answered_rows, labelled_rows, record_of, weights, write_jsonl


def _rows_seen(patch: pytest.MonkeyPatch) -> tuple[set[str], list[int]]:
    """The keys of the rows that are trained or evaluated on, and how many rows each scoring had."""
    from graftlm.training import GraftTrainer
    from graftlm.training.tasks import Learnt

    seen: set[str] = set()
    scored: list[int] = []
    real, score = GraftTrainer.__init__, Learnt.score

    def init(self: Any, *args: Any, **options: Any) -> None:
        seen.update(item["example"].key for name in ("train_dataset", "eval_dataset") for item in options[name])
        real(self, *args, **options)

    def score_of(self: Any, held: Any, train: Any = ()) -> Any:
        scored.append(len(held))
        return score(self, held, train)

    patch.setattr(GraftTrainer, "__init__", init)
    patch.setattr(Learnt, "score", score_of)
    return seen, scored


def test_a_share_is_held_out_from_everything_else(tiny: Tiny, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, scored = _rows_seen(monkeypatch)
    run = tiny(labelled, test="0.2", steps=3, eval_every=1)
    results = run.record["results"]
    assert (len(seen), results["test"]["rows"], scored) == (16, 4, [3, 4])
    lines = [json.loads(line) for line in (run.folder / "eval" / "test.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert not {line["text"] for line in lines} & seen
    assert {line["label"] for line in lines} == {"return", "track"}  # each label has its share
    assert results["test"]["scores"][0]["accuracy"] == sum(line["label"] == line["predicted"] for line in lines) / 4
    # What is scored again are the held-out rows, not those of the test.
    assert evaluate(run.folder)["eval_rows"] == results["eval_rows"] == 3


def test_a_file_of_test_rows(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"New {at}", "completion": "Yes"} for at in range(3)]
    plain = tiny(answered, out="plain", steps=2)
    run = tiny(answered, out="tested", steps=2, test=str(write_jsonl(tmp_path / "test.jsonl", rows)))
    assert run.record["results"]["test"]["rows"] == 3
    assert run.record["results"]["test"]["scores"][0]["loss"] > 0
    assert len(run.record["data"]["sha256"]) == 2
    for name, tensor in weights(plain).items():  # the test changes nothing
        assert tensor.equal(weights(run)[name])
    assert plain.record["results"]["scores"] == run.record["results"]["scores"]


def test_rows_that_were_trained_on_are_no_test(tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"test rows .* also in train"):
        tiny(answered, test=str(write_jsonl(tmp_path / "test.jsonl", answered_rows()[:5])))
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "label": "strange"} for row in labelled_rows()[:3]])
    with pytest.raises(GraftError, match="D110"):
        tiny(answered, test=str(other))
    with pytest.raises(GraftError, match="D133"):
        tiny(answered, test="20")
    alike = write_jsonl(tmp_path / "alike.jsonl", answered_rows()[:1] * 9)
    with pytest.raises(GraftError, match="D133") as caught:
        tiny(alike, test="0.2")
    assert caught.value.findings[0].fix == "--set data.test=null"


def test_the_report_tells_it(tiny: Tiny, labelled: Path) -> None:
    from graftlm.report import write_report

    run = tiny(labelled, test="0.2", steps=1)
    page = write_report(run.folder).read_text()
    assert "test, looked at once" in page
    assert record_of(run.folder)["results"]["test"]["line"].split(" (")[0] in page
