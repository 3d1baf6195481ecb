"""Wrong data files, bases, folders and method texts: one code, the place, few lines, and a fix that ends the fault.

Each is looked at by `check`, which tells all of them without torch (methods apart); the fix that is offered is applied
as a user would paste it, and the same look then finds nothing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graftlm.cli import main
from graftlm.cli.check import verb
from graftlm.cli.run_flags import attempted_from
from graftlm.errors import Finding, GraftError
from graftlm.methods import read_method
from graftlm.training.early import early_findings

ANSWERED = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(12)]
LABELLED = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(12)]


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHATS = [chat(("user", f"h {n}"), ("assistant", "x")) for n in range(12)]
GOOD = lines(ANSWERED)


@dataclass(frozen=True)
class Mistake:
    """`files` (with rows.jsonl first) and the words after `check`; the finding has `code` and `says`."""

    code: str
    says: str
    rows: str | bytes = GOOD
    words: str = "rows.jsonl"
    files: dict[str, str] = field(default_factory=dict)
    #: Whether there is something to paste; else only a person can mend it.
    mends: bool = True


MISTAKES = {
    "a name with a typo": Mistake("D101", "Did you mean rows.jsonl (12 rows)?", words="rows.jsnl"),
    "a folder without rows": Mistake("D102", "is a folder without", words="data", files={"data/x.py": "x"}, mends=False),
    "an unknown ending": Mistake("D103", ".xyz", words="rows.xyz", files={"rows.xyz": GOOD}),
    "empty": Mistake("D104", "rows.jsonl the file is empty", "", mends=False),
    "lists in lists": Mistake("D105", "rows.jsonl:13 lists and objects inside one another", GOOD + "[" * 100_000 + "\n"),
    "lists in lists of a row": Mistake(
        "D105", "rows.jsonl:13 lists and objects inside one another",
        GOOD + '{"prompt": "a", "completion": ' + "[" * 480 + "]" * 480 + "}\n",
    ),
    "lists in an array": Mistake(
        "D105", "rows.json:1 lists and objects inside one another", words="rows.json",
        files={"rows.json": "[" * 100_000}, mends=False,
    ),
    "half a character": Mistake("D118", "rows.jsonl:13 a text has half a character", GOOD + '{"prompt": "a \\ud83d", "completion": "b"}\n'),
    "a line cut short": Mistake("D105", "rows.jsonl:13:12", GOOD + '{"prompt": "a\n'),
    "another encoding": Mistake("D106", "rows.csv:2", words="rows.csv", files={"rows.csv": "?"}, mends=False),
    "a comma too many": Mistake("D107", "rows.csv:14", words="rows.csv",
        files={"rows.csv": "text,label\n" + "".join(f"x {n},{'ab'[n % 2]}\n" for n in range(12)) + "x,y,b\n"}),
    "a column twice": Mistake("D108", "rows.csv:1", words="rows.csv", files={"rows.csv": "text,text\nx,a\n"}, mends=False),
    "a number among objects": Mistake("D109", "rows.jsonl:13", GOOD + "5\n"),
    "columns of nobody": Mistake("D110", "found x, y", lines([{"x": "a", "y": "b"}]), "rows.jsonl --task classify", mends=False),
    "a column that is not there": Mistake("D112", "no column 'question'", words="rows.jsonl --map prompt=question"),
    "a role that is none": Mistake("D112", "unknown role 'promt'", words="rows.jsonl --map promt=prompt,completion=completion"),
    "damaged Parquet": Mistake("D113", "rows.parquet", words="rows.parquet", files={"rows.parquet": "PAR1xxxx"}, mends=False),
    "null": Mistake("D120", "(row 13)", lines([*ANSWERED, {"prompt": "x", "completion": None}])),
    "a number for a text": Mistake("D121", "(row 13)", lines([*ANSWERED, {"prompt": "x", "completion": 5}])),
    "an empty text": Mistake("D122", "(row 13)", lines([*ANSWERED, {"prompt": "x", "completion": " "}])),
    "text for messages": Mistake("D123", "rows.jsonl", lines([*CHATS, {"messages": "hello"}])),
    "one without an answer": Mistake("D124", "(row 13)", lines([*CHATS, chat(("user", "y"))])),
    "none with an answer": Mistake("D124", "0 tokens", lines([chat(("user", f"{n}")) for n in range(12)]), mends=False),
    "a role with a typo": Mistake("D125", "meant user?", lines([*CHATS, chat(("usr", "y"), ("assistant", "x"))])),
    "labels by case": Mistake("D126", "merge?", lines([*LABELLED, *({"text": f"t {n}", "label": "A "} for n in range(3))])),
    "a label once": Mistake("D127", "(row 13)", lines([*LABELLED, {"text": "t", "label": "c"}])),
    "one label": Mistake("D128", "nothing to tell apart", lines([{"text": f"t {n}", "label": "c"} for n in range(12)]), mends=False),
    "free text as labels": Mistake("D129", "free text", lines([{"text": f"t {n}", "label": f"long words {n}"} for n in range(60)]),
        "rows.jsonl --task classify"),
    "fractions as labels": Mistake("D129", "fractional", lines([{"text": f"t {n}", "label": n + 0.5} for n in range(12)]),
        "rows.jsonl --task classify"),
    "eval rows in train": Mistake("D131", "4 of 4", words="rows.jsonl --set data.eval_path=e.jsonl", files={"e.jsonl": lines(ANSWERED[:4])}),
    "unknown labels in eval": Mistake("D132", "'zz'", lines(LABELLED), "rows.jsonl --set data.eval_path=e.jsonl",
        {"e.jsonl": lines([{"text": "n", "label": "zz"}, {"text": "m", "label": "a"}])}, mends=False),
    "other columns in eval": Mistake("D110", "text, label", words="rows.jsonl --set data.eval_path=e.jsonl",
        files={"e.jsonl": lines(LABELLED)}, mends=False),
    "an answer that is no choice": Mistake("D160", "(row 13)",
        lines([{"prompt": f"p {n}", "choices": ["a", "b"], "answer": 5 if n == 12 else 1} for n in range(13)]), "rows.jsonl --task choice"),
    "tags that do not fit": Mistake("D161", "(row 13)",
        lines([{"tokens": ["a", f"b{n}"], "tags": ["O"] if n == 12 else ["O", "B-x"]} for n in range(13)]), "rows.jsonl --task tag"),
    "the same twice": Mistake("D163", "(row 13)",
        lines([{"prompt": f"p {n}", "chosen": "a", "rejected": "a" if n == 12 else "b"} for n in range(13)]), "rows.jsonl --task dpo"),
    "words without a prompt": Mistake("D166", "data.prompt", lines(LABELLED), "rows.jsonl --set data.label_words=a=no,b=yes"),
    "bundled data with a typo": Mistake("U130", "bundled:messages", words="bundled:mesages"),
    "a code that stays": Mistake("U134", "D120", words="rows.jsonl --set data.waive=D120"),
    "a base with a typo": Mistake("M102", "./bsae", words="rows.jsonl -m ./bsae",
        files={"base/config.json": "{}", "base/model.safetensors": ""}),
    "a file as base": Mistake("M101", "base/config.json", words="rows.jsonl -m base/config.json", files={"base/config.json": "{}"}, mends=False),
    "pickled weights": Mistake("M103", "unpickles nothing", words="rows.jsonl -m ./base",
        files={"base/config.json": "{}", "base/pytorch_model.bin": ""}, mends=False),
    "no weights": Mistake("M104", "./base", words="rows.jsonl -m ./base", files={"base/config.json": "{}"}, mends=False),
    "an adapter as base": Mistake("M105", "an adapter", words="rows.jsonl -m ./base",
        files={"base/adapter_config.json": '{"base_model_name_or_path": "bundled"}'}),
    "a folder without a model": Mistake("M106", "config.json", words="rows.jsonl -m ./base", files={"base/x.txt": "x"}, mends=False),
    "rows too long for the base": Mistake("U132", "--max-length 512", words="rows.jsonl --max-length 9999"),
    "a folder in use": Mistake("U107", "out", words="rows.jsonl -o out", files={"out/x.txt": "mine"}),
    "a file as folder": Mistake("E102", "out.txt is a file", words="rows.jsonl -o out.txt/run", files={"out.txt": "mine"}),
    "a run with other settings": Mistake("U103", "train.epochs: 9.0 there", words="rows.jsonl -o runs/x",
        files={"runs/x/run.json": '{"status": "done", "settings": {"train": {"epochs": 9.0}}}'}),
    "a damaged record": Mistake("U102", "runs/x/run.json", words="rows.jsonl -o runs/x",
        files={"runs/x/run.json": '{"status":'}, mends=False),
}  # fmt: skip

METHODS = {
    "lorra": ("T101", "Did you mean lora?"),
    "lora(rank=8": ("T114", "at character"),
    "lora(rnk=8)": ("T112", "lora has no 'rnk'"),
    "lora(lora_alpha=16)": ("T112", "is called alpha here"),
    "lora(rank=0)": ("T102", "rank 0"),
    "lora(dropout=1.5)": ("T102", "1.5"),
    "prefix(length=0)": ("T102", "length 0"),
    "houlsby": ("T101", "series"),
}


def found(words: Sequence[str]) -> list[Finding]:
    """The faults that `graftlm check` tells early."""
    flags = dict(verb.make_context("check", list(words)).params)
    flags.pop("as_json")
    return list(early_findings(attempted_from(flags.pop("config"), flags.pop("set"), flags))[1])


def lay(mistake: Mistake, folder: Path) -> None:
    """Its files, in `folder`."""
    for file, content in {"rows.jsonl": mistake.rows, **mistake.files}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(str(content), encoding="utf-8")
    if mistake.code == "D106":
        (folder / "rows.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))


def pasted(words: list[str], fix: str) -> list[str]:
    """`words` with the fix: flags take the place of what they contradict, a bare word that of the data file."""
    flags = re.search(r"(?:^|\s)(-{1,2}\w[\w-]* .*)$", fix)
    if flags is None:
        return [shlex.split(fix)[0], *words[1:]]
    new = shlex.split(flags[1])
    for flag, value in zip(new[::2], new[1::2], strict=True):
        for at in range(len(words) - 2, 0, -1):
            same = words[at + 1].partition("=")[0] == value.partition("=")[0] or flag != "--set"
            if words[at] == flag and same:
                del words[at : at + 2]
        words = [*words, flag, value]
    return words


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_told_and_its_fix_ends_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    mistake = MISTAKES[name]
    lay(mistake, Path())
    before = sorted(Path().rglob("*"))
    words = shlex.split(mistake.words)
    assert main(["train", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert 1 <= len(said.err.splitlines()) <= 12
    assert f"[{mistake.code}]" in said.err
    assert mistake.says in said.err
    assert "Traceback" not in said.err
    assert sorted(Path().rglob("*")) == before, "a check writes nothing"
    (fault,) = [each for each in found(words) if each.code == mistake.code]
    if mistake.mends:
        assert not found(pasted(words, fault.fix)), fault.fix
    else:
        assert not re.search(r"(^|\s)-{1,2}\w[\w-]* \S+=?\S*$", fault.fix) or found(pasted(words, fault.fix))


@pytest.mark.parametrize("text", METHODS)
def test_a_wrong_method_is_told_and_its_fix_ends_it(text: str) -> None:
    code, says = METHODS[text]
    with pytest.raises(GraftError) as told:
        read_method(text)
    (fault,) = told.value.findings
    assert fault.code == code
    assert says in str(fault)
    assert len(str(fault).splitlines()) <= 12
    wrong = re.search(r"\((\w+)=([\d.]+)\)", text)
    if code == "T112" and wrong:
        text = text.replace(wrong[1], fault.fix)
    elif code == "T102" and wrong:
        text = text.replace(f"{wrong[1]}={wrong[2]}", fault.fix)
    else:
        text = fault.fix
    read_method(text)
