"""Whole runs: every kind of data, both kinds of base, what a run leaves behind, and how it is opened again."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from graftlm.core import use
from graftlm.errors import GraftError
from graftlm.models import fingerprint
from graftlm.training import Run, evaluate, open_adapter, train
from training.tiny_runs import (
    FAST,
    LORA,
    Tiny,
    answered_rows,
    labelled_rows,
    metrics_of,
    record_of,
    same,
    texts,
    weights,
    write_jsonl,
)

FILES = {
    "README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/graftlm.json",
    "data/cut.jsonl", "data/rejected.jsonl", "log.txt", "metrics.jsonl", "report.html", "run.json",
}  # fmt: skip


def _file(folder: Path, kind: str) -> Path:
    """The same few rows in every way of writing them down."""
    place = folder / f"rows.{kind.rpartition(' ')[2]}"
    labelled, answered = labelled_rows(), answered_rows()
    if kind == "classify csv":
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(labelled)
    elif kind == "classify parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(labelled), place)
    elif kind == "answers jsonl":
        write_jsonl(place, answered)
    elif kind == "alpaca json":
        rows = [
            {"instruction": row["prompt"], "input": "here" * (at % 2), "output": row["completion"]}
            for at, row in enumerate(answered)
        ]
        place.write_text(json.dumps(rows))
    elif kind == "chat jsonl":
        write_jsonl(
            place,
            [
                {
                    "messages": [
                        {"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": row["completion"]},
                        {"role": "user", "content": "And then?"},
                        {"role": "assistant", "content": "Nothing."},
                    ]
                }
                for row in answered
            ],
        )
    else:
        place.write_text(texts(60))
    return place


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("classify csv", "classify"), ("classify parquet", "classify"), ("answers jsonl", "sft"), ("alpaca json", "sft"),
        ("chat jsonl", "sft"), ("document txt", "lm"),
    ],
)  # fmt: skip
def test_every_kind_of_data(kind: str, task: str, tiny: Tiny, tmp_path: Path) -> None:
    run = tiny(_file(tmp_path, kind), max_length=48)
    assert run.task == task
    assert run.record["status"] == "done"
    rows = metrics_of(run.folder)
    assert all(row.get("loss", 1) > 0 and row.get("grad_norm", 1) > 0 for row in rows)
    assert sum("eval_loss" in row for row in rows) == 2
    if task == "classify":
        predictions = [json.loads(line) for line in (run.folder / "eval/predictions.jsonl").read_text().splitlines()]
        assert len(predictions) == run.record["results"]["eval_rows"] == 4
        right = sum(line["label"] == line["predicted"] for line in predictions)
        assert run.metrics["accuracy"] == right / 4
        assert [score["name"] for score in run.record["results"]["scores"]] == ["tuned", "probe", "tfidf", "majority"]
    else:
        tuned, base = run.record["results"]["scores"]
        assert (tuned["name"], base["name"]) == ("tuned", "base")
        assert run.metrics["loss"] == tuned["loss"] != base["loss"]
        sample = json.loads((run.folder / "eval/samples.jsonl").read_text().splitlines()[0])
        assert sample.keys() == {"prompt", "reference", "base", "tuned"}


def test_an_encoder_classifies(tiny: Tiny, tiny_bert: Path, labelled: Path) -> None:
    run = tiny(labelled, base=tiny_bert, epochs=60.0, learning_rate=0.01, batch=16)
    assert run.record["base"]["class"] == "BertForSequenceClassification"
    assert any("classifier" in name for name in weights(run)), "the new head was not saved"
    assert metrics_of(run.folder)[-2]["loss"] < 0.3
    opened = open_adapter(run.folder)
    assert opened.task == "classify"
    assert evaluate(run.folder)["scores"][0]["accuracy"] == run.metrics["accuracy"]


def test_a_whole_run_with_baselines_and_report(tiny_base: Path, labelled: Path, tmp_path: Path) -> None:
    run = train(labelled, base=tiny_base, method=LORA, output=tmp_path / "run", quiet=True, **FAST)
    files = {file.relative_to(run.folder).as_posix() for file in run.folder.rglob("*") if file.is_file()}
    assert {file for file in files if not file.startswith("checkpoints/")} == FILES | {"eval/predictions.jsonl"}
    assert run.report.is_file()
    record = record_of(run.folder)
    assert record["settings"]["train"]["epochs"] == 2.0
    assert record["origin"]["train.epochs"]
    assert len(next(iter(record["data"]["sha256"].values()))) == 64
    assert record["base"]["fingerprint"] == fingerprint(run.model)
    assert record["environment"].keys() >= {"python", "torch", "transformers", "device", "threads"}
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 1e6
    scores = {score["name"]: score["accuracy"] for score in record["results"]["scores"]}
    assert scores["tfidf"] == scores["probe"] == 1.0, "the labels follow from the first word"
    assert scores["majority"] == 0.5


def test_rows_from_python(tiny: Tiny) -> None:
    run = tiny(iter(answered_rows()), epochs=1.0)
    assert isinstance(run, Run)
    kept = [json.loads(line) for line in (run.folder / "data" / "rows.jsonl").read_text().splitlines()]
    assert kept == answered_rows()
    assert evaluate(run.folder)["scores"][0]["loss"] == pytest.approx(run.metrics["loss"], rel=1e-6)


def test_training_helps_on_rows_never_seen(tiny: Tiny, tmp_path: Path) -> None:
    draw = random.Random(5)
    rows = [{"prompt": f"Say {draw.randrange(1000)}", "completion": "All is well."} for _ in range(40)]
    run = tiny(write_jsonl(tmp_path / "rows.jsonl", rows), method="lora(rank=4,targets=all-linear)", epochs=20.0, batch=8,
               learning_rate=0.03)  # fmt: skip
    tuned, base = run.record["results"]["scores"]
    assert tuned["loss"] < 0.3 * base["loss"]
    assert tuned["loss_high"] < base["loss_low"]


@pytest.mark.parametrize("task", ["sft", "classify"])
def test_an_opened_run_is_the_trained_one(task: str, tiny: Tiny, answered: Path, labelled: Path) -> None:
    run = tiny(answered if task == "sft" else labelled)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        wanted = run.model(input_ids=ids).logits
        with use(run.model, None):
            base = run.model(input_ids=ids).logits
    assert not torch.equal(wanted, base)
    for place in (run.folder, str(run.folder), run.folder / "adapter"):
        opened = open_adapter(place)
        assert opened.task == task
        assert (opened.labels is None) == (task == "sft")
        assert (opened.template is None) == (task == "classify")
        with torch.no_grad():
            torch.testing.assert_close(opened.model(input_ids=ids).logits, wanted, rtol=0, atol=0)
    assert same(load_file(run.folder / "adapter" / "adapter_model.safetensors"), weights(run))


def test_a_base_opens_as_itself(tiny_base: Path) -> None:
    opened = open_adapter(tiny_base)
    assert opened.adapter is None
    assert opened.folder is None
    assert opened.template is not None


def test_a_base_may_lie_elsewhere(tiny: Tiny, tiny_base: Path, answered: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "base"
    shutil.copytree(tiny_base, moved)
    run = tiny(answered, base=moved)
    shutil.move(moved, tmp_path / "elsewhere")
    with pytest.raises(GraftError):
        open_adapter(run.folder)
    assert open_adapter(run.folder, base=str(tmp_path / "elsewhere")).adapter is not None


def test_opening_what_is_not_there(tmp_path: Path, tiny: Tiny, answered: Path) -> None:
    with pytest.raises(GraftError, match="no model folder"):
        open_adapter(tmp_path / "nothing")
    run = tiny(answered)
    import shutil

    shutil.rmtree(run.folder / "adapter")
    with pytest.raises(GraftError, match="no finished adapter yet") as caught:
        open_adapter(run.folder)
    assert "--resume" in caught.value.findings[0].fix


# --- evaluate ---


def test_evaluating_again_gives_the_scores_of_the_run(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered)
    again = evaluate(run.folder)
    assert again["eval_rows"] == run.record["results"]["eval_rows"]
    for name in ("loss", "loss_low", "loss_high"):
        assert again["scores"][0][name] == run.record["results"]["scores"][0][name]
    assert again["scores"][1]["loss"] == run.record["results"]["scores"][1]["loss"]


def test_evaluating_on_other_rows(tiny: Tiny, labelled: Path, tmp_path: Path) -> None:
    run = tiny(labelled)
    new = write_jsonl(tmp_path / "new.jsonl", [{"text": f"Where is it {n}", "label": "track"} for n in range(7)])
    found = evaluate(run.folder, new)
    assert found["eval_rows"] == 7
    assert found["labels"] == ["return", "track"]
    assert evaluate(run.folder, new, max_rows=3)["eval_rows"] == 3
    assert [score["name"] for score in found["scores"]] == ["tuned", "probe", "tfidf", "majority"]
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"text": "Hello", "label": "greeting"}])
    with pytest.raises(GraftError, match="greeting"):
        evaluate(run.folder, strange)


def test_evaluating_on_data_that_changed_since_is_refused(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered)
    write_jsonl(answered, answered_rows(25))
    with pytest.raises(GraftError, match="changed since") as caught:
        evaluate(run.folder)
    assert caught.value.findings[0].code == "U122"


def test_options_that_would_do_nothing_are_refused(tiny: Tiny, answered: Path, tiny_base: Path) -> None:
    run = tiny(answered)
    with pytest.raises(GraftError, match="U123"):
        evaluate(run.folder, max_rows=2)
    with pytest.raises(GraftError, match="is a base model"):
        evaluate(tiny_base)


def test_a_run_speaks_and_keeps_what_it_said(
    tiny_base: Path, answered: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(answered, base=tiny_base, method=LORA, output=tmp_path / "run", **FAST)
    said = capfd.readouterr()
    assert said.err == ""
    assert "\x1b" not in said.out
    lines = [line.rstrip() for line in said.out.splitlines()]
    log = [line.rstrip() for line in (run.folder / "log.txt").read_text().splitlines()]
    assert lines == log
    assert [line.split()[0] for line in lines if line[:1].strip()] == [
        "data", "loss", "memory", "base", "method", "sample", "done", "report",
    ]  # fmt: skip
    assert "of tokens" in said.out
    assert "[[" in said.out, "trained tokens are marked"
