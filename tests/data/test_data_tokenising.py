"""What is trained is exactly the assistant's words and the end of its turn, whichever way the template tells it."""

from __future__ import annotations

import json
from pathlib import Path

import chat_templates
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from graftlm.data.checking import Example, Notes
from graftlm.data.labels import Labels
from graftlm.data.templates import Template, TemplateFault
from graftlm.data.tokenising import encode_chats, encode_documents, encode_labelled
from graftlm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "src" / "graftlm" / "bundled" / "base"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"

TALK = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hello, how are you?"},
    {"role": "user", "content": "I am well"},
    {"role": "assistant", "content": "Thank you."},
)
PAIR = ({"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Paris"})

# Text without control tokens, and without white space at its ends, which some templates strip.
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="<>"), min_size=1).map(
    str.strip
)
talks = st.lists(st.tuples(words.filter(bool), words.filter(bool)), min_size=1, max_size=3).map(
    lambda turns: tuple(
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    )
)


def example(messages, row=1):
    return Example(row, f"faq.jsonl:{row}", {"messages": messages}, messages=tuple(messages))


def encoded(conversations, tokenizer, template=None, **options):
    notes = Notes()
    template = template or Template.of(tokenizer)
    rows = [example(messages, row) for row, messages in enumerate(conversations, 1)]
    items, supervision, rejected = encode_chats(rows, tokenizer, template, notes, place="faq.jsonl", **options)
    notes.settle()
    return items, supervision, rejected, notes.notes


def learnt(item, tokenizer):
    return tokenizer.decode([label for label in item["labels"] if label != -100])


