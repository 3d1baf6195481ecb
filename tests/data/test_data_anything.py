"""No row is lost: whatever the rows hold, each is used or listed with its reason, and the reader never falls over."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.data import prepare
from graftlm.errors import DataError

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
_ANY = st.one_of(
    _TEXT, st.none(), st.integers(), st.booleans(), st.floats(allow_nan=False), st.lists(_TEXT, max_size=3)
)
_SOUND: dict[str, dict[str, Any]] = {
    "choice": {"prompt": "Which?", "choices": ["one", "two"], "answer": 1},
    "classify": {"text": "a lamp", "label": "x"},
    "dpo": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "grpo": {"prompt": "Hi"},
    "kto": {"prompt": "Hi", "completion": "Yes", "desirable": True},
    "lm": {"text": "a whole text"},
    "ppo": {"prompt": "Hi"},
    "regress": {"text": "a lamp", "score": 1.5},
    "reward": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "sft": {"prompt": "Hi", "completion": "Yes"},
    "tag": {"tokens": ["a", "lamp"], "tags": ["O", "B-x"]},
    "tfew": {"prompt": "Which?", "choices": ["one", "two"], "answer": "two"},
}


@pytest.mark.parametrize("task", _SOUND)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is only read
@given(data=st.data())
def test_rows_in_are_rows_used_and_rows_listed(task: str, tokenizer: Any, data: Any) -> None:
    sound = _SOUND[task]
    odd = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(sound, _ANY)), min_size=1, max_size=4))
    rows = [sound, {**sound, next(iter(sound)): sound[next(iter(sound))]}, *odd, sound, sound]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
        try:
            found = prepare(
                path, tokenizer=tokenizer, task=task, eval_share=0, drop_bad_rows=True, max_length=64,
                waived=("D126", "D127", "D129"), template="plain" if task not in ("classify", "lm") else None,
            )  # fmt: skip
        except DataError as error:
            stopped = {finding.code for finding in error.findings}
        else:
            stopped = set()
    if stopped:  # a judgement on the file as a whole, not on rows
        assert stopped <= {"D110", "D111", "D128"}
        return
    used = {item["row"] for item in found.train}
    listed = {rejected.place for rejected in found.rejected}
    assert len(used) + len(listed) == len(rows) + 1
    assert all(rejected.reason for rejected in found.rejected)
