"""Files of every format are read, and every way in which they break is told with its place."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftlm.data.codes import CODES
from graftlm.data.reading import FORMATS, read_rows, tables_of
from graftlm.errors import DataError

ROWS = [{"question": f"q{i}", "answer": f"a{i}\nline"} for i in range(3)]


def fault(path, **options):
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    assert all(finding.code in CODES for finding in caught.value.findings)
    assert len(str(caught.value).splitlines()) <= 12
    return caught.value


def test_one_table_from_every_format(write, tmp_path):
    files = [
        write("a.jsonl", ROWS),
        write("a.json", json.dumps(ROWS, indent=2)),
        write("lines.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        write("a.csv", 'question,answer\nq0,"a0\nline"\nq1,"a1\nline"\nq2,"a2\nline"\n'),
        write("excel.csv", '\ufeffquestion;answer\r\nq0;"a0\nline"\r\nq1;"a1\nline"\r\nq2;"a2\nline"\r\n'),
        write("a.tsv", 'question\tanswer\nq0\t"a0\nline"\nq1\t"a1\nline"\nq2\t"a2\nline"\n'),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in [*files, tmp_path / "a.parquet"]:
        table = read_rows(path)
        assert table.rows == ROWS, path
        assert table.columns == ("question", "answer")
        assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_rows(files[0]).places == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert read_rows(files[1]).places == ["a.json:2", "a.json:6", "a.json:10"]
    assert read_rows(files[3]).places == ["a.csv:2", "a.csv:4", "a.csv:6"]


def test_a_text_file_is_one_document(write):
    table = read_rows(write("novel.txt", "One.\n\nTwo.\n"))
    assert table.rows == [{"text": "One.\n\nTwo.\n"}]


def test_line_separators_inside_json_strings_are_text(write):
    table = read_rows(write("a.jsonl", [{"text": "a\u2028b\x85c"}]))
    assert table.rows == [{"text": "a\u2028b\x85c"}]


def test_max_rows_says_that_there_was_more(write):
    path = write("a.jsonl", ROWS)
    assert (len(read_rows(path, max_rows=2)), read_rows(path, max_rows=2).capped) == (2, True)
    assert not read_rows(path, max_rows=3).capped
    assert read_rows(write("a.json", json.dumps(ROWS)), max_rows=2).capped
    assert read_rows(write("a.csv", "a,b\n1,2\n3,4\n"), max_rows=1).capped


def test_missing_file_names_the_nearest_and_its_rows(write, tmp_path):
    write("faq.jsonl", ROWS)
    error = fault(tmp_path / "faq.jsnl")
    assert error.findings[0].code == "D101"
    assert "Did you mean" in str(error)
    assert "faq.jsonl (3 rows)?" in str(error)
    assert error.findings[0].fix == str(tmp_path / "faq.jsonl")


def test_missing_file_without_a_near_name_lists_the_folder(write, tmp_path):
    write("faq.jsonl", ROWS)
    assert "in that folder: faq.jsonl" in str(fault(tmp_path / "zebra.csv"))
    assert "there is no folder" in str(fault(tmp_path / "nowhere" / "faq.jsonl"))


def test_a_folder_is_the_rows_of_its_files(write, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write("a.jsonl", ROWS)
    write("b/c.csv", "text,label\none,x\n")
    write("_notes.jsonl", "{broken")
    write(".hidden/d.jsonl", "{broken")
    write("picture.png", b"\x89PNG")
    table = read_rows(tmp_path)
    assert [*table.places] == [*read_rows(tmp_path / "a.jsonl").places, "b/c.csv:2"]
    assert table.rows[-1] == {"text": "one", "label": "x"}
    assert (table.format, table.capped) == ("several", False)
    assert set(table.columns) == {*read_rows(tmp_path / "a.jsonl").columns, "text", "label"}
    assert len(read_rows(tmp_path, "csv")) == 1
    capped = read_rows(tmp_path, max_rows=1)
    assert (len(capped), capped.capped) == (1, True)
    write("b/c.csv", "text,label\ntwo,x\n")
    assert read_rows(tmp_path).sha256 != table.sha256


def test_every_broken_file_of_a_folder_is_told(write, tmp_path):
    write("a.jsonl", "{broken\n")
    write("b.jsonl", '{"text": 1}\n[]\n')
    assert [(f.code, f.place.partition(":")[0]) for f in fault(tmp_path).findings] == [
        ("D105", "a.jsonl"), ("D109", "b.jsonl"),
    ]  # fmt: skip
    write("a.jsonl", '{"text": 2}\n')
    table = read_rows(tmp_path, drop_bad_rows=True)
    assert (len(table), [r.place for r in table.rejected]) == (2, ["b.jsonl:2"])


def test_folders_that_cannot_be_one_table(write, tmp_path):
    assert fault(tmp_path).findings[0].code == "D102"
    write("train-0.jsonl", ROWS)
    write("train-1.jsonl", ROWS)
    assert len(read_rows(tmp_path)) == 2 * len(ROWS)
    write("testing-notes.jsonl", ROWS)  # no part of a split
    assert len(read_rows(tmp_path)) == 3 * len(ROWS)
    write("test.jsonl", ROWS)
    found = fault(tmp_path).findings[0]
    assert found.code == "D114"
    assert found.fix == f"{tmp_path / 'train-0.jsonl'} --set data.eval_path={tmp_path / 'test.jsonl'}"
    write("readme.md", "about")
    assert "plain texts" in str(fault(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.csv", "  \n"), ("a.csv", "text,label\n"), ("a.json", "[]"), ("a.txt", "\n")],
)
def test_nothing_in_it(write, name, content):
    assert fault(write(name, content)).findings[0].code == "D104"


def test_unknown_ending_and_unknown_format(write):
    error = fault(write("a.dat", ROWS))
    assert (error.findings[0].code, error.findings[0].fix) == ("D103", "--set data.format=jsonl")
    assert read_rows(write("a.dat", ROWS), format="jsonl").rows == ROWS
    assert fault(write("a.dat", ROWS), format="jsonll").findings[0].fix == "--set data.format=jsonl"


@pytest.mark.parametrize(("head", "said"), [(b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "Excel"), (b"PAR1", "Parquet")])
def test_another_kind_of_file_under_a_wrong_name(write, head, said):
    error = fault(write("a.csv", head + b"rest"))
    assert error.findings[0].code == "D103"
    assert said in str(error)


def test_a_damaged_parquet_file(write):
    assert fault(write("a.parquet", b"PAR1 and nothing more")).findings[0].code == "D113"


def test_broken_json_has_a_place_a_caret_and_a_count(write):
    lines = [json.dumps(row) for row in ROWS]
    lines[1] = '{"question": "q1", "answer": "never closed}'
    error = fault(write("faq.jsonl", "\n".join(lines)))
    (finding,) = error.findings
    assert str(error).startswith("faq.jsonl:2:30 unterminated string (1 of 3 lines) [D105]")
    line, caret = finding.detail
    assert line == lines[1]
    assert line[caret.index("^")] == '"'
    assert caret.index("^") == 29


def test_a_long_broken_line_is_clipped_around_the_caret(write):
    line = '{"text": "' + "x" * 500 + '" "label": 1}'
    (finding,) = fault(write("a.jsonl", line)).findings
    shown, caret = finding.detail
    assert len(shown) < 80
    assert shown[caret.index("^") :].startswith('"label"')


def test_every_broken_line_is_told_at_once(write):
    content = "\n".join(['{"a": 1}', "{", '{"a": 2}', "[1, 2]", "null", '{"a" 1}'])
    error = fault(write("a.jsonl", content))
    assert [finding.place for finding in error.findings] == ["a.jsonl:2:2", "a.jsonl:4", "a.jsonl:5", "a.jsonl:6:6"]
    assert [finding.code for finding in error.findings] == ["D105", "D109", "D109", "D105"]
    assert all("4 of 6 lines" in finding.message for finding in error.findings)
    error = fault(write("many.jsonl", "{\n" * 40))
    assert len(error.findings) == 40
    assert re.search(r"and \d+ more", str(error))


def test_broken_lines_are_left_out_when_asked(write):
    table = read_rows(write("a.jsonl", '{"a": 1}\n{\n{"a": 2}\n'), drop_bad_rows=True)
    assert table.places == ["a.jsonl:1", "a.jsonl:3"]
    assert [(r.place, r.raw) for r in table.rejected] == [("a.jsonl:2:2", "{")]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"a": 1},\n {"a" 2}]', "a.json:2:7"),
        ('[{"a": 1}\n {"a": 2}]', "a.json:2:2"),
        ('[{"a": 1}', "a.json:1:10"),
        ('[{"a": 1}] x', "a.json:1:12"),
    ],
)
def test_a_broken_array(write, content, place):
    error = fault(write("a.json", content))
    assert (error.findings[0].code, error.findings[0].place) == ("D105", place)


def test_an_object_is_no_array(write):
    error = fault(write("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1)))
    assert error.findings[0].code == "D109"
    assert "'data'" in str(error)


def test_not_utf8_tells_the_byte(write):
    error = fault(write("a.csv", "text,label\nok,1\ncafé,2\n".encode("latin-1")))
    assert error.findings[0].code == "D106"
    assert str(error).startswith("a.csv:3 not UTF-8: byte 0xe9 at offset 19")
    assert error.findings[0].fix.startswith("iconv -f WINDOWS-1252 -t UTF-8")
    assert "UTF-16" in str(fault(write("b.csv", "text,label\n".encode("utf-16"))))


def test_ragged_rows_are_all_listed(write):
    error = fault(write("a.csv", "text,label\na,b,1\nc,2\nd\n"))
    assert [(f.code, f.place) for f in error.findings] == [("D107", "a.csv:2"), ("D107", "a.csv:4")]
    assert "found 3 fields, wanted 2 (text, label)" in str(error)
    assert len(read_rows(write("a.csv", "text,label\na,b,1\nc,2\n"), drop_bad_rows=True)) == 1


def test_a_quote_that_is_never_closed(write):
    error = fault(write("a.csv", 'text,label\nfine,1\n"open,2\nmore,3\n'))
    assert (error.findings[0].code, error.findings[0].place) == ("D105", "a.csv:3")


def test_headers_without_a_name_or_with_one_twice(write):
    error = fault(write("a.csv", ",text,text\n0,a,b\n"))
    assert [f.code for f in error.findings] == ["D108", "D108"]
    assert "index=False" in str(error)
    assert "'text'" in str(error)


def test_a_row_with_a_key_more_does_not_lose_it(write):
    assert read_rows(write("a.jsonl", [{"a": 1}, {"b": 2}])).columns == ("a", "b")


def test_every_format_has_an_ending():
    assert set(FORMATS.values()) == {"csv", "json", "jsonl", "parquet", "text", "tsv"}


def test_torch_is_not_imported_before_batches_are_made():
    modules = "reading, recognise, checking, splitting, labels, templates, tokenising, prepare"
    code = f"import sys; from graftlm.data import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_end_of_line_ends_a_line(write):
    rows = [{"text": "a"}, {"text": "b"}]
    for end in ("\n", "\r\n", "\r"):
        lines = write("a.jsonl", end.join(json.dumps(row) for row in rows) + end)
        cells = write("a.csv", end.join(["text;more", "a;1,2", "b;3"]) + end)
        for whole in ([read_rows(lines)], tables_of(lines)):
            assert [(row, place) for table in whole for row, place in zip(table.rows, table.places, strict=True)] == [
                (rows[0], "a.jsonl:1"),
                (rows[1], "a.jsonl:2"),
            ]
        for whole in ([read_rows(cells)], tables_of(cells)):
            assert [row["more"] for table in whole for row in table.rows] == ["1,2", "3"]


def test_one_name_twice_in_an_object_loses_no_value(write):
    twice = '{"text": "a", "label": 1, "label": 2}'
    inside = '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'
    path = write("a.jsonl", f'{twice}\n{{"text": "b", "label": 1}}\n{inside}\n')
    found = fault(path).findings
    assert [(f.code, f.place) for f in found] == [("D108", "a.jsonl:1"), ("D108", "a.jsonl:3")]
    assert found[0].message == "one name twice in an object: 'label' (2 of 3 lines)"
    table = read_rows(path, drop_bad_rows=True)
    assert (table.rows, [r.raw for r in table.rejected]) == ([{"text": "b", "label": 1}], [twice, inside])
    array = write("a.json", f'[{twice},\n {{"text": "b"}}]')
    assert [(f.code, f.place) for f in fault(array).findings] == [("D108", "a.json:1")]
    table = read_rows(array, drop_bad_rows=True)
    assert (table.rows, [r.raw for r in table.rejected]) == ([{"text": "b"}], [twice])


def test_rows_of_an_array_on_one_line_have_places_of_their_own(write):
    assert read_rows(write("a.json", '[{"a": 1}, {"a": 2}]\n')).places == ["a.json:1:2", "a.json:1:12"]
    assert read_rows(write("a.json", '[\n{"a": 1}, {"a": 2},\n{"a": 3}]')).places == [
        "a.json:2",
        "a.json:2:11",
        "a.json:3",
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_under_a_name_are_not_a_row(write, name):
    spread = fault(write("spread.json", json.dumps({"version": 1, "data": ROWS}, indent=1))).findings[0]
    finding = fault(write(name, json.dumps({"version": 1, "data": ROWS}))).findings[0]
    assert spread.message == finding.message
    assert finding.code == "D109"
    assert finding.message == "the only object has 3 objects under 'data', wanted the rows themselves"
    assert finding.fix.startswith("jq -c '.[\"data\"][]' ")
    for row in (
        {"messages": [{"role": "user", "content": "a"}]},
        {"text": "a", "entities": [{"start": 0}]},
        {"data": "a"},
    ):
        assert read_rows(write(name, json.dumps(row))).rows == [row]
    path = write("a.jsonl", [{"data": [{}]}, {"data": [{}]}])  # rows of their own, whatever they are
    assert len(read_rows(path)) == 2


def test_several_encodings_in_one_file_are_not_converted(write):
    lines = [b'{"text": "caf\xc3\xa9"}', b'{"text": "caf\xe9"}', b'{"text": "tea"}']
    path = write("a.jsonl", b"\n".join(lines))
    finding = fault(path).findings[0]
    assert (finding.code, finding.place) == ("D106", "a.jsonl:2")
    assert "1 line of this kind, and 1 line with other letters in UTF-8" in finding.message
    assert "iconv" not in finding.fix
    for name, content in (("a.jsonl", lines), ("a.csv", [b"text", b"caf\xc3\xa9", b"caf\xe9", b"tea"])):
        table = read_rows(write(name, b"\n".join(content)), drop_bad_rows=True)
        assert [row["text"] for row in table.rows] == ["caf\xe9", "tea"]
        assert [(r.place, r.reason) for r in table.rejected] == [
            (f"{name}:{2 if name == 'a.jsonl' else 3}", "not UTF-8 [D106]")
        ]
    assert "drop_bad_rows" not in fault(write("a.txt", b"\n".join(lines)), drop_bad_rows=True).findings[0].fix
    assert fault(write("b.jsonl", lines[1])).findings[0].fix.startswith("iconv -f WINDOWS-1252")
