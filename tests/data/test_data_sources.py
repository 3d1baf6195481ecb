"""Rows from folders, and rows that are parted by a column: whatever they hold, each is used or listed."""

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
from graftlm.training.early import data_of

_VALUE = st.one_of(st.none(), st.text(max_size=6), st.integers(0, 3), st.just([]), st.sampled_from(["\x00", "\u2028"]))
_ROW = st.fixed_dictionaries({"prompt": _VALUE, "completion": _VALUE, "author": _VALUE})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(st.lists(_ROW, max_size=4), min_size=1, max_size=3), broken=st.integers(0, 2))
def test_rows_of_a_folder_are_used_or_listed(tokenizer: Any, files: Any, broken: int) -> None:
    sound = [{"prompt": f"Hi {at}", "completion": "Yes", "author": f"a{at % 3}"} for at in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        for at, rows in enumerate(files):
            lines = [json.dumps(row) for row in [*rows, *sound]] + ["{broken"] * broken
            (Path(folder) / f"{at}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        found = prepare(
            folder, tokenizer=tokenizer, task="sft", eval_share=0.3, drop_bad_rows=True, max_length=64,
            template="plain", group="author",
        )  # fmt: skip
    rows_in = sum(len(rows) + len(sound) + broken for rows in files)
    assert len(found.train) + len(found.eval) + len(found.rejected) == rows_in
    authors = [{str(item["example"].raw["author"]) for item in part} for part in (found.train, found.eval)]
    assert not authors[0] & authors[1]
    assert all(authors)


def test_a_group_that_is_not_there(write: Any, tokenizer: Any) -> None:
    rows = [{"text": f"row {at}", "label": "xy"[at % 2], "author": f"a{at}"} for at in range(12)]
    path = write("rows.jsonl", rows)
    with pytest.raises(DataError, match="D110") as caught:
        prepare(path, tokenizer=tokenizer, group="auther")
    assert caught.value.findings[0].fix == "--set data.group=author"
    path = write("rows.jsonl", [*rows, {"text": "last", "label": "x"}])
    with pytest.raises(DataError, match=r"D120.*rows? 13|rows? 13.*D120"):
        prepare(path, tokenizer=tokenizer, group="author")


def _texts(name: str, rows: int) -> list[dict[str, str]]:
    return [{"text": f"{name} {at}", "label": "xy"[at % 2]} for at in range(rows)]


def test_weights_say_how_often_the_training_rows_of_a_source_are_used(write: Any, tokenizer: Any) -> None:
    sources = {write("a.jsonl", _texts("a", 20)): 2.5, write("b.csv", "text,label\n" + "".join(
        f"b {at},{'xy'[at % 2]}\n" for at in range(20))): 0.5}  # fmt: skip
    found = prepare(sources, tokenizer=tokenizer, eval_share=0.2, seed=3)
    used: dict[str, int] = {}
    for item in found.train:
        used[item["example"].texts[0]] = used.get(item["example"].texts[0], 0) + 1
    held = {item["example"].texts[0] for item in found.eval}
    assert not held & set(used)
    rows_a, rows_b = (20 - sum(text.startswith(name) for text in held) for name in "ab")
    assert {used[text] for text in used if text.startswith("a")} == {2, 3}
    assert sum(n for text, n in used.items() if text.startswith("a")) == round(2.5 * rows_a)
    assert sum(n for text, n in used.items() if text.startswith("b")) == round(0.5 * rows_b)
    # Every row is used, held out or listed.
    assert len(used) + len(held) + len(found.rejected) == 40
    assert all("D115" in fault.reason for fault in found.rejected)
    assert sum(finding.code == "D115" for finding in found.notes) == 2
    again = prepare(sources, tokenizer=tokenizer, eval_share=0.2, seed=3)
    assert [i["example"].place for i in again.train] == [i["example"].place for i in found.train]
    other = prepare(sources, tokenizer=tokenizer, eval_share=0.2, seed=4)
    assert [i["example"].place for i in other.train] != [i["example"].place for i in found.train]


def test_sources_may_have_other_columns_and_not_every_label(write: Any, tokenizer: Any) -> None:
    one = write("a.jsonl", [{"text": f"a {at}", "label": "x"} for at in range(6)])
    two = write("b.jsonl", [{"sentence": f"b {at}", "sentiment": "y"} for at in range(6)])
    found = prepare({one: 1, two: 1}, tokenizer=tokenizer, eval_share=0)
    assert found.labels is not None
    assert found.labels.names == ("x", "y")
    assert [item["row"] for item in found.train] == list(range(1, 13))
    with pytest.raises(DataError, match="D128"):
        prepare(
            {one: 1, write("c.jsonl", [{"text": f"c {at}", "label": "x"} for at in range(6)]): 1}, tokenizer=tokenizer
        )
    several = write("d.jsonl", [{"text": f"d {at}", "label": ["x", "y"][: at % 3]} for at in range(6)])
    with pytest.raises(DataError, match="lists of labels"):
        prepare({one: 1, several: 1}, tokenizer=tokenizer)
    with pytest.raises(DataError, match="D110"):
        prepare({one: 1, write("e.jsonl", [{"prompt": "a", "completion": "b"}]): 1}, tokenizer=tokenizer)


def test_a_set_of_a_hub_is_the_folder_that_was_fetched(monkeypatch: Any, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert data_of("hub:owner/name@v1") == tmp_path
    assert (asked["name"], asked["revision"], asked["repo_type"]) == ("owner/name", "v1", "dataset")
    assert "*.parquet" in asked["allow_patterns"]
    assert "*.md" not in asked["allow_patterns"]

    def refuse(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"no network for {name}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match="cannot fetch owner/name: no network for owner/name"):
        data_of("hub:owner/name")
    with pytest.raises(DataError, match="D116"):
        data_of("hub:name")


def test_what_whole_groups_make_of_the_split_is_told(write: Any, tokenizer: Any) -> None:
    rows = [{"text": f"text {at}", "label": "ab"[at % 2], "author": at // 10} for at in range(40)]
    rows += [{"text": f"other {at}", "label": "c", "author": 4 + at % 2} for at in range(60)]
    path = write("rows.jsonl", rows)
    found = prepare(path, tokenizer=tokenizer, group="author", eval_share=0.05)
    (note,) = [note for note in found.notes if note.code == "D137"]
    assert note.message == (
        "groups of 'author' stay whole, so that 10 rows (10 %) where 5 % was wanted and no row of 'c' are held out"
    )
    assert {item["example"].label for item in found.eval} == {"a", "b"}
    even = prepare(path, tokenizer=tokenizer, group="text", eval_share=0.2)
    assert "D137" not in {note.code for note in even.notes}
