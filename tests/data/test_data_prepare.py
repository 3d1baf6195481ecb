"""One call from a file to batches: the right task, the right sides, every fault before anything is trained."""

from __future__ import annotations

import chat_templates
import pytest

from graftlm.data import Collator, Template, prepare
from graftlm.errors import DataError

FAQ = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(50)]
TICKETS = [{"text": f"ticket {i}", "label": "refund" if i % 3 else "other"} for i in range(60)]


def codes(caught):
    return [finding.code for finding in caught.value.findings]


def test_questions_and_answers(write, make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML)
    path = write("faq.jsonl", [*FAQ, FAQ[0]])
    ready = prepare(path, tokenizer=tokenizer)
    assert (ready.task, len(ready.train), len(ready.eval), ready.labels) == ("sft", 41, 10, None)
    assert ready.line == "faq.jsonl  51 rows  prompt=question completion=answer   1 duplicate, 0 cut"
    assert ready.eval_line == "eval 19.6 % = 10 rows"
    assert ready.template.name == "tokenizer"
    assert not {i["example"].key for i in ready.train} & {i["example"].key for i in ready.eval}
    assert ready.train[0]["example"].raw == FAQ[ready.train[0]["row"] - 1]
    batch = Collator(ready.pad_id)(ready.train[:4])
    assert (batch["labels"] != -100).any(dim=1).all()
    assert ready.sha256.keys() == {str(path)}


def test_the_same_call_gives_the_same_rows(write, tokenizer):
    path = write("faq.jsonl", FAQ)
    rows = [[item["row"] for item in prepare(path, tokenizer=tokenizer, seed=seed).eval] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_labels(write, tokenizer):
    ready = prepare(write("tickets.jsonl", TICKETS), tokenizer=tokenizer)
    assert (ready.task, ready.labels.names) == ("classify", ("other", "refund"))
    assert sum(item["labels"] == 0 for item in ready.eval) == 4
    assert len(ready.eval) == 12


def test_documents(write, tokenizer):
    text = "\n\n".join(f"Paragraph {i} of a story about a fox." for i in range(60))
    ready = prepare(write("story.txt", text), tokenizer=tokenizer, max_length=32)
    assert ready.task == "lm"
    learnt = [tokenizer.decode([t for item in side for t in item["input_ids"]]) for side in (ready.train, ready.eval)]
    assert "".join(learnt).replace("</s>", "") == text
    assert 0.02 < len(learnt[1]) / len(text) < 0.1
    assert ready.eval_line == "eval 6.6 % = the end of the text"
    ready = prepare(write("docs.jsonl", [{"text": f"Document {i}"} for i in range(40)]), tokenizer=tokenizer)
    assert len({item["row"] for item in ready.eval}) == 8


def test_a_base_without_a_chat_template_is_told(write, tokenizer):
    ready = prepare(write("faq.jsonl", FAQ), tokenizer=tokenizer)
    assert (ready.template.name, [note.code for note in ready.notes]) == ("plain", ["D149"])
    chat = [
        {"messages": [{"role": "system", "content": "Be kind"}, *row]}
        for row in [
            [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}] for i in range(9)
        ]
    ]
    assert prepare(write("chat.jsonl", chat), tokenizer=tokenizer).template.name == "turns"
    assert prepare(write("chat.jsonl", chat), tokenizer=tokenizer, template="plain").template.name == "plain"
    given = prepare(write("chat.jsonl", chat), tokenizer=tokenizer, template=chat_templates.CHATML)
    assert (given.template.name, given.template.end_of_turn) == ("given", "<|im_end|>")


def test_an_eval_file(write, tokenizer):
    held = [{"question": "Who?", "answer": "Me."}, FAQ[0]]
    more = [*({"question": f"Why {i}?", "answer": "So."} for i in range(8)), *held]
    ready = prepare(write("a.jsonl", FAQ), write("b.jsonl", more), tokenizer=tokenizer)
    assert (len(ready.train), len(ready.eval), ready.eval_line) == (50, 10, "eval b.jsonl = 10 rows")
    assert "1 of 10 eval rows (10 %) are also in train" in [note.message for note in ready.notes]
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", FAQ), write("b.jsonl", FAQ[:20]), tokenizer=tokenizer)
    assert codes(caught) == ["D131"]
    assert "20 of 20 eval rows (100 %)" in str(caught.value)
    ready = prepare(write("a.jsonl", FAQ), write("b.jsonl", FAQ[:20]), tokenizer=tokenizer, waived={"D131"})
    assert len(ready.eval) == 20


