"""Whole runs on rows that are read while they train: as from a file read before, taken up at the right row, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.errors import DataError, RunError, SettingsError
from graftlm.training import GraftTrainer
from training.test_checkpoints import interrupted, stopped
from training.tiny_runs import (
    Tiny,
    answered_rows,
    labelled_rows,
    metrics_of,
    record_of,
    rows_for,
    same,
    texts,
    weights,
    write_jsonl,
)

STREAM: dict[str, Any] = {"stream": True, "steps": 8, "save_every": 2}


@pytest.fixture
def held(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "held.jsonl", answered_rows(60)[50:])


def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        GraftTrainer, "_get_train_sampler", lambda self, _=None: torch.utils.data.SequentialSampler(self.train_dataset)
    )


def test_the_weights_are_those_of_a_file_read_before_in_the_same_order(
    tiny: Tiny, tmp_path: Path, held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", answered_rows(48))
    given = {"eval_path": str(held), "steps": 20, "accumulate": 2}
    one = tiny(data, out="stream", stream=True, buffer=1, **given)
    with monkeypatch.context() as patch:
        in_order(patch)
        other = tiny(data, out="before", **given)
    assert same(weights(one), weights(other))
    assert one.metrics == other.metrics
    drawn = tiny(data, out="drawn", stream=True, **given)
    assert not same(weights(drawn), weights(other))
    counts = one.record["data"]["stream"]
    assert counts["drawn"] >= 80
    assert counts["passes"] == 2  # 12 steps a pass: a file that is too short is read again
    assert counts["read"] == counts["used"] == one.record["data"]["train_rows"] == 48


@pytest.mark.parametrize(
    "task", ["classify", "regress", "tag", "dpo", "kto", "choice", "tfew", "reward", "lm", "multi"]
)
def test_every_task_but_those_of_rewards_streams(task: str, tiny: Tiny, tmp_path: Path) -> None:
    if task == "lm":
        data = tmp_path / "text.txt"
        data.write_text(texts(2000))
    else:
        data = write_jsonl(tmp_path / "rows.jsonl", rows_for(task, 40))
    run = tiny(data, task={"multi": "classify"}.get(task, task), stream=True, steps=3, max_length=64)
    assert run.record["data"]["stream"]["left_out"] == 0
    assert run.record["steps"] == 3


def test_masked_tokens_are_others_in_each_pass(tiny: Tiny, tiny_bert: Path, tmp_path: Path, held: Path) -> None:
    from graftlm.data import MaskingCollator

    seen: list[tuple[int, Any]] = []
    real = MaskingCollator._hidden

    def hidden(self: MaskingCollator, item: Any) -> Any:
        found = real(self, item)
        if "pass" in item:
            seen.append((item["pass"], tuple(found["input_ids"])))
        return found

    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "The lamp stood by the window for a long time"}] * 12)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "A chair"}] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskingCollator, "_hidden", hidden)
        tiny(data, base=tiny_bert, task="mlm", stream=True, steps=6, eval_path=str(other), waive="D131")
    first, second = ({ids for at, ids in seen if at == which} for which in (0, 1))
    assert first
    assert second
    assert first != second


@pytest.mark.parametrize("how", ["kill", "ctrl-c"])
def test_a_stopped_run_goes_on_at_the_right_row(
    how: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = answered_rows(40)
    rows[30] = {"prompt": "Hi", "completion": None}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {**STREAM, "method": "lora(rank=2,targets=attention,dropout=0.1)", "steps": 12, "drop_bad_rows": True}
    whole = tiny(data, out="whole", **given)
    if how == "kill":
        stopped(tiny, data, 6, monkeypatch, out="run", **given)
    else:
        interrupted(tiny, data, 5, monkeypatch, out="run", **given)
    rest = tiny(data, out="run", resume=True, **given)
    assert same(weights(whole), weights(rest))
    assert rest.record["data"]["stream"] == whole.record["data"]["stream"]
    for run in (whole, rest):
        lines = [json.loads(line) for line in (run.folder / "data" / "rejected.jsonl").read_text().splitlines()]
        assert [line["place"] for line in lines] == ["rows.jsonl:31"]
    told = [[(row["step"], row.get("loss")) for row in metrics_of(run.folder)] for run in (whole, rest)]
    assert told[0] == told[1]


def test_a_run_is_not_taken_up_on_other_rows(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", answered_rows(40))
    stopped(tiny, data, 4, monkeypatch, out="run", **STREAM)
    write_jsonl(data, answered_rows(41))
    with pytest.raises(RunError, match="U109"):
        tiny(data, out="run", resume=True, **STREAM)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"epochs": 2.0}, "train.epochs"),
        ({}, "train.steps"),
        ({"steps": 4, "eval_share": 0.2}, "data.eval_share"),
        ({"steps": 4, "group": "prompt"}, "data.group"),
        ({"steps": 4, "data.mixture": {"a.jsonl": 1.0}}, "data.mixture"),
        ({"steps": 4, "merge_labels": True}, "data.merge_labels"),
        ({"steps": 4, "packing": True}, "train.packing"),
        ({"steps": 4, "group_by_length": True}, "train.group_by_length"),
        ({"steps": 4, "data.test": "0.1"}, "data.test"),
        ({"steps": 4, "task": "grpo"}, "task"),
    ],
)
def test_what_needs_all_rows_at_once_is_refused(
    given: dict[str, Any], word: str, tiny: Tiny, answered: Path, tmp_path: Path
) -> None:
    given = {"epochs": None, **given}
    data = None if "data.mixture" in given else answered
    with pytest.raises(SettingsError) as refused:
        tiny(data, stream=True, **given)
    assert {finding.code for finding in refused.value.findings} == {"S107"}
    assert word in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_bundled_messages_stream_and_are_evaluated_again(tiny: Tiny, tmp_path: Path) -> None:
    from graftlm.training.evaluating import evaluate

    data = write_jsonl(tmp_path / "rows.jsonl", labelled_rows(60))
    run = tiny(data, stream=True, steps=4)
    assert evaluate(run.folder)["scores"][0]["macro_f1"] == run.metrics["macro_f1"]
    assert "read while training" in record_of(run.folder)["data"]["line"]
    assert run.record["data"]["stream_line"].startswith("60 rows read: ")


def test_a_stream_that_breaks_off_keeps_what_was_learnt(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    lines = ["prompt,completion", *(f"question {at},answer {at}" for at in range(1400)), '"never closed,x']
    data.write_text("\n".join(lines))
    with pytest.raises(DataError, match="D105"):
        tiny(data, stream=True, steps=400, batch=4, buffer=10, save_every=100, eval_every=400)
    assert record_of(tmp_path / "run")["status"] == "failed"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_rows_of_like_length_share_a_batch(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, int]] = []
    real = GraftTrainer.training_step

    def step(self: GraftTrainer, model: Any, inputs: Any, *more: Any) -> Any:
        mask = inputs["attention_mask"]
        widths.append((mask.numel(), int(mask.sum())))
        return real(self, model, inputs, *more)

    monkeypatch.setattr(GraftTrainer, "training_step", step)
    rows = [{"prompt": f"Question {at}", "completion": "word " * (1 + at % 7 * 12)} for at in range(120)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"epochs": 2.0, "batch": 4, "max_length": 100, "save_every": 15}
    plain = tiny(data, out="plain", **given)
    padded = 1 - sum(filled for _, filled in widths) / sum(size for size, _ in widths)
    widths.clear()
    grouped = tiny(data, out="grouped", group_by_length=True, **given)
    assert 1 - sum(filled for _, filled in widths) / sum(size for size, _ in widths) < padded / 2
    assert sum(filled for _, filled in widths) > 1000
    assert grouped.record["steps"] == plain.record["steps"]
    halves = widths[: len(widths) // 2], widths[len(widths) // 2 :]
    assert sorted(filled for _, filled in halves[0]) != sorted(filled for _, filled in halves[1])  # other batches
    stopped(tiny, data, 30, monkeypatch, out="again", group_by_length=True, **given)
    again = tiny(data, out="again", group_by_length=True, resume=True, **given)
    assert same(weights(again), weights(grouped))
