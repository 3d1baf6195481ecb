"""Every task as a whole run on tiny bases: recognised, trained, scored, opened again, scored as before."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from graftlm.cli.program import program
from graftlm.data.recognise import TASKS as ROLES_OF
from graftlm.errors import GraftError
from graftlm.objectives import OBJECTIVES
from graftlm.settings import RunSettings
from graftlm.training import evaluate, open_adapter
from graftlm.training.tasks import TASKS
from training.tiny_runs import Tiny, metrics_of, rows_for, texts, write_jsonl

#: (rows, task asked for, base) to (task, measure).
RUNS = {
    ("multi", "auto", "tiny_bert"): ("classify", "micro_f1"),
    ("pairs", "auto", "tiny_bert"): ("classify", "macro_f1"),
    ("pairs", "auto", "tiny_base"): ("classify", "macro_f1"),
    ("regress", "auto", "tiny_bert"): ("regress", "pearson"),
    ("regress", "auto", "tiny_base"): ("regress", "pearson"),
    ("tag", "auto", "tiny_bert"): ("tag", "span_f1"),
    ("tag", "auto", "tiny_base"): ("tag", "span_f1"),
    ("seq2seq", "auto", "tiny_t5"): ("seq2seq", "loss"),
    ("choice", "auto", "tiny_base"): ("choice", "accuracy"),
    ("choice", "auto", "tiny_bert"): ("choice", "accuracy"),
    ("choice", "tfew", "tiny_base"): ("tfew", "accuracy"),
    ("dpo", "auto", "tiny_base"): ("dpo", "pair_accuracy"),
    ("dpo", "reward", "tiny_base"): ("reward", "pair_accuracy"),
    ("dpo", "reward", "tiny_bert"): ("reward", "pair_accuracy"),
    ("kto", "auto", "tiny_base"): ("kto", "auc"),
    ("choice", "auto", "tiny_t5"): ("choice", "accuracy"),
    ("choice", "tfew", "tiny_t5"): ("tfew", "accuracy"),
    ("dpo", "auto", "tiny_t5"): ("dpo", "pair_accuracy"),
    ("kto", "auto", "tiny_t5"): ("kto", "auc"),
}


@pytest.mark.parametrize(("rows", "asked", "base"), RUNS, ids=lambda value: value)
def test_a_run_of_every_task(
    rows: str, asked: str, base: str, tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task, measure = RUNS[rows, asked, base]
    data = write_jsonl(tmp_path / "rows.jsonl", rows_for(rows))
    epochs = 24.0 if rows == "multi" else 6.0
    run = tiny(data, task=asked, base=request.getfixturevalue(base), epochs=epochs, learning_rate=0.02)
    assert run.task == task
    results = run.record["results"]
    assert results["measure"]["key"] == measure
    assert results["eval_rows"] == 4
    tuned = results["scores"][0]
    assert tuned[f"{measure}_low"] <= tuned[measure] <= tuned[f"{measure}_high"]
    assert results["second"]["key"] in tuned
    losses = [row["loss"] for row in metrics_of(run.folder) if "loss" in row]
    assert losses[-1] < losses[0], "nothing was learnt"
    lines = [json.loads(line) for line in (run.folder / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert open_adapter(run.folder).task == task
    again = evaluate(run.folder)
    assert again["scores"][0] == pytest.approx(tuned, abs=1e-6)
    assert again["measure"] == results["measure"]
    if rows in ("multi", "regress"):
        rest = ("majority",) if rows == "multi" else ("mean",)
        assert [score["name"] for score in results["scores"]] == ["tuned", "probe", "tfidf", *rest]


def test_tags_without_the_library_that_scores_them_are_refused_before_anything_is_made(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    data = write_jsonl(tmp_path / "rows.jsonl", rows_for("tag"))
    with pytest.raises(GraftError, match=r"graftlm\[scores\]") as caught:
        tiny(data)
    assert [finding.code for finding in caught.value.findings] == ["E130"]
    assert not (tmp_path / "run").exists()


def test_one_held_out_row_has_no_interval(tiny: Tiny, answered: Path) -> None:
    run = tiny(answered, steps=1, eval_share=0.05)
    assert run.record["results"]["eval_rows"] == 1
    for row in run.record["results"]["scores"]:
        assert not [name for name in row if name.endswith(("_low", "_high"))]
    assert "(one row, no interval)" in (run.folder / "log.txt").read_text()
    assert "loss_low" not in evaluate(run.folder)["scores"][0]


def test_masked_words_of_plain_text(tiny: Tiny, tiny_bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.txt"
    data.write_text(texts(60))
    run = tiny(data, base=tiny_bert, max_length=24, epochs=8.0, learning_rate=0.02)
    assert run.task == "mlm"
    tuned, base = run.record["results"]["scores"]
    assert tuned["loss"] < base["loss"]
    assert evaluate(run.folder)["scores"][0] == pytest.approx(tuned, abs=1e-6)


def test_an_encoder_cannot_write_and_a_decoder_hides_nothing(
    tiny: Tiny, tiny_base: Path, tiny_bert: Path, tiny_t5: Path, answered: Path, tmp_path: Path
) -> None:
    document = tmp_path / "rows.txt"
    document.write_text(texts(60))
    for data, task, base, code in (
        (document, "mlm", tiny_base, "M113"), (document, "lm", tiny_bert, "M113"), (answered, "sft", tiny_bert, "M113"),
        (write_jsonl(tmp_path / "asked.jsonl", [{"prompt": f"Which {at}?"} for at in range(20)]), "grpo", tiny_t5, "M113"),
        (answered, "seq2seq", tiny_base, "M113"), (answered, "sft", tiny_t5, "M113"),
    ):  # fmt: skip
        with pytest.raises(GraftError) as caught:
            tiny(data, task=task, base=base, reward="regex:a")
        assert caught.value.findings[0].code == code
        assert caught.value.findings[0].fix


def test_one_table_says_all_tasks() -> None:
    asked: Any = RunSettings.model_fields["task"].annotation
    assert TASKS.keys() == OBJECTIVES.keys() == ROLES_OF.keys() == set(get_args(asked)) - {"auto"}
    assert all(task.measure.key != task.second.key for task in TASKS.values())


def test_a_new_head_starts_at_a_regression_where_rows_have_classes(tiny: Tiny, tiny_bert: Path, tmp_path: Path) -> None:
    def method_of(rows: list[dict[str, Any]], out: str, **settings: Any) -> str:
        path = write_jsonl(tmp_path / f"{out}.jsonl", rows)
        return str(tiny(path, base=tiny_bert, steps=1, out=out, **settings).record["method"])

    for kind in ("pairs", "tag"):
        assert method_of(rows_for(kind), kind).endswith("+head(start=probe)")
    assert method_of(rows_for("regress"), "regress").endswith("+head")
    assert method_of(rows_for("multi"), "multi").endswith("+head(start=probe)")
    held = write_jsonl(
        tmp_path / "held.jsonl", [{**row, "premise": f"{at} more"} for at, row in enumerate(rows_for("pairs"))]
    )
    streamed = method_of(rows_for("pairs"), "streamed", stream=True, eval_path=str(held))
    assert streamed.endswith("+head(start=probe)")
    assert method_of(rows_for("pairs"), "own", method="lora(rank=2)+head").endswith("+head")
    one_of_many = [{"text": f"number {at}", "label": "rare" if at % 70 == 3 else "often"} for at in range(220)]
    assert method_of(one_of_many, "rare", waive="D129").endswith("+head")
    # A base that brings a head for the task is not made to forget it.
    config = json.loads((tiny_bert / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    headed = tmp_path / "headed"
    shutil.copytree(tiny_bert, headed)
    (headed / "config.json").write_text(json.dumps(config))
    path = write_jsonl(tmp_path / "known.jsonl", rows_for("pairs"))
    assert str(tiny(path, base=headed, steps=1, out="known").record["method"]).endswith("+head")


@pytest.mark.parametrize("score", ["snip", "fisher"])
@pytest.mark.parametrize(
    ("rows", "asked", "base"),
    [
        ("dpo", "auto", "tiny_base"), ("dpo", "auto", "tiny_t5"), ("dpo", "reward", "tiny_bert"),
        ("kto", "auto", "tiny_base"), ("choice", "auto", "tiny_bert"), ("choice", "tfew", "tiny_base"),
        ("multi", "auto", "tiny_bert"), ("regress", "auto", "tiny_bert"), ("tag", "auto", "tiny_bert"),
        ("seq2seq", "auto", "tiny_t5"),
    ],
    ids=lambda value: value,
)  # fmt: skip
def test_what_to_train_is_chosen_by_the_rows_of_every_task(
    rows: str, asked: str, base: str, score: str, tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_for(rows))
    run = tiny(data, task=asked, base=request.getfixturevalue(base), method=f"sparse(score={score})", steps=1)
    assert all(row["loss"] > 0 for row in metrics_of(run.folder) if "loss" in row)


def test_what_is_chosen_by_answers_is_refused_where_there_are_none_yet(tiny: Tiny, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Which one, {at}?"} for at in range(12)])
    with pytest.raises(GraftError, match="rows of rloo have none yet") as caught:
        tiny(data, task="rloo", method="sparse(score=gradient)", reward="regex:o")
    assert caught.value.findings[0].code == "T122"


@pytest.mark.parametrize(
    ("asked", "base"), [("auto", "tiny_base"), ("auto", "tiny_bert"), ("tfew", "tiny_base"), ("tfew", "tiny_t5")]
)
def test_labels_as_words_from_training_to_new_texts(
    asked: str, base: str, tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    rows = [{"sentence": f"{'good' if at % 2 else 'bad'} number {at}", "label": at % 2} for at in range(16)]
    run = tiny(
        write_jsonl(tmp_path / "rows.jsonl", rows), task=asked, base=request.getfixturevalue(base), epochs=4.0,
        prompt="{sentence} Sentiment:", label_words={"0": "awful", "1": "great"}, learning_rate=0.02,
    )  # fmt: skip
    by_head = base == "tiny_bert"
    assert run.task == {"auto": "classify" if by_head else "choice"}.get(asked, asked)
    tuned = run.record["results"]["scores"][0]
    assert tuned["macro_f1_low"] <= tuned["macro_f1"] <= tuned["macro_f1_high"]
    again = evaluate(run.folder)
    assert again["scores"][0] == pytest.approx(tuned, abs=1e-6)
    # New rows are put into the same words, by `evaluate` and by `predict`.
    fresh = write_jsonl(
        tmp_path / "fresh.jsonl", [{"sentence": "very good", "label": 1}, {"sentence": "worse", "label": 0}]
    )
    lines = evaluate(run.folder, fresh)["worst"]
    assert sorted(line["text"] for line in lines) == ["very good Sentiment:", "worse Sentiment:"]
    program.main(["predict", str(run.folder), "very good"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["text"] == "very good"
    assert set(told["probabilities"]) == ({"0", "1"} if by_head else {"awful", "great"})
    assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    same = next(line for line in lines if line["text"].startswith("very good"))
    if not by_head:
        right = told["probabilities"]["great"] if same["predicted"] == "great" else told["probabilities"]["awful"]
        assert same["probability"] == pytest.approx(right, abs=1e-3)
    with pytest.raises(GraftError, match="2 texts|found 2"):
        program.main(["predict", str(run.folder), str(_pairs(tmp_path))], standalone_mode=False)


def _pairs(folder: Path) -> Path:
    return write_jsonl(folder / "both.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "x"}] * 2)


def test_label_words_without_a_prompt(tiny: Tiny, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"t {at}", "label": at % 2} for at in range(8)])
    with pytest.raises(GraftError, match="D166"):
        tiny(data, label_words={"0": "no", "1": "yes"})


@pytest.mark.parametrize("task", ["classify", "multi", "regress", "tag", "choice", "tfew", "dpo", "kto", "reward"])
def test_the_task_s_own_measure_is_told_while_it_trains(task: str, tiny: Tiny, tmp_path: Path) -> None:
    """The last evaluation is of the adapter that is scored at the end, on the same rows."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows_for(task, 30))
    run = tiny(data, task={"multi": "classify"}.get(task, task), steps=4, eval_every=2, eval_share=0.4)
    key = run.record["results"]["measure"]["key"]
    told = [row[f"eval_{key}"] for row in metrics_of(run.folder) if f"eval_{key}" in row]
    assert len(told) == 2
    assert told[-1] == pytest.approx(run.metrics[key], abs=1e-6)