def test_an_eval_file_that_does_not_fit(write, tokenizer):
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", FAQ), write("b.jsonl", [{"question": "a", "reply": "b"}]), tokenizer=tokenizer)
    assert codes(caught) == ["D110"]
    odd = [{"text": "new", "label": "unknown"}, {"text": "old", "label": "other"}]
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", TICKETS), write("b.jsonl", odd), tokenizer=tokenizer)
    assert codes(caught) == ["D132"]
    ready = prepare(write("a.jsonl", TICKETS), write("b.jsonl", odd), tokenizer=tokenizer, waived={"D132"})
    assert [item["row"] for item in ready.eval] == [2]


def test_rows_to_evaluate_a_trained_adapter_on(write, tokenizer):
    labels = prepare(write("a.jsonl", TICKETS), tokenizer=tokenizer).labels
    one = write("b.jsonl", [{"text": "new", "label": "refund"}])
    ready = prepare(one, tokenizer=tokenizer, labels=labels, eval_share=0)
    assert ([item["labels"] for item in ready.train], ready.labels) == ([1], labels)
    assert ready.train[0]["example"].text == "new"
    with pytest.raises(DataError) as caught:
        prepare(write("c.jsonl", [{"text": "n", "label": "x"}]), tokenizer=tokenizer, labels=labels, eval_share=0)
    assert codes(caught) == ["D132"]
    template = Template.of(tokenizer, choice=chat_templates.CHATML)
    assert prepare(write("faq.jsonl", FAQ), tokenizer=tokenizer, template=template).template is template


def test_faults_of_both_files_are_told_at_once(write, tokenizer):
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", "{\n"), write("b.jsonl", ""), tokenizer=tokenizer)
    assert codes(caught) == ["D105", "D104"]
    bad = {"question": None, "answer": "x"}
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", [*FAQ, bad]), write("b.jsonl", [*FAQ[:1], bad]), tokenizer=tokenizer)
    assert [(f.code, f.place) for f in caught.value.findings] == [
        ("D120", "a.jsonl"), ("D120", "b.jsonl"), ("D131", "b.jsonl")
    ]  # fmt: skip


def test_bad_rows_are_left_out_when_asked(write, tokenizer):
    lines = (
        '{"prompt": "a", "completion": "b"}\n{broken\n{"prompt": "a", "completion": null}\n'
        '{"prompt": "c", "completion": "d"}\n'
    )
    ready = prepare(write("a.jsonl", lines), tokenizer=tokenizer, drop_bad_rows=True, eval_share=0)
    assert [item["row"] for item in ready.train] == [1, 3]
    assert [r.place for r in ready.rejected] == ["a.jsonl:2:2", "a.jsonl:3"]
    assert ready.line.endswith("0 duplicates, 0 cut, 2 left out")


def test_too_few_rows_for_a_split(write, tokenizer):
    ready = prepare(write("a.jsonl", FAQ[:1]), tokenizer=tokenizer)
    assert (len(ready.train), ready.eval, ready.eval_line) == (1, [], "no eval rows")
    assert "D133" in [note.code for note in ready.notes]
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", FAQ[:1]), tokenizer=tokenizer, eval_share=0.5)
    assert codes(caught) == ["D133"]


def test_numbers_out_of_range_are_told_together(write, tokenizer):
    with pytest.raises(DataError) as caught:
        prepare("nowhere.jsonl", eval_share=5, max_rows=0, max_length=1, tokenizer=tokenizer)
    assert codes(caught) == ["D133", "D104", "D143"]
    assert caught.value.findings[0].fix == "--set data.eval_share=0.05"


def test_answers_beyond_the_length_are_one_kind_of_fault(write, tokenizer):
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", FAQ), tokenizer=tokenizer, max_length=4)
    assert [(f.code, f.place) for f in caught.value.findings] == [("D143", "a.jsonl"), ("D143", "a.jsonl (eval part)")]


def test_nothing_to_learn(write, tokenizer):
    with pytest.raises(DataError) as caught:
        prepare(write("a.jsonl", [{"text": ""}, {"text": " "}]), tokenizer=tokenizer, drop_bad_rows=True)
    assert codes(caught) == ["D104"]


def test_max_rows_is_told(write, tokenizer):
    ready = prepare(write("a.jsonl", FAQ), tokenizer=tokenizer, max_rows=10)
    assert len(ready.train) + len(ready.eval) == 10
    assert "D135" in [note.code for note in ready.notes]
