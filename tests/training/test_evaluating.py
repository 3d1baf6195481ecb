"""Evaluating: baselines on other rows, against another run, written answers, worst rows, bare bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import GraftError
from graftlm.evaluation import texts
from graftlm.training import evaluate
from training.tiny_runs import Tiny, answered_rows, labelled_rows, rows_for, write_jsonl


def test_two_runs_on_the_same_rows(tiny: Tiny, labelled: Path, tmp_path: Path) -> None:
    one, other = tiny(labelled), tiny(labelled, out="other", learning_rate=0.02, epochs=8.0)
    new = write_jsonl(tmp_path / "new.jsonl", [r | {"text": "Well: " + r["text"]} for r in labelled_rows(16)])
    found = evaluate(one.folder, new, against=other.folder, worst=2)
    told = found["against"]["measures"]
    difference = found["scores"][0]["accuracy"] - found["against"]["scores"]["accuracy"]
    assert told["accuracy"]["difference"] == pytest.approx(difference)
    assert told["accuracy"]["low"] <= difference <= told["accuracy"]["high"]
    back = evaluate(other.folder, new, against=one.folder)["against"]["measures"]["nats"]
    assert back["difference"] == pytest.approx(-told["nats"]["difference"])
    assert back["p_value"] == pytest.approx(told["nats"]["p_value"], abs=0.01)
    assert {back["verdict"], told["nats"]["verdict"]} in ({"better", "worse"}, {"not distinguishable"})
    same = evaluate(one.folder, new, against=one.folder)["against"]["measures"]
    assert same["nats"]["difference"] == 0
    assert same["nats"]["verdict"] == "not distinguishable"
    assert [row["nats"] for row in found["worst"]] == sorted((row["nats"] for row in found["worst"]), reverse=True)
    assert len(found["worst"]) == 2
    assert 0 <= found["calibration"]["ece"] <= 1


def test_rows_that_were_trained_on_are_no_test(tiny: Tiny, labelled: Path) -> None:
    run = tiny(labelled)
    with pytest.raises(GraftError, match="was trained on 16 of these 20 rows") as caught:
        evaluate(run.folder, labelled)
    assert caught.value.findings[0].code == "U125"
    other = tiny(labelled, out="other", seed=3)  # another split: rows held out by one were trained on by the other
    with pytest.raises(GraftError, match="U125"):
        evaluate(run.folder, against=other.folder)


def test_what_cannot_be_compared_is_refused(tiny: Tiny, labelled: Path, answered: Path, tmp_path: Path) -> None:
    run, writer = tiny(labelled), tiny(answered, out="writer")
    rows = write_jsonl(tmp_path / "three.jsonl", [r | {"label": f"l{n % 3}"} for n, r in enumerate(labelled_rows())])
    three = tiny(rows, out="three")
    for against, why in ((writer, "classify"), (three, "other labels")):
        with pytest.raises(GraftError, match=why) as caught:
            evaluate(run.folder, against=against.folder)
        assert caught.value.findings[0].code == "U124"


@pytest.mark.parametrize(
    ("rows", "asked", "base", "measure", "key"),
    [
        ("multi", "auto", "tiny_bert", "share of labels right", ""),
        ("regress", "auto", "tiny_bert", "mean squared error", ""),
        ("tag", "auto", "tiny_bert", "span F1", "span_f1"),
        ("seq2seq", "auto", "tiny_t5", "loss in nats per token", "loss"),
        ("choice", "auto", "tiny_base", "accuracy", "accuracy"),
        ("dpo", "auto", "tiny_base", "pairs in order", "pair_accuracy"),
        ("dpo", "reward", "tiny_bert", "pairs in order", "pair_accuracy"),
    ],
)
def test_runs_of_every_task_are_tested_against_one_another(
    rows: str, asked: str, base: str, measure: str, key: str, tiny: Tiny, tmp_path: Path, request: Any
) -> None:
    data, where = write_jsonl(tmp_path / "rows.jsonl", rows_for(rows, 24)), request.getfixturevalue(base)
    one = tiny(data, task=asked, base=where, epochs=6.0, learning_rate=0.02)
    other = tiny(data, task=asked, base=where, out="other", learning_rate=1e-6)
    found = evaluate(one.folder, against=other.folder)
    told = found["against"]["measures"]
    assert list(told) == [measure]
    assert told[measure]["low"] <= told[measure]["difference"] <= told[measure]["high"]
    if key:
        scores = found["scores"][0][key], found["against"]["scores"][key]
        assert told[measure]["difference"] == pytest.approx(scores[0] - scores[1], abs=1e-5)
    same = evaluate(one.folder, against=one.folder)["against"]["measures"][measure]
    assert same["difference"] == 0
    assert same["verdict"] == "not distinguishable"


def test_a_task_without_a_score_of_single_rows_is_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny(write_jsonl(tmp_path / "rows.jsonl", rows_for("kto", 12)))
    with pytest.raises(GraftError, match="kto has no score of single rows") as caught:
        evaluate(run.folder, against=run.folder)
    assert caught.value.findings[0].code == "U124"


def test_writers_against_one_another_and_their_written_answers(tiny: Tiny, answered: Path, tiny_base: Path) -> None:
    pytest.importorskip("sacrebleu")
    one, other = tiny(answered), tiny(answered, out="other", learning_rate=0.02, epochs=8.0)
    found = evaluate(one.folder, against=other.folder, generate=3, max_new_tokens=4)
    told = found["against"]["measures"]["loss"]
    assert told["difference"] == pytest.approx(found["scores"][0]["loss"] - found["against"]["scores"]["loss"])
    assert found["answers"]["rows"] == 3
    for who in ("tuned", "base"):
        scores = found["answers"][who]
        assert 0 <= scores["rouge_l_low"] <= scores["rouge_l"] <= scores["rouge_l_high"] <= 1
    assert set(found["answers"]["against_base"]) == set(found["against"]["answers"]) == {"rouge_l", "chrf", "exact"}
    against_base = evaluate(one.folder, against=tiny_base)["against"]
    assert against_base["scores"]["loss"] == pytest.approx(found["scores"][1]["loss"])


def test_a_bare_base_is_scored_on_rows(tiny_base: Path, tmp_path: Path, labelled: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", answered_rows(6))
    found = evaluate(tiny_base, rows)
    assert [score["name"] for score in found["scores"]] == ["base"]
    assert found["eval_rows"] == 6
    with pytest.raises(GraftError, match="without a classifier"):
        evaluate(tiny_base, labelled)


def test_a_classifier_writes_nothing(tiny: Tiny, labelled: Path) -> None:
    pytest.importorskip("sacrebleu")
    with pytest.raises(GraftError, match="no answers to write"):
        evaluate(tiny(labelled).folder, generate=2)


def test_scores_of_answers_are_those_of_the_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    written, wanted = ["the cat sat on a mat", "yes", ""], ["the cat sat on the mat", "yes", "no"]
    rows, found = texts.answer_rows(written, wanted), texts.answer_scores(written, wanted)
    assert rows["exact"] == [0.0, 1.0, 0.0]
    assert rows["rouge_l"][0] == pytest.approx(5 / 6)  # five of six words in order, both ways
    assert rows["chrf"][0] == pytest.approx(sacrebleu.sentence_chrf(written[0], [wanted[0]]).score / 100)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [wanted]).score / 100)


def test_missing_libraries_are_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(GraftError, match=r"graftlm\[scores\]"):
        evaluate("runs/none", generate=2)
