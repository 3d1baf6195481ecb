"""Columns are understood, and what has two meanings or none is an error with a fix that works when pasted."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.data.checking import Notes, check
from graftlm.data.reading import Table
from graftlm.data.recognise import recognise
from graftlm.errors import DataError


def table(*columns, **values):
    row = {name: values.get(name, f"some {name}") for name in columns}
    return Table(Path("faq.jsonl"), "jsonl", "", tuple(columns), [row], ["faq.jsonl:1"])


def fault(*args, **options):
    with pytest.raises(DataError) as caught:
        recognise(*args, **options)
    (finding,) = caught.value.findings
    assert len(str(caught.value).splitlines()) <= 12
    return finding


def pasted(fix):
    """The arguments that a pasted fix stands for."""
    words = fix.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    mapping = dict(pair.split("=") for pair in options.get("--map", "").split(",") if pair)
    return {"task": options.get("--task", "auto"), "mapping": mapping}


@pytest.mark.parametrize(
    ("columns", "task", "kind", "roles"),
    [
        (("prompt", "completion"), "sft", "pairs", {"prompt": "prompt", "completion": "completion"}),
        (("question", "answer"), "sft", "pairs", {"prompt": "question", "completion": "answer"}),
        (("Question", "Answer"), "sft", "pairs", {"prompt": "Question", "completion": "Answer"}),
        (("input", "output"), "sft", "pairs", {"prompt": "input", "completion": "output"}),
        (("instruction", "response"), "sft", "pairs", {"prompt": "instruction", "completion": "response"}),
        (("query", "response"), "sft", "pairs", {"prompt": "query", "completion": "response"}),
        (
            ("instruction", "input", "output", "text"),
            "sft",
            "pairs",
            {"prompt": "instruction+input", "completion": "output"},
        ),
        (
            ("system", "prompt", "completion"),
            "sft",
            "pairs",
            {"system": "system", "prompt": "prompt", "completion": "completion"},
        ),
        (
            ("instruction", "input", "chosen", "rejected"),  # LLaMA-Factory's preferences
            "dpo",
            "preferences",
            {"prompt": "instruction+input", "chosen": "chosen", "rejected": "rejected"},
        ),
        (("messages",), "sft", "chat", {"messages": "messages"}),
        (("id", "conversations"), "sft", "chat", {"messages": "conversations"}),
        (("prompt", "messages"), "sft", "chat", {"messages": "messages"}),
        (("text", "label"), "classify", "labelled", {"text": "text", "label": "label"}),
        (
            ("premise", "hypothesis", "label"),
            "classify",
            "labelled",
            {"text": "premise", "text2": "hypothesis", "label": "label"},
        ),
        (("title", "text"), "lm", "documents", {"text": "text"}),
    ],
)
def test_known_columns(columns, task, kind, roles):
    reading = recognise(table(*columns))
    assert (reading.task, reading.kind, reading.columns) == (task, kind, roles)


def test_the_line_for_the_terminal():
    line = recognise(table("question", "answer", "source")).line
    assert line == "faq.jsonl  1 row  prompt=question completion=answer  (not used: source)"


def test_a_mapping_overrides_and_what_it_leaves_out_is_found():
    both = table("question", "answer", "better")
    assert recognise(both, mapping={"completion": "better"}).columns == {"prompt": "question", "completion": "better"}
    joined = recognise(table("a", "b", "c"), mapping={"prompt": "a+b", "completion": "c"})
    assert joined.sources("prompt") == ("a", "b")
    assert recognise(table("a+b", "c"), mapping={"prompt": "a+b", "completion": "c"}).sources("prompt") == ("a+b",)


def test_wrong_columns_have_a_fix_that_works():
    for columns in [("question_text", "best_answer", "source"), ("promt", "completion"), ("prompt", "story")]:
        finding = fault(table(*columns), task="sft")
        assert finding.code == "D110"
        assert finding.message.startswith(f"need prompt and completion, found {', '.join(columns)}. Looks like prompt=")
        assert recognise(table(*columns), **pasted(finding.fix)).columns == pasted(finding.fix)["mapping"]
    assert fault(table("question_text", "best_answer", "source")).fix == (
        "--map prompt=question_text,completion=best_answer"
    )


def test_prompts_of_alpaca_rows_have_their_input():
    found = recognise(table("instruction", "input", "output"), "grpo")
    assert (found.kind, found.columns) == ("prompts", {"prompt": "instruction+input"})


@pytest.mark.parametrize("task", ["tfew", "choice"])
def test_labels_are_asked_by_a_prompt(task):
    finding = fault(table("premise", "hypothesis", "label"), task)
    assert finding.fix == "--set 'data.prompt={premise} {hypothesis} Label:'"
    assert fault(table("text", "label"), task).fix == "--set 'data.prompt={text} Label:'"


def test_no_idea_is_no_suggestion():
    finding = fault(table("en", "de"))
    assert "Looks like" not in finding.message
    assert finding.fix == "--map prompt=...,completion=..."


@pytest.mark.parametrize(
    ("row", "task", "roles"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", "prompt chosen rejected"),
        ({"chosen": [{}], "rejected": [{}]}, "dpo", "chosen rejected"),
        ({"prompt": "a", "completion": "b", "label": True}, "kto", "prompt completion desirable"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "sft", "prompt completion"),
        ({"question": "a", "choices": ["b", "c"], "answer": "b"}, "choice", "prompt choices answer"),
        ({"question": "a", "choices": "b or c", "answer": "b"}, "sft", "prompt completion"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "tag", "tokens tags"),
        ({"sentence1": "a", "sentence2": "b", "score": 4.5}, "regress", "text text2 score"),
        ({"text": "a", "score": "0.5"}, "regress", "text score"),
        ({"text": "a", "score": "good"}, "lm", "text"),
        ({"text": "a", "labels": ["x", "y"]}, "classify", "text label"),
    ],
)
def test_what_columns_hold_decides(row, task, roles):
    found = recognise(Table(Path("faq.jsonl"), "jsonl", "", tuple(row), [row], ["faq.jsonl:1"]))
    assert (found.task, " ".join(found.columns)) == (task, roles)


_PAIR = {"prompt": "a", "completion": "b"}


def of_rows(rows):
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(Path("faq.jsonl"), "jsonl", "", columns, rows, [f"faq.jsonl:{at}" for at in range(1, len(rows) + 1)])


@pytest.mark.parametrize(
    ("sound", "column", "odd", "task"),
    [
        ({**_PAIR, "label": True}, "label", "maybe", "kto"),
        ({**_PAIR, "label": "false"}, "label", "maybe", "kto"),  # as a CSV file has it
        ({**_PAIR, "label": True}, "label", 3, "kto"),
        ({"text": "a", "score": 0.5}, "score", float("nan"), "regress"),
        ({"text": "a", "score": 0.5}, "score", float("inf"), "regress"),
        ({"text": "a", "score": "0.5"}, "score", "high", "regress"),
        ({"question": "a", "choices": ["b", "c"], "answer": "b"}, "choices", "b or c", "choice"),
        ({"tokens": ["a"], "tags": ["O"]}, "tokens", "a", "tag"),
        ({"tokens": ["a"], "tags": ["O"]}, "tags", "O", "tag"),
    ],
)
def test_an_odd_value_is_a_fault_of_its_row_and_changes_no_task(sound, column, odd, task):
    rows = [sound, sound, {**sound, column: odd}]
    found = recognise(of_rows(rows))
    assert found.task == task
    notes = Notes()
    check(of_rows(rows), found, notes)
    (finding,) = notes.errors
    assert finding.message.endswith("(row 3)")
    assert f"'{column}'" in finding.message
    if task != "tag":  # where most values are others, the rows may be meant otherwise
        finding = fault(of_rows([sound, *[{**sound, column: odd}] * 2]))
        assert finding.code == "D111"
        assert f"--task {task} " in "\n".join(finding.detail)


def test_ones_and_zeros_beside_answers_may_mean_anything():
    rows = of_rows([{**_PAIR, "label": 1}, {**_PAIR, "label": 0}])
    finding = fault(rows)
    assert finding.code == "D111"
    assert [pasted(way) for way in finding.detail] == [
        {"task": "kto", "mapping": {"prompt": "prompt", "completion": "completion", "desirable": "label"}},
        {"task": "sft", "mapping": {"prompt": "prompt", "completion": "completion"}},
    ]
    assert [recognise(rows, **pasted(way)).task for way in finding.detail] == ["kto", "sft"]
    assert recognise(rows, "kto").columns["desirable"] == "label"


@pytest.mark.parametrize("task", ["auto", "tag"])
def test_columns_that_hold_something_else_are_told_so(task):
    finding = fault(of_rows([{"tokens": "a word", "tags": "O O"}] * 2), task)
    assert finding.code == "D110"
    assert (
        finding.message == """'tokens' has 'a word' where a list of words, ["a", "word"], is wanted (2 of 2 values)"""
    )


def test_a_column_that_is_right_is_not_blamed_for_another_that_is_missing():
    assert "need tokens and tags, found tokens" in fault(of_rows([{"tokens": ["a"], "note": "b"}]), "tag").message
    finding = fault(of_rows([{"body": "a", "score": 1.5}]), "regress")
    assert "need text and score, found body, score" in finding.message
    assert finding.fix == "--map text=...,score=..."


def test_one_kind_of_rows_serves_several_tasks():
    pairs = table("prompt", "completion")
    assert recognise(pairs, "seq2seq").task == "seq2seq"
    assert recognise(pairs, instead={"sft": "seq2seq"}).task == "seq2seq"
    assert recognise(pairs, "sft", instead={"sft": "seq2seq"}).task == "sft"
    assert recognise(table("prompt", "chosen", "rejected"), "reward").task == "reward"
    assert recognise(table("text", "rating", rating="3.5"), "regress").columns == {"text": "text", "score": "rating"}
    assert fault(table("text", "rating", rating="good"), task="regress").code == "D110"


@pytest.mark.parametrize(
    ("columns", "ways"),
    [
        (("question", "answer", "response"), 2),
        (("prompt", "question", "answer"), 2),
        (("question", "context", "answer"), 2),
        (("question", "answer", "text", "label"), 2),
        (("messages", "prompt", "completion"), 2),
        (("text", "category"), 2),
        (("text", "content"), 2),
    ],
)
def test_two_meanings_are_an_error_and_each_choice_works(columns, ways):
    finding = fault(table(*columns))
    assert finding.code == "D111"
    assert len(finding.detail) == ways
    for choice in finding.detail:
        assert recognise(table(*columns), **pasted(choice)).columns == pasted(choice)["mapping"]


def test_label_columns_that_say_the_same_are_one():
    rows = [{"text": "a", "label": 0, "label_text": "no"}, {"text": "b", "label": 1, "label_text": "yes"}]
    twins = Table(Path("a.jsonl"), "jsonl", "", ("text", "label", "label_text"), rows, ["", ""])
    assert recognise(twins).columns["label"] == "label_text"
    more = [{**row, "intent": "same"} for row in rows]
    third = Table(Path("a.jsonl"), "jsonl", "", ("text", "label", "label_text", "intent"), more, ["", ""])
    assert len(fault(third).detail) == 3
    rows = [*rows, {"text": "c", "label": 1, "label_text": "no"}]
    differ = Table(Path("a.jsonl"), "jsonl", "", ("text", "label", "label_text"), rows, ["", "", ""])
    assert fault(differ).code == "D111"


def test_mappings_that_do_not_fit():
    finding = fault(table("question", "answer"), mapping={"promt": "question"})
    assert (finding.code, finding.fix) == ("D112", "--map prompt=question")
    finding = fault(table("question", "answer"), mapping={"prompt": "quesion"})
    assert (finding.code, finding.fix) == ("D112", "--map prompt=question")
    finding = fault(table("question", "answer"), mapping={"completion": "reply"})
    assert (finding.code, finding.fix) == ("D112", "--map completion=answer")
    finding = fault(table("question", "answer"), mapping={"question": "prompt"})
    assert finding.fix == "--map prompt=question"


def test_a_task_restricts_and_must_fit():
    assert recognise(table("text", "label"), task="lm").task == "lm"
    finding = fault(table("text", "label"), task="sft")
    assert finding.message.startswith("need prompt and completion, found text, label")
    assert fault(table("text"), task="clasify").fix == "--task classify"


@pytest.mark.parametrize(
    ("rows", "message", "fix"),
    [
        (
            [{"text": "a", "score": "good"}] * 3,
            "'score' has 'good' where a number is wanted (3 of 3 values)",
            "--task classify --map text=text,label=score",
        ),
        ([{"sentence": "a", "grade": 3.5}], "Looks like text=sentence, score=grade", "--map text=sentence,score=grade"),
    ],
)
def test_numbers_that_are_none_are_told(rows, message, fix, write):
    from graftlm.data.reading import read_rows

    with pytest.raises(DataError) as refused:
        recognise(read_rows(write("rows.jsonl", rows)), "regress")
    (finding,) = refused.value.findings
    assert finding.code == "D110"
    assert message in finding.message
    assert finding.fix == fix
