"""Every fault of the rows is told once, with its rows, and becomes a rejected row when that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.data import prepare
from graftlm.data.checking import Notes, check, check_overlap
from graftlm.data.codes import CODES, WAIVABLE
from graftlm.data.reading import Table
from graftlm.data.recognise import recognise
from graftlm.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def checked(rows, task="auto", mapping=None, waived=(), **options):
    """The examples, rejected rows and notes of rows; raises what stops a run."""
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    table = Table(Path("faq.jsonl"), "jsonl", "", columns, rows, [f"faq.jsonl:{i + 1}" for i in range(len(rows))])
    notes = Notes(waived)
    result = check(table, recognise(table, task, mapping), notes, **options)
    notes.settle()
    return result, notes.notes


def faults(rows, **options):
    with pytest.raises(DataError) as caught:
        checked(rows, **options)
    assert all(finding.code in CODES for finding in caught.value.findings)
    assert len(str(caught.value).splitlines()) <= 12
    return caught.value.findings


def chats(count=45, **other):
    """Sound conversations, with others in the rows (from 1) that the keys name: `r6=[...]`."""
    return [{"messages": other.get(f"r{i}", CHAT)} for i in range(1, count + 1)]


def test_sound_rows_become_messages():
    result, notes = checked(
        [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Yo"}]
    )
    assert [e.messages[0]["content"] for e in result.examples] == ["Add\n\n1 2", "Hi"]
    assert [m["role"] for m in result.examples[0].messages] == ["user", "assistant"]
    assert [(e.row, e.place) for e in result.examples] == [(1, "faq.jsonl:1"), (2, "faq.jsonl:2")]
    assert not notes
    result, _ = checked([{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}])
    assert result.examples[0].messages == ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    result, _ = checked([{"system": "Be brief", "prompt": "Hi", "completion": "Yo"}])
    assert [m["role"] for m in result.examples[0].messages] == ["system", "user", "assistant"]


def test_missing_text_names_the_rows_and_the_way_to_drop_them():
    null = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    (finding,) = faults(chats(r6=null, r21=null, r41=null))
    assert finding.code == "D120"
    assert finding.message == "3 rows have null 'content' (rows 6, 21, 41)"
    assert finding.fix == "--set data.drop_bad_rows=true"
    result, notes = checked(chats(r6=null, r21=null, r41=null), drop_bad_rows=True)
    assert len(result.examples) == 42
    assert [(r.place, r.row) for r in result.rejected] == [
        ("faq.jsonl:6", 6),
        ("faq.jsonl:21", 21),
        ("faq.jsonl:41", 41),
    ]
    assert "null 'content' [D120]" in result.rejected[0].reason
    assert "3 rows left out" in str(next(n for n in notes if n.code == "D136"))


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"prompt": None, "completion": "b"}, "D120", "null 'prompt'"),
        ({"prompt": "a"}, "D120", "no 'completion'"),
        ({"prompt": 7, "completion": "b"}, "D121", "a number in 'prompt' where text is wanted"),
        ({"prompt": "a", "completion": ["b"]}, "D121", "a list of texts in 'completion' where text is wanted"),
        ({"prompt": "a", "completion": " \n"}, "D122", "empty 'completion'"),
    ],
)
def test_pairs_without_text(row, code, said):
    (finding,) = faults([{"prompt": "a", "completion": "b"}, row])
    assert finding.code == code
    assert finding.message == f"1 row has {said} (row 2)"


@pytest.mark.parametrize(
    ("choices", "answer", "said"),
    [
        (["a", "a", "b"], "b", "one of its 'choices' twice"),
        (["a"], "a", "fewer than two 'choices'"),
        (["a", "b"], "c", "an 'answer' that is none of its 'choices'"),
        (["a", " "], "a", "a list with an empty text in 'choices' where a list of texts is wanted"),
        (["a", 2], "a", "a list of texts and numbers in 'choices' where a list of texts is wanted"),
    ],
)
def test_faulty_choices(choices, answer, said):
    sound = {"question": "Which?", "choices": ["a", "b"], "answer": "a"}
    (finding,) = faults([sound, {**sound, "choices": choices, "answer": answer}])
    assert finding.code == ("D121" if "list of texts is" in said else "D160")
    assert finding.message == f"1 row has {said} (row 2)"


@pytest.mark.parametrize(
    ("messages", "code", "said"),
    [
        (None, "D120", "null 'messages'"),
        ("Hi", "D123", "text in 'messages'"),
        (["Hi"], "D123", "a list that is not of messages"),
        ([], "D123", "an empty 'messages'"),
        ([{"content": "Hi"}], "D123", "a message without 'role'"),
        ([{"role": "user"}], "D120", "no 'content'"),
        ([{"role": "user", "content": 5}], "D121", "a number in 'content'"),
        ([{"role": "asistant", "content": "Hi"}], "D125", "unknown role 'asistant' (meant assistant?)"),
        ([{"role": "narrator", "content": "Hi"}], "D125", "known: system"),
        ([{"role": "user", "content": "Hi"}], "D124", "no assistant turn"),
        ([{"role": "assistant", "content": ""}], "D122", "an empty assistant 'content'"),
    ],
)
def test_faulty_conversations(messages, code, said):
    (finding,) = faults([{"messages": CHAT}, {"messages": messages}])
    assert finding.code == code
    assert said in finding.message
    assert finding.message.endswith("(row 2)")


def test_parts_of_text_and_tool_calls_are_fine():
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, CHAT[1]]
    call = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    result, _ = checked([{"messages": parts}, {"messages": call}])
    assert result.examples[0].messages[0]["content"] == "Hi"
    assert result.examples[1].messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}


def test_no_assistant_turn_anywhere():
    rows = [{"messages": [{"role": "user", "content": "one two"}]} for _ in range(4)]
    (finding,) = faults(rows, count_tokens=lambda text: len(text.split()))
    assert finding.message == "0 of 8 tokens would be trained: no row has an assistant turn (roles: user)"
    assert finding.code == "D124"


def test_different_faults_are_told_together():
    rows = chats(r2=None, r3=[{"role": "bard", "content": "Hi"}], r4=[])
    assert [f.code for f in faults(rows)] == ["D120", "D125", "D123"]


def labelled(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_labels_that_differ_by_case_or_space():
    rows = labelled(*["Positive", "positive ", "positive", "negative", "Negative"] * 4)
    (finding,) = faults(rows)
    assert finding.code == "D126"
    assert "'positive '" in finding.message
    assert "(5 to 2 classes)" in finding.message
    result, notes = checked(rows, merge_labels=True)
    assert len({e.label for e in result.examples}) == 2
    assert notes[0].code == "D126"
    result, notes = checked(rows, waived={"D126"})
    assert len({e.label for e in result.examples}) == 5
    assert notes[0].code == "D126"


def test_a_label_with_one_row():
    rows = labelled(*"aaabbbc")
    (finding,) = faults(rows)
    assert finding.code == "D127"
    assert "(row 7)" in finding.message
    result, _ = checked(rows, drop_bad_rows=True)
    assert ([r.row for r in result.rejected], len(result.examples)) == ([7], 6)
    result, notes = checked(rows, waived={"D127"})
    assert (len(result.examples), notes[0].code) == (7, "D127")
    assert checked(rows, is_eval=True)[1] == []


def test_one_label_only():
    assert faults(labelled(*"aaaa"))[0].code == "D128"
    assert not checked(labelled(*"aaaa"), is_eval=True)[1]


def test_labels_that_are_texts_or_measurements():
    (finding,) = faults(labelled(*(f"a whole sentence {i}" for i in range(20))))
    assert finding.code == "D129"
    assert "looks like free text" in finding.message
    assert "prompt=text,completion=label" in finding.fix
    (finding,) = faults(labelled(*(str(i / 7) for i in range(20))))
    assert "looks like measurements" in finding.message
    (finding,) = faults(labelled("a", "b", 0.5, 0.25), task="classify")[:1]
    assert finding.code == "D129"
    assert "(rows 3, 4)" in finding.message


def test_labels_of_several_types_and_of_none():
    (finding,) = faults(labelled("yes", "yes", "no", "no", 1))
    assert (finding.code, "(row 5)" in finding.message) == ("D121", True)
    assert {f.code for f in faults(labelled("a", "a", "b", "b", None, ["a"]))} == {"D120", "D121"}
    result, _ = checked(labelled(1.0, 1.0, 0.0, 0.0))
    assert [e.label for e in result.examples] == [1, 1, 0, 0]


def test_duplicates_are_counted_and_kept():
    rows = [*labelled(*"aabb"), {"text": "text 0", "label": "a"}, {"text": "text 1", "label": "b"}]
    result, notes = checked(rows)
    assert (len(result.examples), result.duplicates) == (6, 1)
    assert [n.code for n in notes] == ["D130", "D134"]
    assert "rows 1, 5" in notes[0].message
    assert "rows 2, 6" in notes[1].message


def test_all_rows_faulty():
    (finding,) = faults([{"prompt": None, "completion": "b"}] * 3, drop_bad_rows=True)
    assert finding.code == "D104"


@pytest.mark.parametrize(("both", "stops"), [(0, None), (1, False), (2, False), (3, True)])
def test_eval_rows_that_are_also_in_train(both, stops):
    train = checked([{"text": f"t{i}"} for i in range(10)])[0].examples
    held = checked([{"text": f"t{i}" if i < both else f"other {i}"} for i in range(10)])[0].examples
    notes = Notes()
    check_overlap(train, held, notes)
    assert [f.code for f in notes.errors] == ["D131"] * bool(stops)
    assert [f.code for f in notes.notes] == ["D131"] * (stops is False)
    for finding in (*notes.errors, *notes.notes):
        assert finding.message == f"{both} of 10 eval rows ({both * 10} %) are also in train"


def test_only_judgements_can_be_waived():
    assert CODES.keys() > WAIVABLE
    faults([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], waived=set(CODES))


def test_labels_of_three_types_leave_the_commonest(write, tokenizer):
    rows = [{"text": f"t {at}", "label": label} for at, label in enumerate(["a", "b", "a", "b", 1, [], ["a"]])]
    found = prepare(write("rows.jsonl", rows), tokenizer=tokenizer, task="classify", eval_share=0, drop_bad_rows=True)
    assert found.labels.names == ("a", "b")
    assert [fault.row for fault in found.rejected] == [5, 6, 7]
