"""Rows as questions by a prompt template, labels as words: which columns come of it, and that no row is lost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.data import PromptTemplate, prepare
from graftlm.errors import DataError

ROWS = [{"sentence": f"{word} number {at}", "label": at % 2} for at, word in enumerate(["Good", "Bad"] * 8)]
ASKED = PromptTemplate("{sentence} Sentiment:", {"0": "great", "1": "awful"})


def read(write: Any, tokenizer: Any, rows: Any = ROWS, prompt: Any = ASKED, **options: Any) -> Any:
    options = {"eval_share": 0.25, "template": "plain"} | options
    return prepare(write("rows.jsonl", rows), tokenizer=tokenizer, prompt=prompt, **options)


@pytest.mark.parametrize("task", ["auto", "choice", "tfew"])
def test_labels_become_choices_of_words(task, write, tokenizer):
    found = read(write, tokenizer, task=task)
    assert found.task == ("choice" if task == "auto" else task)
    first = found.train[0]["example"]
    assert first.messages == ({"role": "user", "content": f"{first.raw['sentence']} Sentiment:"},)
    assert first.answers == ("great", "awful")
    assert {e["target"] for e in found.train} == {0, 1}
    assert all(item["target"] == item["example"].raw["label"] for item in [*found.train, *found.eval])
    # Choices that are labels are held out in proportion.
    assert sorted(item["target"] for item in found.eval) == [0, 0, 1, 1]
    assert found.prompt == ASKED


def test_the_trained_tokens_are_the_word_alone(write, tokenizer):
    found = read(write, tokenizer, task="sft")
    item = found.train[0]
    trained = tokenizer.decode([label for label in item["labels"] if label != -100], skip_special_tokens=True)
    assert trained == ASKED.words[str(item["example"].raw["label"])]


def test_a_head_tells_labels_of_the_written_text(write, tokenizer):
    found = read(write, tokenizer, task="classify", template=None, by_head=True)
    assert found.labels.names == ("0", "1")
    assert found.train[0]["example"].texts[0].endswith(" Sentiment:")
    assert read(write, tokenizer, template=None, by_head=True).task == "classify"  # auto, on an encoder
    assert read(write, tokenizer, instead={"sft": "seq2seq"}).task == "seq2seq"  # auto, on an encoder-decoder


def test_labels_without_words_are_said_as_they_are(write, tokenizer):
    found = read(write, tokenizer, prompt=PromptTemplate("{sentence}?"), task="choice")
    assert found.train[0]["example"].answers == ("0", "1")
    assert dict(found.prompt.words) == {"0": "0", "1": "1"}  # kept, so that later rows are asked the same


def test_what_is_learnt_without_words_goes_by_the_other_columns(write, tokenizer):
    text = PromptTemplate("Read: {sentence}")
    assert read(write, tokenizer, prompt=text, template=None).task == "classify"
    pairs = [{"sentence": f"a {at}", "completion": f"b {at}"} for at in range(6)]
    assert read(write, tokenizer, pairs, text).task == "sft"
    alone = [{"sentence": f"a {at}"} for at in range(30)]
    found = read(write, tokenizer, alone, text, template=None)
    assert found.task == "lm"
    assert found.train[0]["example"].texts[0].startswith("Read: a ")


def test_two_columns_and_braces(write, tokenizer):
    rows = [{"premise": f"p {at}", "hypothesis": f"h {at}", "label": "yn"[at % 2]} for at in range(8)]
    asked = PromptTemplate("{{{premise}}} so {hypothesis}?", {"y": "Yes", "n": "No"})
    found = read(write, tokenizer, rows, asked, eval_share=0)
    assert found.train[0]["example"].text == "{p 0} so h 0?"


def test_a_column_that_is_not_there(write, tokenizer):
    with pytest.raises(DataError, match="D166") as caught:
        read(write, tokenizer, prompt=PromptTemplate("{sentense} Sentiment:"))
    assert "{sentence}" in str(caught.value)


@pytest.mark.parametrize("text", ["no column", "{}", "{sentence", "a } b {sentence}"])
def test_broken_templates(text):
    with pytest.raises(DataError, match="D166"):
        PromptTemplate(text)


def test_words_that_cannot_be_told_apart():
    with pytest.raises(DataError, match="same word"):
        PromptTemplate("{a}", {"0": "yes", "1": "yes"})


def test_a_label_without_a_word_is_told_with_its_rows(write, tokenizer):
    rows = [*ROWS, {"sentence": "so so", "label": 7}, {"sentence": None, "label": 1}]
    with pytest.raises(DataError) as caught:
        read(write, tokenizer, rows, task="choice")
    assert {finding.code for finding in caught.value.findings} == {"D167", "D120"}
    found = read(write, tokenizer, rows, task="choice", drop_bad_rows=True)
    assert len(found.train) + len(found.eval) == len(ROWS)
    assert [fault.row for fault in found.rejected] == [17, 18]


def test_another_file_of_rows_gets_the_same_prompt(write, tokenizer):
    held = write("held.jsonl", [{"sentence": "new", "label": 1}])
    found = read(write, tokenizer, task="choice", eval_share=None, eval_path=held)
    assert found.eval[0]["example"].text == "new Sentiment:"
    assert found.eval[0]["target"] == 1


_VALUE = st.one_of(st.none(), st.text(max_size=8), st.integers(0, 2), st.booleans(), st.just([]), st.just("x" * 9999))


@pytest.mark.parametrize("task", ["choice", "sft", "classify"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd=st.lists(st.fixed_dictionaries({"sentence": _VALUE, "label": _VALUE}), max_size=5))
def test_rows_in_are_rows_used_and_rows_listed(task, tokenizer, odd):
    rows = [*ROWS[:4], *odd]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = prepare(
            path, tokenizer=tokenizer, task=task, eval_share=0, drop_bad_rows=True, max_length=64, prompt=ASKED,
            template=None if task == "classify" else "plain", waived=("D126", "D127", "D129"),
        )  # fmt: skip
    assert len(found.train) + len(found.rejected) == len(rows)