@pytest.mark.parametrize("name", ["CHATML", "CHATML_MARKED", "CHATML_HALF_MARKED", "OVERMARKED", "CLOSED_TEXT"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(talk=talks)
def test_trained_are_the_answers_and_the_end_of_turn(make_tokenizer, name, talk):
    tokenizer = make_tokenizer(getattr(chat_templates, name))
    (item,), _, _, _ = encoded([talk], tokenizer)
    assert tokenizer.decode(item["input_ids"]) == Template.of(tokenizer).render(talk)
    assert learnt(item, tokenizer) == "".join(m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant")
    trained = [at for at, label in enumerate(item["labels"]) if label != -100]
    assert [item["labels"][at] for at in trained] == [item["input_ids"][at] for at in trained]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(talk=talks)
def test_both_ways_agree_with_each_other_and_with_transformers(make_tokenizer, talk):
    unmarked, marked = make_tokenizer(chat_templates.CHATML), make_tokenizer(chat_templates.CHATML_MARKED)
    (one,), _, _, _ = encoded([talk], unmarked)
    (two,), _, _, _ = encoded([talk], marked)
    assert (one["input_ids"], one["labels"]) == (two["input_ids"], two["labels"])
    theirs = marked.apply_chat_template(list(talk), return_dict=True, return_assistant_tokens_mask=True)
    assert two["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in two["labels"]] == theirs["assistant_masks"]


def test_the_end_of_turn_is_read_off_the_template(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML)
    template = Template.of(tokenizer)
    assert template.end_of_turn == "<|im_end|>"
    assert template.stop_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert Template.of(make_tokenizer()).end_of_turn == "</s>"


def test_a_prompt_for_generation_is_what_training_saw_before_the_answer(make_tokenizer):
    for source in (None, chat_templates.CHATML, chat_templates.CHATML_MARKED):
        tokenizer = make_tokenizer(source)
        template = Template.of(tokenizer, chat=True)
        (item,), _, _, _ = encoded([TALK], tokenizer, template)
        prompt = template.encode(tokenizer, TALK[:-1])
        assert item["input_ids"][: len(prompt)] == prompt
        assert item["labels"][len(prompt) - 1 : len(prompt) + 1] == [-100, item["input_ids"][len(prompt)]]


@pytest.mark.parametrize(("name", "talk"), [("plain", PAIR), ("turns", TALK)])
def test_built_in_templates(make_tokenizer, name, talk):
    tokenizer = make_tokenizer()
    template = Template.of(tokenizer, chat=name == "turns")
    assert template.name == name
    (item,), _, _, notes = encoded([talk], tokenizer, template)
    assert learnt(item, tokenizer) == "".join(m["content"] + "</s>" for m in talk if m["role"] == "assistant")
    assert notes == []
    if name == "plain":
        assert tokenizer.decode(item["input_ids"]) == "What is the capital?\nParis</s>"


def test_a_template_survives_saving(make_tokenizer):
    for source in (None, chat_templates.CHATML):
        template = Template.of(make_tokenizer(source))
        again = Template.from_dict(json.loads(json.dumps(template.to_dict())))
        assert again == template
        assert again.passages(PAIR) == template.passages(PAIR)


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.THINKING)
    items, _, _, notes = encoded([TALK, PAIR], tokenizer)
    assert [learnt(item, tokenizer) for item in items] == [
        "<t></t>Hello, how are you?<|im_end|>",
        "<t></t>Thank you.<|im_end|>",
        "<t></t>Paris<|im_end|>",
    ]
    template = Template.of(tokenizer)
    assert tokenizer.decode(items[1]["input_ids"]) == template.render(TALK)
    assert [item["row"] for item in items] == [1, 1, 2]
    assert [note.code for note in notes] == ["D148"]
    assert "1 row more" in notes[0].message


def test_a_template_that_cannot_be_told_is_named(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.OPEN_THOUGHT, name_or_path="models/reasoner")
    with pytest.raises(DataError) as caught:
        encoded([PAIR, TALK], tokenizer)
    (finding,) = [f for f in caught.value.findings if "(row 1)" in f.message]
    assert finding.code == "D140"
    assert "chat template 'tokenizer' of models/reasoner" in finding.message
    assert "<t>" in finding.message
    with pytest.raises(TemplateFault):
        Template.of(tokenizer).passages(PAIR)


def test_a_template_that_forgets_the_system_message_is_caught(make_tokenizer):
    with pytest.raises(TemplateFault, match="Be kind"):
        Template.of(make_tokenizer(chat_templates.FORGETFUL)).passages(TALK)


def test_a_template_that_refuses_rows(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.ALTERNATING)
    twice = (PAIR[0], *PAIR)
    with pytest.raises(DataError, match="roles must alternate") as caught:
        encoded([PAIR, twice, twice], tokenizer)
    (finding,) = caught.value.findings
    assert finding.code == "D141"
    assert "(rows 2, 3)" in finding.message
    items, _, rejected, notes = encoded([PAIR, twice], tokenizer, drop_bad_rows=True)
    assert ([item["row"] for item in items], [r.row for r in rejected]) == ([1], [2])
    assert "D136" in [note.code for note in notes]


def test_a_template_without_an_end_of_turn_is_noted(make_tokenizer):
    _, _, _, notes = encoded([PAIR], make_tokenizer(chat_templates.ENDLESS))
    assert "D147" in [note.code for note in notes]


def test_a_prompt_that_ends_inside_a_token_is_noted(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.ENDLESS)
    _, supervision, _, notes = encoded([(PAIR[0], {"role": "assistant", "content": "is the capital"})], tokenizer)
    assert supervision.straddling_rows == 1
    assert "D150" in [note.code for note in notes]


def test_messages_of_weight_zero_are_not_trained(make_tokenizer):
    talk = (*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:])
    for source in (chat_templates.CHATML, chat_templates.CHATML_MARKED):
        tokenizer = make_tokenizer(source)
        (item,), _, _, _ = encoded([talk], tokenizer)
        assert learnt(item, tokenizer) == "Thank you.<|im_end|>"
        with pytest.raises(DataError, match="0 of "):
            encoded([(PAIR[0], {**PAIR[1], "weight": 0})], make_tokenizer(chat_templates.CHATML_MARKED))


def test_a_template_that_marks_nothing_trains_nothing(make_tokenizer):
    empty = chat_templates.CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(DataError) as caught:
        encoded([PAIR], make_tokenizer(empty))
    assert caught.value.findings[0].code == "D142"
    assert caught.value.findings[0].message.startswith("0 of ")


def test_a_conversation_that_the_assistant_opens(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML)
    talk = ({"role": "assistant", "content": "Hello"}, *PAIR)
    (item,), _, _, _ = encoded([talk], tokenizer)
    assert learnt(item, tokenizer) == "Hello<|im_end|>Paris<|im_end|>"
    # With nothing before it, the first token has nothing to be predicted from and is not counted.
    (item,), supervision, _, _ = encoded([talk], make_tokenizer())
    assert item["labels"][0] == item["input_ids"][0]
    assert supervision.trained_tokens == sum(label != -100 for label in item["labels"]) - 1


def test_rows_are_cut_and_counted(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML)
    whole, _, _, _ = encoded([PAIR, TALK], tokenizer)
    longest = len(whole[1]["input_ids"])
    items, supervision, _, notes = encoded([PAIR, TALK], tokenizer, max_length=longest - 3)
    assert items[1]["input_ids"] == whole[1]["input_ids"][:-3]
    assert len(items[1]["labels"]) == longest - 3
    assert supervision.cut_rows == 1
    assert supervision.lengths == (len(whole[0]["input_ids"]), longest)
    assert [note.code for note in notes] == ["D146"]


def test_rows_that_lose_their_whole_answer(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML)
    with pytest.raises(DataError) as caught:
        encoded([PAIR, PAIR, TALK], tokenizer, max_length=8)
    (finding,) = caught.value.findings
    assert finding.code == "D143"
    assert finding.message.startswith("3 of 3 rows lose their whole answer at --max-length 8 (median ")
    assert finding.fix == "--max-length 64"
    _, supervision, _, _ = encoded([PAIR, PAIR, TALK], tokenizer, max_length=int(finding.fix.split()[1]))
    assert supervision.cut_rows == 0
    _, _, rejected, _ = encoded([PAIR], tokenizer, max_length=8, drop_bad_rows=True)
    assert [(r.row, "[D143]" in r.reason) for r in rejected] == [(1, True)]


def test_a_longer_length_than_the_tokenizer_allows_is_not_suggested(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML, model_max_length=20)
    with pytest.raises(DataError) as caught:
        encoded([TALK], tokenizer, max_length=8)
    assert caught.value.findings[0].fix == "--set data.drop_bad_rows=true"
    items, _, _, _ = encoded([PAIR], make_tokenizer(chat_templates.CHATML, model_max_length=50))
    assert len(items[0]["input_ids"]) <= 50


def test_what_supervision_says(make_tokenizer):
    tokenizer = make_tokenizer(chat_templates.CHATML)
    items, supervision, _, _ = encoded([PAIR, TALK, PAIR], tokenizer)
    assert supervision.total_tokens == sum(len(item["input_ids"]) for item in items)
    assert supervision.trained_tokens == sum(label != -100 for item in items for label in item["labels"])
    share = 100 * supervision.trained_tokens / supervision.total_tokens
    assert supervision.line == f"loss on {share:.0f} % of tokens: assistant turns + end of turn"
    assert len(supervision.examples) == 2
    assert supervision.marked(0).endswith("<|im_start|>assistant\\n[[Paris<|im_end|>]]\\n")


def test_control_tokens_in_a_text_are_noted(make_tokenizer):
    talk = ({"role": "user", "content": "struck <s>out</s>"}, PAIR[1])
    _, _, _, notes = encoded([PAIR, talk], make_tokenizer(chat_templates.CHATML))
    assert [note.code for note in notes] == ["D145", "D145"]
    assert "(row 2)" in notes[0].message


def test_documents_become_blocks(make_tokenizer):
    tokenizer = make_tokenizer()
    texts = ["The quick brown fox jumps over the lazy dog.", "Hello"]
    rows = [Example(i, "", {}, texts=(text,)) for i, text in enumerate(texts, 1)]
    items, supervision = encode_documents(rows, tokenizer, max_length=8)
    assert all(len(item["input_ids"]) <= 8 for item in items)
    assert all(item["labels"] == item["input_ids"] for item in items)
    for row, text in enumerate(texts, 1):
        ids = [token for item in items if item["row"] == row for token in item["input_ids"]]
        assert tokenizer.decode(ids).removesuffix("</s>") == text
    assert supervision.trained_tokens == supervision.total_tokens - len(items)
    assert f"{len(items)} blocks of at most 8 tokens" in supervision.line


def test_labelled_texts(make_tokenizer):
    tokenizer = make_tokenizer()
    long = "The quick brown fox jumps over the lazy dog."
    rows = [
        Example(1, "", {}, texts=("Hello", "there"), label="yes"),
        Example(2, "", {}, texts=(long, "Hello there"), label="no"),
    ]
    notes = Notes()
    items, supervision = encode_labelled(rows, tokenizer, Labels.of(["yes", "no"]), notes, max_length=10)
    assert [item["labels"] for item in items] == [1, 0]
    assert tokenizer.decode(items[0]["input_ids"]) == "Hellothere"
    assert len(items[1]["input_ids"]) == 10
    assert supervision.cut_rows == 1
    assert [note.code for note in notes.notes] == ["D146"]
    assert supervision.line == "loss on one label a row: 2 classes, the largest no (50 %)"


def test_a_slow_tokenizer_is_refused(make_tokenizer):
    class Slow:
        is_fast = False
        name_or_path = "old"

    with pytest.raises(DataError) as caught:
        encode_chats([example(PAIR)], Slow(), Template.built_in("plain", eos_token="</s>"), Notes())
    assert caught.value.findings[0].code == "D144"


@pytest.mark.skipif(not (BASE / "tokenizer.json").exists(), reason="the bundled base is not there")
def test_the_bundled_base():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    (item,), _, _, _ = encoded([TALK], tokenizer)
    theirs = tokenizer.apply_chat_template(list(TALK), return_dict=True, return_assistant_tokens_mask=True)
    assert item["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in item["labels"]] == theirs["assistant_masks"]
    assert learnt(item, tokenizer) == "Hello, how are you?<|end|>Thank you.<|end|>"


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/models/stories260K is not there")
def test_a_sentencepiece_tokenizer_without_a_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for talk, chat in ((PAIR, False), (TALK, True)):
        template = Template.of(tokenizer, chat=chat)
        (item,), supervision, _, _ = encoded([talk], tokenizer, template)
        assert item["input_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in item["input_ids"][1:]
        assert learnt(item, tokenizer) == "".join(m["content"] + "</s>" for m in talk if m["role"] == "assistant")
        assert supervision.straddling_rows == 0


@pytest.mark.parametrize(
    "task", ["classify", "regress", "tag", "sft", "dpo", "choice", "kto", "tfew", "reward", "grpo"]
)
@pytest.mark.parametrize("apart", [False, True])
def test_each_cut_row_is_listed_with_the_tokens_that_it_had(task, apart, tokenizer, write):
    from graftlm.data import prepare
    from training.tiny_runs import rows_for

    rows = rows_for({"grpo": "sft"}.get(task, task), 30)
    for at in (4, 17):
        name = next(name for name in ("prompt", "tokens", "text") if name in rows[at])
        more = [f"word{n}" for n in range(200)]
        rows[at][name] = [*rows[at][name], *more] if name == "tokens" else " ".join([*more, rows[at][name]])
        if name == "tokens":
            rows[at]["tags"] = [*rows[at]["tags"], *["O"] * 200]
    path = write("rows.jsonl", rows)
    written = task not in ("classify", "regress", "tag")
    ready = prepare(path, tokenizer=tokenizer, task=task, max_length=150, eval_share=0.3, apart=apart,
                    template="plain" if written else None, drop_bad_rows=True)  # fmt: skip
    listed = {cut.place: cut.tokens for cut in ready.cut}
    gone = {one.place for one in ready.rejected}
    assert listed.keys() | gone == {"rows.jsonl:5", "rows.jsonl:18"}
    assert all(tokens > 400 for tokens in listed.values())
    assert bool(gone) == (task == "sft")
    assert max(ready.supervision.lengths + ready.eval_supervision.lengths) > 400
    note = next((note for note in ready.notes if note.code == "D146"), None)
    assert (note is not None and "longest" in note.message) == bool(listed)
