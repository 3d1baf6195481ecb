"""The page says what the folder says, escapes it, needs nothing from outside and lives with what is missing."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graftlm.errors import RunError
from graftlm.report import write_report

from .conftest import HOSTILE, LABELS, answers, classification, cut_short, head, lines, metrics, write_run


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(body))


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def in_order(text: str, *parts: str) -> None:
    places = [text.find(part) for part in parts]
    assert -1 not in places, [part for part, place in zip(parts, places, strict=True) if place < 0]
    assert places == sorted(places)


def test_classification_says_what_happened_in_the_agreed_order(tmp_path: Path) -> None:
    text = text_of(page_of(classification(tmp_path / "tickets-1")))
    in_order(
        text,
        "No clear gain over TF-IDF + logistic regression",
        "LoRA adapter: macro-F1 0.872 (95 % interval 0.817 to 0.927) on 120 rows kept out of training, against 0.641",
        "may be noise",
        "macro-F1, more is better",
        "Predictions:",
        "is cancel_order , said account_access with probability 0.93 · tickets.csv:2",
        "Right, from the surest",
        "loss, nats per row",
        "Confusions",
        "By label",
        "What was trained",
        "163 840 (3.5 % of the base's count)",
        "662 kB",
        "600 rows, text=body label=topic, 3 duplicates, 0 cut",
        "3 rows are the same as another row",
        "tickets.csv:17",
        "run.yaml:3:3",
        "train.learning_rate 0.0025 decided by the run",
        "All 16 settings",
        "Environment",
        "2.13.0",
        "graftlm predict",
        "graftlm evaluate",
        "from graftlm.training import open_adapter",
        "graftlm train tickets.csv --epochs 3",
    )
    assert all(label in text for label in LABELS)
    assert "/home/someone" not in text


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    text = text_of(page_of(answers(tmp_path / "faq-1")))
    in_order(
        text,
        "Better than untouched base",
        "loss 1.712 (95 % interval 1.671 to 1.753) nats per token on 600 rows (34 127 tokens)",
        "against 2.744 (2.692 to 2.796)",
        "perplexity 5.54 instead of 15.5",
        "unlikely to be noise",
        "Can you refund me to a different card?",
        "untouched base Sure!",
        "tuned I am sorry, we can",
        "reference I am sorry, but",
        "loss, nats per token",
        "graftlm chat",
        "PeftModel.from_pretrained",
    )
    assert "Confusions" not in text


def test_a_run_cut_short_still_has_a_page(tmp_path: Path) -> None:
    text = text_of(page_of(cut_short(tmp_path / "book-1")))
    assert "Not evaluated" in text
    assert "stopped after 20 steps" in text
    assert "In 1 step the training loss was not a finite number" in text
    assert "metrics.jsonl: 1 line could not be read and is left out" in text
    assert "Sample outputs" not in text
    assert "adapter on disk" not in text


def test_nothing_from_outside_and_sound_markup(any_run: Path) -> None:
    page = page_of(any_run)
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "object", "base", "a", "image"} & set(tags.names)
    for name, value in tags.attributes:
        assert not name.startswith("on")
        assert name != "src"
        if name in ("href", "xlink:href"):
            assert value is not None
            assert value.startswith("#")
    assert "://" not in page.replace(html.escape("http://example.invalid", quote=True), "")
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    ids = [value for name, value in tags.attributes if name == "id"]
    assert ids
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', page)
    assert used
    assert set(used) <= set(ids)


def test_both_colour_schemes_and_print_are_provided_for(tmp_path: Path) -> None:
    page = page_of(answers(tmp_path / "faq-1"))
    dark = page[page.index("prefers-color-scheme: dark") : page.index("@media print")]
    drawing = page[page.index("<svg") : page.rindex("</svg>")]
    for variable in set(re.findall(r"var\((--\w+)\)", drawing)) - {"--font"}:
        assert f"{variable}:" in dark
    # A colour that is written out would not follow the scheme.
    assert not re.findall(r"#[0-9a-f]{6}\b(?!-)", re.sub(r"url\([^)]*\)|href=\"[^\"]*\"", "", drawing))


def test_on_paper_nothing_is_cut_at_the_edge_or_folded_away(tmp_path: Path) -> None:
    page = page_of(answers(tmp_path / "faq-1"))
    paper = page[page.rindex("@media print") : page.index("</style>")]
    assert ".scroll { overflow: visible; }" in paper
    assert "details::details-content { content-visibility: visible;" in paper


def test_every_text_of_the_user_is_escaped(tmp_path: Path) -> None:
    folder = classification(tmp_path / "tickets-1", steps=18)
    assert html.escape("<script>alert(") in page_of(folder)

    def hostile(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: hostile(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [hostile(inner, key) for inner in value]
        kept = ("task", "name", "status") if key != "base" else ()
        return HOSTILE if isinstance(value, str) and key not in kept else value

    run = json.loads((folder / "run.json").read_text())
    run = hostile(run)
    run["base"]["name"] = HOSTILE
    run["settings"][HOSTILE] = HOSTILE
    run["environment"][HOSTILE] = HOSTILE
    run["data"]["sha256"][HOSTILE] = HOSTILE
    write_run(folder, run)
    lines(folder / "data" / "rejected.jsonl", [{"place": HOSTILE, "reason": HOSTILE}])
    lines(folder / "eval" / "samples.jsonl", [dict.fromkeys(("prompt", "base", "tuned", "reference"), HOSTILE)])
    page = page_of(folder)
    assert "<script" not in page
    assert "script" not in Tags(page).names
    assert page.count("&lt;script&gt;") > 30
    assert "$5" in text_of(page)


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    import matplotlib

    folder = answers(tmp_path / "faq-1", steps=200)
    first = page_of(folder)
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        assert page_of(folder) == first


def test_long_runs_are_thinned_and_fast(tmp_path: Path) -> None:
    folder = answers(tmp_path / "faq-1", steps=5000)
    start = time.process_time()
    page = page_of(folder)
    assert time.process_time() - start < 2
    assert len(page) < 150_000
    assert "mean over neighbouring steps" in page


@pytest.mark.parametrize("gone", ["metrics.jsonl", "eval", "data"])
def test_any_optional_part_may_be_missing(any_run: Path, gone: str) -> None:
    path = any_run / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    assert "How to use it next" in page_of(any_run)


@pytest.mark.parametrize("odd", [None, 3, "text", [], [None], {"a": [1]}])
def test_odd_values_in_run_json_do_not_stop_the_page(tmp_path: Path, odd: object) -> None:
    whole = head("classify", "lora", "graftlm train x.csv")
    folder = write_run(tmp_path / "all", dict.fromkeys(whole, odd) | {"task": "classify", "results": odd})
    assert "Not evaluated" in page_of(folder)
    results = ("labels", "eval_rows", "scores", "per_label", "confusion")
    folder = write_run(tmp_path / "results", {"task": "classify", "results": dict.fromkeys(results, odd)})
    assert "Not evaluated" in page_of(folder)


def test_many_labels_become_a_list_of_confusions(tmp_path: Path) -> None:
    labels = [f"label {n}" for n in range(30)]
    table = [[5 if row == column else 0 for column in range(30)] for row in range(30)]
    table[3][7] = 4
    folder = write_run(tmp_path / "run", {"task": "classify", "results": {"labels": labels, "confusion": table}})
    assert "rows label predicted 4 label 3 label 7" in text_of(page_of(folder))


def test_odd_letters_survive(tmp_path: Path) -> None:
    folder = answers(tmp_path / "faq-1", steps=20)
    run = json.loads((folder / "run.json").read_text())
    run["results"]["scores"][0]["title"] = "适配器 \ud800 \x00 $a_b$ é"
    write_run(folder, run)
    lines(folder / "eval" / "samples.jsonl", [{"prompt": "a\u2028b", "base": None, "tuned": ["x"], "reference": ""}])
    page = page_of(folder)
    assert page.count(">适配器 \ufffd \ufffd $a_b$ é<") == 3  # two drawings and the table
    assert "a\u2028b" in page
    assert "\0" not in page
    assert "<b>reference</b>" not in page


def test_a_constant_rate_and_a_single_step_can_be_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", head("lm", "ia3", "x"))
    lines(folder / "metrics.jsonl", [metrics(2, 3.0, 2.0, 1)[0]])
    assert page_of(folder).count("<svg") == 2


@pytest.mark.parametrize(
    ("content", "code"), [(None, "U101"), ("{", "U102"), ("[1]", "U102"), (b"\xff\xfe{}", "U102")], ids=str
)
def test_a_folder_without_a_readable_run(tmp_path: Path, content: str | bytes | None, code: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as caught:
        write_report(tmp_path)
    assert [finding.code for finding in caught.value.findings] == [code]
    assert not (tmp_path / "report.html").exists()


def test_importing_the_room_loads_nothing_heavy() -> None:
    code = (
        "import sys, graftlm.report; "
        "print([name for name in ('torch', 'matplotlib', 'jinja2', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lengths_are_drawn_with_the_line_at_which_rows_are_cut(tmp_path: Path) -> None:
    from graftlm.data.tokenising import histogram

    lengths = [*range(1, 100), 140, 141, 250]
    found = histogram(lengths, 128)
    assert sum(found["counts"]) == len(lengths)
    assert 128 in found["edges"]
    assert sum(n for n, low in zip(found["counts"], found["edges"], strict=False) if low >= 128) == 3
    run = head("sft", "lora", "graftlm train faq.jsonl")
    write_run(tmp_path / "plain", run)
    assert "tokens of a row" not in page_of(tmp_path / "plain")
    run["data"]["lengths"] = {**found, "limit": 128}
    write_run(tmp_path / "faq", run)
    page = page_of(tmp_path / "faq")
    assert page.count(">cut at 128<") == 2  # a drawing for a desktop, one for a phone
    assert "3 in the bars beyond the cut at 128" in page
    run["data"]["lengths"] = {"edges": [0, "x"], "counts": [3], "limit": None}
    write_run(tmp_path / "odd", run)
    assert "tokens of a row" not in page_of(tmp_path / "odd")


def test_a_curve_of_one_point_is_seen(tmp_path: Path) -> None:
    run = head("sft", "lora", "graftlm train faq.jsonl")
    lines(write_run(tmp_path / "one", run) / "metrics.jsonl", [{"step": 5, "loss": 0.688, "learning_rate": 1e-3}])
    page = page_of(tmp_path / "one")
    drawing = page[page.index('aria-label="Training loss') :]
    assert "<use" in drawing[: drawing.index("</svg>")]
