"""What each verb hands to the rooms below, and what it prints of what they give back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_stand_ins import Rooms, Screen

_LABELLED = {
    "labels": ["no", "yes"],
    "eval_rows": 1200,
    "scores": [
        {"name": "tuned", "title": "tuned (lora)", "accuracy": 0.9, "macro_f1": 0.88, "macro_f1_low": 0.8,
         "macro_f1_high": 0.95},
        {"name": "base", "title": "untouched base", "accuracy": 0.5, "macro_f1": 0.3},
    ],
}  # fmt: skip
_WRITTEN = {
    "eval_rows": 12,
    "eval_tokens": 400,
    "scores": [
        {"name": "tuned", "title": "tuned (lora)", "loss": 1.5, "loss_low": 1.4, "loss_high": 1.6, "perplexity": 4.48}
    ],
}


# --- train ---


def test_train_hands_over_what_was_given(cli: Callable, rooms: Rooms, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: {batch: 8, epochs: 2}\n")
    said = cli(
        "train", "bundled:answers", "-m", "some/base", "--method", "bitfit", "--lr", "1e-3", "--epochs", "1",
        "-c", str(config), "--set", "train.warmup=0.1", "--set", "train.accumulate=2", "--map", "prompt=completion,completion=prompt",
    )  # fmt: skip
    assert said.code == 0, said.err
    (resolved,), options = rooms.named("train_resolved")[0]
    settings = resolved.settings
    assert (settings.data.path, settings.model.name, settings.method) == ("bundled:answers", "some/base", "bitfit")
    assert (settings.train.learning_rate, settings.train.epochs, settings.train.batch) == (1e-3, 1.0, 8)
    assert (settings.train.warmup, settings.train.accumulate) == (0.1, 2)
    assert settings.data.map == {"prompt": "completion", "completion": "prompt"}
    assert resolved.origin["train.epochs"] == "--epochs"
    assert options["resume"] is False
    assert options["command"].startswith("graftlm train bundled:answers -m some/base")


@pytest.mark.parametrize(
    ("task", "status", "following"),
    [
        ("sft", "done", "graftlm chat 'runs/x y' --vs base"),
        ("classify", "done", "graftlm predict 'runs/x y' \"a text to label\""),
        ("regress", "done", "graftlm predict 'runs/x y' \"a text to label\""),
        ("tfew", "done", "graftlm evaluate 'runs/x y' more.jsonl"),
        ("lm", "done", "graftlm generate 'runs/x y' \"a prompt\" --vs base"),
        ("lm", "stopped", "graftlm train -o 'runs/x y' --resume"),
    ],
)
def test_train_says_what_to_do_next(cli: Callable, rooms: Rooms, task: str, status: str, following: str) -> None:
    rooms.task, rooms.status = task, status
    assert cli("train", "x.csv", "--resume", "-o", "runs/x").out == f"next     {following}\n"
    assert rooms.named("train_resolved")[0][1]["resume"] is True
    if status == "done" and task in ("classify", "regress"):
        rooms.columns = {"text": "premise", "text2": "hypothesis", "label": "label"}
        assert (
            cli("train", "x.csv", "--resume", "-o", "runs/x").out == "next     graftlm predict 'runs/x y' pairs.csv\n"
        )


# --- evaluate ---


def test_evaluate_prints_a_table_or_json(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    rooms.results = _LABELLED
    out = cli("evaluate", adapter_folder).out
    assert "1 200 rows" in out
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == ["tuned (lora)", "untouched base"]
    assert "90.0 %" in out
    assert "0.800 to 0.950" in out
    assert "?" in out.splitlines()[-1]  # no interval was given
    assert json.loads(cli("evaluate", adapter_folder, "--json").out) == _LABELLED
    rooms.results = _WRITTEN
    assert "1.400 to 1.600" in cli("evaluate", adapter_folder).out


def test_evaluate_hands_over_what_was_given(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    rooms.results = _WRITTEN
    said = cli("evaluate", adapter_folder, "new.csv", "-m", "x/y", "--map", "text=body", "--max-rows", "5")
    assert said.code == 0, said.err
    args, options = rooms.named("evaluate")[0]
    assert [str(arg) for arg in args] == ["runs/faq-1", "new.csv"]
    given = {"base": "x/y", "mapping": {"text": "body"}, "max_rows": 5}
    assert options == given | {"against": None, "worst": 3, "generate": 0}


def test_evaluate_shows_the_other_run_and_the_worst_rows(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    told = {"difference": 0.02, "low": -0.01, "high": 0.05, "p_value": 0.21, "verdict": "not distinguishable"}
    against = {"name": "runs/b", "scores": _LABELLED["scores"][0], "measures": {"accuracy": told}}
    sure = {"ece": 0.04, "brier": 0.2, "nats": 0.3}
    worst = [{"row": 7, "text": "Where is it?", "label": "no", "predicted": "yes", "probability": 0.99, "nats": 4.6}]
    rooms.results = _LABELLED | {"against": against, "calibration": sure, "worst": worst}
    said = cli("evaluate", adapter_folder, "--against", adapter_folder, "--worst", "1")
    assert said.code == 0, said.err
    for part in ("against: runs/b", "+0.0200", "-0.0100 to +0.0500", "not distinguishable", "4.0 %", "is no, said yes"):
        assert part in said.out


# --- predict ---


@pytest.fixture
def labeller(rooms: Rooms) -> Rooms:
    rooms.task = "classify"
    return rooms


def _texts(rooms: Rooms) -> Any:
    return rooms.named("classify_texts")[-1][0][3]


def test_predict_gives_json_lines_off_a_terminal(cli: Callable, labeller: Rooms, adapter_folder: str) -> None:
    said = cli("predict", adapter_folder, "first text", "--", "-5 degrees")
    assert [json.loads(line) for line in said.out.splitlines()] == [
        {"text": text, "label": "yes", "probability": 0.75, "probabilities": {"no": 0.25, "yes": 0.75}}
        for text in ("first text", "-5 degrees")
    ]
    assert labeller.named("classify_texts")[0][1] == {"max_length": 64}


def test_predict_gives_a_table_on_a_terminal(
    cli: Callable, labeller: Rooms, adapter_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    cli("predict", adapter_folder, "first\ntext \x1b[2J")
    assert "first\\ntext" in screen.getvalue()
    assert "0.750" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "flags", "wanted"),
    [
        ("a.csv", "text,label\none,x\ntwo,x\n", [], ["one", "two"]),
        ("a.csv", "id,body\n1,one\n2,two\n", ["--map", "text=body"], ["one", "two"]),
        ("a.csv", "review,label\none,x\ntwo,y\n", [], ["one", "two"]),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', [], ["one", "two"]),
        ("a.tsv", "anything\none\ntwo\n", [], ["one", "two"]),
        ("a.txt", "one\n\ntwo\n", [], ["one", "two"]),
        ("a.csv", "premise,hypothesis,label\none,two,x\n", [], [("one", "two")]),
        ("a.csv", "premise,hypothesis\none,two\n", [], [("one", "two")]),
        ("a.csv", "a,b\none,two\n", ["--map", "text=a,text2=b"], [("one", "two")]),
        ("a.csv", "text,score\none,0.5\n", [], ["one"]),
        ("a.jsonl", '{"tokens": ["one", "two"], "tags": ["O", "O"]}\n', [], ["one two"]),
    ],
)
def test_predict_reads_files(
    cli: Callable, labeller: Rooms, adapter_folder: str, name: str, content: str, flags: list[str], wanted: list[str]
) -> None:
    Path(name).write_text(content)
    said = cli("predict", adapter_folder, name, *flags)
    assert said.code == 0, said.err
    assert _texts(labeller) == wanted


def test_predict_reads_standard_input_and_writes_a_file(cli: Callable, labeller: Rooms, adapter_folder: str) -> None:
    said = cli("predict", adapter_folder, "-o", "out.jsonl", stdin="one\n\ntwo\n")
    assert (said.code, said.out) == (0, "")
    assert _texts(labeller) == ["one", "two"]
    assert [json.loads(line)["text"] for line in Path("out.jsonl").read_text().splitlines()] == ["one", "two"]
    cli("predict", adapter_folder, "-", stdin="three")
    assert _texts(labeller) == ["three"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.csv"], "no file 'nothing.csv'"),
        (["a.csv", "more"], "a.csv is a file, and there is more"),
        (["wrong.csv"], "found id, note"),
        (["gaps.jsonl"], "1 row has null 'text' (row 2)"),
        (["a.csv", "--map", "text=bdy"], "no column 'bdy'"),
        (["a.csv", "--map", "text"], "--map"),
        (["a.csv", "-o", "a.csv"], "is the file to be read"),
        (["a.csv", "-o", "no/such/folder/x"], "there is no folder no/such/folder"),
        (["one", "a \udcff b"], "text 2 not UTF-8: a \\udcff b"),
        ([], "no text was given"),
    ],
)
def test_predict_refuses(cli: Callable, labeller: Rooms, adapter_folder: str, words: list[str], said: str) -> None:
    Path("a.csv").write_text("text,label\none,x\ntwo,y\n")
    Path("wrong.csv").write_text("id,note\n1,2\n")
    Path("gaps.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    answer = cli("predict", adapter_folder, *words)
    assert answer.code == 2
    assert said in answer.err
    assert not labeller.calls  # nothing was loaded


@pytest.mark.parametrize(("learnt", "words"), [(2, ["one"]), (1, ["pairs.csv"])])
def test_predict_refuses_another_number_of_texts_than_was_learnt(
    cli: Callable, labeller: Rooms, adapter_folder: str, learnt: int, words: list[str]
) -> None:
    Path("pairs.csv").write_text("premise,hypothesis\none,two\n")
    labeller.facts = {"texts": learnt}
    answer = cli("predict", adapter_folder, *words)
    assert answer.code == 2
    kinds = ("pairs of texts", "single texts") if learnt == 2 else ("single texts", "pairs of texts")
    assert f"has learnt from {kinds[0]}, found {kinds[1]}" in answer.err
    labeller.facts = {"texts": 3 - learnt}
    assert cli("predict", adapter_folder, *words).code == 0


def test_each_kind_of_adapter_is_sent_to_its_verb(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    assert "fix: graftlm chat runs/faq-1" in cli("predict", adapter_folder, "x").err
    for task, verb in (("classify", "predict"), ("regress", "predict"), ("tag", "predict"), ("reward", "evaluate")):
        rooms.task = task
        for words in (["generate", adapter_folder, "x"], ["chat", adapter_folder]):
            answer = cli(*words)
            assert answer.code == 2
            assert f"fix: graftlm {verb} runs/faq-1" in answer.err
    rooms.task = "reward"
    assert "fix: graftlm evaluate runs/faq-1" in cli("predict", adapter_folder, "x").err


# --- generate ---


def test_generate_answers_with_the_flags(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    said = cli(
        "generate", adapter_folder, "why?", "--max-new-tokens", "7", "--temperature", "0.5", "--top-p", "0.9",
        "--seed", "3", "-m", "x/y",
    )  # fmt: skip
    assert (said.code, said.out) == (0, "tuned answer 0\n")
    args, options = rooms.named("generate_texts")[0]
    assert args == ("template", [[{"role": "user", "content": "why?"}]])
    assert options == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert rooms.named("open_adapter")[0][1] == {"base": "x/y"}


def test_generate_raw_and_without_a_template_continues(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    assert cli("generate", adapter_folder, "Once", "--raw").err == ""
    rooms.template = None
    assert "the text is continued" in cli("generate", adapter_folder, "Once").err
    assert [args for args, _ in rooms.named("generate_texts")] == [(None, ["Once"]), (None, ["Once"])]


def test_generate_beside_the_base(
    cli: Callable, rooms: Rooms, adapter_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", adapter_folder, "one", "two", "--vs", "base")
    assert cli(*words).out == (
        "> one\nbase: base answer 0\ntuned: tuned answer 0\n\n> two\nbase: base answer 1\ntuned: tuned answer 1\n"
    )
    lines = [json.loads(line) for line in cli(*words, "--json").out.splitlines()]
    assert lines[1] == {"prompt": "two", "base": "base answer 1", "tuned": "tuned answer 1"}
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    cli(*words)
    assert "base answer 0" in screen.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("p.txt", "one\ntwo\n", ["one", "two"]),
        ("p.csv", "question,id\none,1\ntwo,2\n", ["one", "two"]),
        ("p.jsonl", '{"prompt": "one", "completion": "x"}\n{"prompt": "two", "completion": "y"}\n', ["one", "two"]),
    ],
)
def test_generate_reads_prompts_from_a_file(
    cli: Callable, rooms: Rooms, adapter_folder: str, name: str, content: str, wanted: list[str]
) -> None:
    Path(name).write_text(content)
    said = cli("generate", adapter_folder, "--file", name)
    assert said.code == 0, said.err
    assert [talk[-1]["content"] for talk in rooms.named("generate_texts")[0][0][1]] == wanted


def test_generate_reads_conversations_up_to_the_last_question(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    Path("p.jsonl").write_text(json.dumps({"messages": [*turns, {"role": "assistant", "content": "d"}]}) + "\n")
    assert cli("generate", adapter_folder, "--file", "p.jsonl").code == 0
    assert rooms.named("generate_texts")[0][0][1] == [turns]
    Path("p.jsonl").write_text('{"messages": [{"role": "assistant", "content": "d"}]}\n')
    assert "p.jsonl:1 no conversation with a question" in cli("generate", adapter_folder, "--file", "p.jsonl").err


def test_a_template_that_refuses_is_a_users_error(
    cli: Callable, rooms: Rooms, adapter_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftlm.data.templates import TemplateFault

    rooms.error = None

    def refuse(*_: Any, **__: Any) -> list[str]:
        raise TemplateFault("D141", "two questions in a row")

    monkeypatch.setattr(sys.modules["graftlm.evaluation"], "generate_texts", refuse)
    said = cli("generate", adapter_folder, "x")
    assert (said.code, "two questions in a row [D141]" in said.err) == (2, True)


def test_generate_with_the_bundled_base(cli: Callable) -> None:
    said = cli("generate", "bundled", "Once upon a time", "--raw", "--max-new-tokens", "4", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["prompt"] == "Once upon a time"
    assert isinstance(found["answer"], str)


# --- chat ---


def test_chat_from_a_pipe(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    said = cli("chat", adapter_folder, stdin="one\n\n\udcff\n/base\ntwo\n/tuned\n/reset\nthree\n/exit\nfour\n")
    assert (said.code, said.out) == (0, "tuned says so\nbase says so\ntuned says so\n")
    heard = [[m["content"] for m in args[1]] for args, _ in rooms.named("stream_text")]
    assert heard == [["one"], ["two"], ["three"]]
    assert rooms.named("stream_text")[0][1] == {"max_new_tokens": 96, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def test_chat_remembers_what_each_has_said(cli: Callable, rooms: Rooms, adapter_folder: str) -> None:
    said = cli("chat", adapter_folder, "--vs", "base", stdin="one\ntwo")
    assert said.out == "base: base says so\ntuned: tuned says so\n" * 2
    heard = [[m["content"] for m in args[1]] for args, _ in rooms.named("stream_text")]
    assert heard[2:] == [["one", "base says so", "two"], ["one", "tuned says so", "two"]]


def test_chat_with_a_base_model_has_no_adapter(cli: Callable, rooms: Rooms) -> None:
    rooms.tuned, rooms.template = False, None
    said = cli("chat", "bundled", stdin="/tuned\n/resett\nhello\n")
    assert "it has no adapter" in said.err
    assert "Did you mean /reset?" in said.err
    assert rooms.named("stream_text")[0][0] == (None, "hello")


def test_chat_goes_on_after_an_answer_is_stopped(
    cli: Callable, rooms: Rooms, adapter_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    closed: list[bool] = []

    def stopped(model: Any, tokenizer: Any, template: Any, messages: Any, **_: Any) -> Iterator[str]:
        asked.append([message["content"] for message in messages])
        try:
            yield "half"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(sys.modules["graftlm.evaluation"], "stream_text", stopped)
    said = cli("chat", adapter_folder, stdin="one\ntwo\n")
    assert (said.code, said.out) == (0, "half\nhalf\n")
    assert asked == [["one"], ["one", "half", "two"]]
    assert len(closed) == 2


def test_chat_on_a_terminal_ends_with_the_input(
    cli: Callable, rooms: Rooms, adapter_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello"])

    def typed(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    assert cli("chat", adapter_folder).code == 0
    assert screen.getvalue() == "tuned says so\n\n"


# --- methods, explain ---


def test_methods_lists_every_method(cli: Callable) -> None:
    from graftlm.methods import METHODS

    out = cli("methods").out
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(METHODS)
    listed = {method["name"]: method for method in json.loads(cli("methods", "--json").out)}
    assert listed["lora"]["settings"]["rank"] == 8
    assert all(method["line"] for method in listed.values())
    assert "rank = 8" in cli("methods", "lora").out


def test_explain_knows_every_code_that_the_package_can_say(cli: Callable) -> None:
    import re

    import graftlm

    source = "".join(file.read_text() for file in Path(graftlm.__file__).parent.rglob("*.py"))
    said = set(re.findall(r'(?:Finding|\.error|\.note)\(\s*"([A-Z]\d{3})"', source))
    known = json.loads(cli("explain", "--json").out)
    assert len(said) > 50
    assert said <= known.keys()
    assert all(known.values()), [code for code, line in known.items() if not line]


def test_explain_one_code(cli: Callable) -> None:
    assert "the data file does not exist" in cli("explain", "d101").out
    assert "no model folder" in cli("explain", "[M102]").out
    found = json.loads(cli("explain", "L102", "--json").out)
    assert found["meaning"].startswith("a flag that does not exist")
    assert found["messages"]
