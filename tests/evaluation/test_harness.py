"""Tasks of lm-evaluation-harness: scored with the adapter on and off, and refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm
from graftlm.errors import GraftError
from graftlm.evaluation import harness_scores
from graftlm.models import load_base
from graftlm.training import evaluate_harness
from training.tiny_runs import save_llama

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'graftlm[harness]'")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file with 24 questions of two answers each."""
    rows = [{"q": f"question {at}", "options": ["yes", "no"], "right": at * at % 3 % 2} for at in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "options.yaml"
    path.write_text(
        f"task: options\ndataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{options}}'\ndoc_to_target: right\n"
        "metric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
    )
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library that reads the rows keeps its copies."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """The share of the questions whose right answer is the likelier one."""
    right = 0
    for row in rows:
        asked = tokenizer(row["q"])["input_ids"]
        chances = []
        for option in row["options"]:
            ids = torch.tensor([asked + tokenizer(" " + option, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                found = model(ids).logits.log_softmax(-1)[0, len(asked) - 1 : -1]
            chances.append(float(found.gather(1, ids[0, len(asked) :, None]).sum()))
        right += chances.index(max(chances)) == row["right"]
    return right / len(rows)


def test_the_harness_counts_what_the_logits_say_with_the_adapter_on_and_off(task: Path, home: Path) -> None:
    model, tokenizer = load_base(str(save_llama(home / "base")), task="lm", dtype="float32")
    adapter = graftlm.attach(model, graftlm.method("lora(rank=4)+prompt(length=3)"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    (line,) = harness_scores(model, tokenizer, [str(task)], max_length=100)
    rows = [json.loads(row) for row in (home / "rows.jsonl").read_text().splitlines()]
    assert (line["task"], line["metric"], line["rows"], line["higher_is_better"]) == ("options", "acc", len(rows), True)
    assert line["tuned"] == by_hand(model, tokenizer, rows)
    with graftlm.use(model, None):
        assert line["base"] == by_hand(model, tokenizer, rows) != line["tuned"]
    (line,) = harness_scores(model, tokenizer, [str(task)], max_length=100, max_rows=4, with_base=False)
    assert line["tuned"] == by_hand(model, tokenizer, rows[:4])
    assert "base" not in line


def test_tasks_that_are_not_there_are_told_at_once(home: Path) -> None:
    (home / "broken.yaml").write_text("task: [")
    with pytest.raises(GraftError) as caught:
        harness_scores(None, None, [str(home / "none.yaml"), str(home / "nor_this.yaml")])
    assert [finding.code for finding in caught.value.findings] == ["D195", "D195"]
    with pytest.raises(GraftError, match=r"cannot load .*broken.yaml"):
        harness_scores(None, None, [str(home / "broken.yaml")])


def test_a_classifier_is_not_asked(tiny: Any, labelled: Path) -> None:
    run = tiny(labelled, steps=1)
    with pytest.raises(GraftError, match="the harness asks models that write"):
        evaluate_harness(run.folder, ["hellaswag"])
