"""Rows read while training: the same items as when read before, in a known order, with no row lost and none held."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.test_data_anything import _ANY, _SOUND
from graftlm.data import prepare
from graftlm.data.fetching import hub_rows
from graftlm.data.reading import Rejected, Table, read_rows, tables_of
from graftlm.data.streaming import Source, Stream, prepare_streamed
from graftlm.data.wording import number
from graftlm.errors import DataError


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {at}" + " more" * (at % 5), "completion": f"Answer {at}"} for at in range(count)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one_pass(stream: Stream) -> list[dict[str, Any]]:
    found = []
    for item in stream:
        if item["pass"]:
            break
        found.append(item)
    return found


def streamed(path: Path, tokenizer: Any, **options: Any) -> Any:
    return prepare_streamed(Source(str(path)), tokenizer=tokenizer, max_length=64, template="plain", **options)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_the_items_are_those_of_a_file_that_is_read_before(ending: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = rows_of(700)
    path, held = tmp_path / f"rows.{ending}", jsonl(tmp_path / "held.jsonl", rows_of(720)[700:])
    table = datasets.Dataset.from_list(rows)
    if ending == "jsonl":
        jsonl(path, rows)
    elif ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    plain = prepare(path, held, tokenizer=tokenizer, max_length=64, template="plain")
    stream = streamed(path, tokenizer, eval_path=held, buffer=1).stream
    names = ("input_ids", "labels", "row")
    assert [{n: i[n] for n in names} for i in one_pass(stream)] == [{n: i[n] for n in names} for i in plain.train]
    assert [i["example"].place for i in one_pass(stream)] == [i["example"].place for i in plain.train]
    whole = [one for each in tables_of(path) for one in each.rows]
    assert whole == read_rows(path).rows


def test_each_pass_has_every_row_once_in_an_order_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", rows_of(60))
    prepared = streamed(path, tokenizer, buffer=16, seed=3)
    held = {item["row"] for item in prepared.eval}
    both = [item["row"] for item in islice(prepared.stream, 2 * (60 - len(held)))]
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert len(held) == 12
    assert sorted(first) == sorted(second) == sorted(set(range(1, 61)) - held)
    assert first != second != sorted(second)
    again = streamed(path, tokenizer, buffer=16, seed=3).stream
    assert [item["row"] for item in islice(again, len(both))] == both
    other = streamed(path, tokenizer, buffer=16, seed=4).stream
    assert [item["row"] for item in islice(other, len(first))] != first
    # The buffer bounds how early a row can come.
    assert max(row - at for at, row in enumerate(first)) < 16 + 12 + 1


def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path: Path, tokenizer: Any) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for at in range(count):
                file.write(json.dumps({"text": f"{at} " + "x" * 1000}) + "\n")
        source = Source(str(path))
        tracemalloc.start()
        read = sum(len(table) for table in source.tables())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == count
        return most

    small, large = peak(1000), peak(16_000)
    assert large < 1.2 * small
    assert large < 4_000_000  # of 16 MB


def test_a_pass_holds_no_more_of_many_rows_than_of_few(tmp_path: Path, tokenizer: Any) -> None:
    def most_held(count: int) -> int:
        rows = [{"text": f"{at} " + "word " * 100} for at in range(count)]
        stream = streamed(jsonl(tmp_path / f"{count}.jsonl", rows), tokenizer, task="lm", buffer=50).stream
        del rows
        most = 0
        tracemalloc.start()
        for at, item in enumerate(stream):
            if item["pass"]:
                break
            if at % 100 == 0:
                most = max(most, tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert stream.counts.used > count - 300
        return most

    assert most_held(4000) < 1.3 * most_held(1300)


@pytest.mark.parametrize("task", sorted(_SOUND.keys() - {"grpo", "ppo"}))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_rows_read_are_rows_used_held_out_and_listed(task: str, tokenizer: Any, data: Any) -> None:
    sound = _SOUND[task]
    text = next(name for name, value in sound.items() if isinstance(value, (str, list)))
    other = {"label": "y", "score": 2.5}
    good = []
    for at in range(12):
        value = sound[text]
        row = {**sound, text: [*value, str(at)] if isinstance(value, list) else f"{value} {at}"}
        if isinstance(value, list):
            row["tags"] = [*sound["tags"], "O"]
        good.append({**row, **({n: other[n] for n in other if n in row} if at % 2 else {})})
    odd = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(sound, _ANY)), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = jsonl(Path(folder) / "rows.jsonl", [*good[:6], *odd, *good[6:]])
        with path.open("ab") as file:
            file.write(b'{broken\n"\xff\xfe"\n[1]\n')
        listed: list[Rejected] = []
        try:
            prepared = prepare_streamed(
                Source(str(path)), tokenizer=tokenizer, task=task, drop_bad_rows=True, max_length=64, buffer=4,
                template="plain" if task not in ("classify", "lm", "regress", "tag") else None,
            )  # fmt: skip
        except DataError as error:
            stopped = {finding.code for finding in error.findings}
        else:
            stopped = set()
        assert stopped <= {"D110", "D111", "D121", "D126", "D128"}
        if stopped:
            return
        stream = prepared.stream
        assert stream is not None
        stream.tell = listed.append
        drawn = {item["row"] for item in one_pass(stream)}
        counts = stream.counts
        assert counts.read == len(good) + len(odd) + 3
        assert counts.read == counts.used + counts.held_out + counts.left_out
        assert counts.waiting == 0
        assert counts.used == len(drawn) > 0
        assert counts.left_out == len(listed) == sum(counts.reasons.values()) >= 3
        assert all(one.place and one.reason for one in listed)


def test_what_cannot_be_used_is_listed_once_with_its_place(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(1300)]
    rows[1200] = {"text": None, "label": "a"}
    path = jsonl(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + "{oops\n")
    prepared = streamed(path, tokenizer)
    told: list[Rejected] = []
    prepared.stream.tell = told.append
    for _ in islice(prepared.stream, 4000):  # three passes
        pass
    assert {(one.place.split(":")[1], one.reason[-6:]) for one in told} == {("1201", "[D120]"), ("1301", "[D105]")}
    assert len(told) == 2
    line = prepared.stream.counts.line
    assert f"{number(1094)} used, 205 held out, 2 left out (1 null 'text' [D120], 1 " in line
    assert line.endswith("; 4 passes")


def test_faults_of_the_first_rows_are_told_at_once(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*rows_of(20), {"prompt": "Hi", "completion": ""}])
    with pytest.raises(DataError, match="D122"):
        streamed(path, tokenizer)
    prepared = streamed(path, tokenizer, drop_bad_rows=True)
    assert len(one_pass(prepared.stream)) == 16
    assert prepared.stream.counts.left_out == 1
    assert prepared.rejected == ()  # the stream tells


def test_labels_and_scale_are_those_of_all_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"text {at}", "label": "late" if at > 1100 else "ab"[at % 2]} for at in range(1200)]
    found = streamed(jsonl(tmp_path / "labels.jsonl", rows), tokenizer)
    assert found.labels.names == ("a", "b", "late")
    scored = [{"text": f"text {at}", "score": float(at)} for at in range(1200)]
    path = jsonl(tmp_path / "scores.jsonl", scored)
    held = jsonl(tmp_path / "held.jsonl", [{"text": "other", "score": 3.0}])
    whole = prepare(path, held, tokenizer=tokenizer).scale
    found = streamed(path, tokenizer, eval_path=held).scale
    assert whole is not None
    assert (found.mean, found.deviation) == pytest.approx((whole.mean, whole.deviation))
    for names, code in ((["a"] * 30, "D128"), (["a", "A"] * 15, "D126")):
        rows = [{"text": f"text {at}", "label": name} for at, name in enumerate(names)]
        with pytest.raises(DataError, match=code):
            streamed(jsonl(tmp_path / f"{code}.jsonl", rows), tokenizer)


def test_texts_come_in_parts_that_end_with_a_line(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(f"Line {at} of a text that is long.\n" for at in range(5000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    tables = list(tables_of(path))
    parts = [row["text"] for table in tables for row in table.rows]
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts)
    assert tables[0].places[1] == f"book.txt:{parts[0].count(chr(10)) + 1}"
    prepared = streamed(path, tokenizer)
    assert prepared.task == "lm"
    assert prepared.eval
    held = {item["example"].key for item in prepared.eval}
    assert not held & {item["example"].key for item in one_pass(prepared.stream)}


def test_a_folder_is_read_file_by_file(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    jsonl(folder / "b.jsonl", rows_of(30)[:20])
    jsonl(folder / "deep" / "c.jsonl", rows_of(30)[20:])
    whole, parts = read_rows(folder), list(Source(str(folder)).tables())
    assert [row for table in parts for row in table.rows] == whole.rows
    assert [place for table in parts for place in table.places] == whole.places
    assert Source(str(folder)).digest() == whole.sha256
    assert sum(len(table) for table in Source(str(folder), max_rows=25).tables()) == 25


def test_a_json_array_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows_of(20)))
    with pytest.raises(DataError, match="D117"):
        streamed(path, tokenizer)
    lines = jsonl(tmp_path / "lines.json", rows_of(20))  # JSONL by another name
    assert len(one_pass(streamed(lines, tokenizer).stream)) == 16


def test_a_file_without_one_sound_row_ends(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", rows_of(20))
    prepared = streamed(path, tokenizer)
    path.write_text("{broken\n")
    with pytest.raises(DataError, match="D104"):
        next(iter(prepared.stream))


def test_sets_of_a_hub_are_streamed(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Iterator[dict[str, str]]:
        asked.update(options, name=name)
        return iter(datasets.Dataset.from_list(rows_of(600)).to_iterable_dataset())

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("graftlm.data.fetching.hub_commit", lambda name: "abc")
    prepared = prepare_streamed(
        Source("hub:owner/name@v1"), tokenizer=tokenizer, max_length=64, template="plain", buffer=8
    )
    assert asked == {"name": "owner/name", "revision": "v1", "split": "train", "streaming": True}
    assert len(one_pass(prepared.stream)) == 480
    assert prepared.sha256 == {"hub:owner/name@v1": "abc"}
    tables: list[Table] = list(hub_rows("hub:owner/name", max_rows=300))
    assert [len(table) for table in tables] == [256, 44]
    assert tables[1].places[0] == "owner/name row 257"

    def fail(name: str, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no such set")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"no such set.*D116|D116"):
        list(hub_rows("hub:owner/name"))
