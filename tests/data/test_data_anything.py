"""No row is lost: whatever the rows hold, each is used or listed with its reason, and the reader never falls over."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import BertTokenizerFast

from graftlm.data import prepare
from graftlm.errors import DataError, half_character

_TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "",
            " ",
            "\x00",
            "a\x00b",
            "\u2028",
            "\ufeff",
            "é" * 10,
            "👩‍👩‍👧",
            "\u202e",
            "x" * 100_000,
            "</s>",
            "\ud83d",
            "a \udc00 b",
        ]
    ),
)
_ANY = st.one_of(_TEXT, st.none(), st.integers(), st.booleans(), st.floats(), st.lists(_TEXT, max_size=3))
_SOUND: dict[str, dict[str, Any]] = {
    "choice": {"prompt": "Which?", "choices": ["one", "two"], "answer": 1},
    "classify": {"text": "a lamp", "label": "x"},
    "dpo": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "grpo": {"prompt": "Hi"},
    "kto": {"prompt": "Hi", "completion": "Yes", "desirable": True},
    "lm": {"text": "a whole text"},
    "mlm": {"text": "a whole text"},
    "ppo": {"prompt": "Hi"},
    "regress": {"text": "a lamp", "score": 1.5},
    "reward": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "seq2seq": {"prompt": "Hi", "completion": "Yes"},
    "sft": {"prompt": "Hi", "completion": "Yes"},
    "tag": {"tokens": ["a", "lamp"], "tags": ["O", "B-x"]},
    "tfew": {"prompt": "Which?", "choices": ["one", "two"], "answer": "two"},
}


_OF_ITSELF = ("choice", "classify", "dpo", "kto", "lm", "regress", "sft", "tag")  # tasks that rows alone tell
_IN_CELLS = ("classify", "dpo", "grpo", "kto", "lm", "mlm", "regress", "seq2seq", "sft")  # without lists
_ODD_LINE = {"jsonl": "{broken\n", "csv": 'too,"many",of,them\n', "tsv": "too\tmany\tof\tthem\n"}


def _written(format: str, rows: list[dict[str, Any]], folder: str, data: Any) -> Path:
    """The rows as a file, with one line that is none of them where the format has lines."""
    path = Path(folder) / f"rows.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if format in ("csv", "tsv"):
        out = io.StringIO(newline="")
        end = data.draw(st.sampled_from(["\n", "\r\n"]))
        carriage = any("\r" in cell for row in rows for cell in row.values())  # which Python's writer leaves bare
        quoting = csv.QUOTE_ALL if carriage else csv.QUOTE_MINIMAL
        delimiter = "," if format == "csv" else "\t"
        writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    elif format == "json":
        text = json.dumps(rows, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 1])))
        if half_character(text) is not None:  # an array in bytes that are no UTF-8 is refused as a whole
            text = json.dumps(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes((text + _ODD_LINE.get(format, "")).encode("utf-8", "surrogatepass"))
    return path


def _nothing_is_lost(path: Path, number: int, tokenizer: Any, task: str, stops: set[str]) -> Any:
    """Prepared rows, each used or listed; None where the file as a whole was judged, by one of the codes `stops`."""
    written = task not in ("classify", "lm", "mlm", "regress", "seq2seq", "tag")
    stopped: set[str] = set()
    try:
        found = prepare(
            path, tokenizer=tokenizer, task=task, eval_share=0, drop_bad_rows=True, max_length=64,
            waived=("D126", "D127", "D129"), template="plain" if written else None,
        )  # fmt: skip
    except DataError as error:
        stopped = {finding.code for finding in error.findings}
    if stopped:
        assert stopped <= stops
        return None
    used = {item["row"] for item in found.train}
    listed = {rejected.place for rejected in found.rejected}
    assert len(used) + len(listed) == number
    assert all(rejected.reason for rejected in found.rejected)
    return found


def _cell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("format", ["jsonl", "json"])
@pytest.mark.parametrize("task", _SOUND)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is only read
@given(data=st.data())
def test_rows_in_are_rows_used_and_rows_listed(format: str, task: str, tokenizer: Any, data: Any) -> None:
    sound = _SOUND[task]
    odd = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(sound, _ANY)), min_size=1, max_size=4))
    rows = [sound, {**sound}, *odd, sound, sound]
    with tempfile.TemporaryDirectory() as folder:
        path = _written(format, rows, folder, data)
        _nothing_is_lost(path, len(rows) + (format in _ODD_LINE), tokenizer, task, {"D110", "D111", "D128"})


@pytest.mark.parametrize("format", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("task", _IN_CELLS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_row_of_a_table_is_lost(format: str, task: str, tokenizer: Any, data: Any) -> None:
    sound = {name: _cell(value) for name, value in _SOUND[task].items()}
    text = _TEXT if format != "parquet" else st.none() | _TEXT.filter(lambda text: half_character(text) is None)
    odd = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(sound, text)), min_size=1, max_size=4))
    rows = [sound, {**sound}, *odd, sound, sound]
    with tempfile.TemporaryDirectory() as folder:
        path = _written(format, rows, folder, data)
        _nothing_is_lost(path, len(rows) + (format in _ODD_LINE), tokenizer, task, {"D128"})


@pytest.mark.parametrize("task", _OF_ITSELF)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_rows_among_sound_ones_do_not_change_what_is_learnt(task: str, tokenizer: Any, data: Any) -> None:
    sound = _SOUND[task]
    odd = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(sound, _ANY)), min_size=1, max_size=3))
    rows = [sound] * 2 + odd + [sound] * 2
    with tempfile.TemporaryDirectory() as folder:
        path = _written("jsonl", rows, folder, data)
        found = _nothing_is_lost(path, len(rows) + 1, tokenizer, "auto", {"D128"})
    assert found is None or found.task == task


@pytest.mark.parametrize("name", ["text.txt", "text.md"])
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), _TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_text_is_one_row_or_refused(name: str, tokenizer: Any, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        _nothing_is_lost(path, 1, tokenizer, "lm", {"D103", "D104", "D106", "D142"})


@pytest.mark.parametrize("task", ["classify", "lm", "mlm", "regress", "tag"])
@pytest.mark.parametrize("text", ["\u200b", "\x00", "a"])
def test_rows_that_become_no_token_are_told(task: str, text: str, write: Any) -> None:
    """As encoders' tokenizers do with characters that cannot be seen, and any without an end for a single token."""
    marks = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    words = [*marks.values(), "a", "lamp", "whole", "text"]
    whole = BertTokenizerFast(vocab={word: id for id, word in enumerate(words)}, **marks)
    if task == "lm":  # no marks around a text, and no end
        whole.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    sound = _SOUND[task]
    odd = {name: [text] * 2 if name == "tokens" else text if name == "text" else value for name, value in sound.items()}
    path = write("rows.jsonl", [sound, sound, odd, sound])
    if _nothing_is_lost(path, 4, whole, task, {"D128"}) and (task == "lm" or (task == "mlm" and text != "a")):
        with pytest.raises(DataError) as refused:
            prepare(path, tokenizer=whole, task=task, eval_share=0)
        (finding,) = refused.value.findings
        assert (finding.code, finding.message) == ("D142", "1 row with no token to learn (row 3)")
