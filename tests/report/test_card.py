"""The model card: a head that parses, the same facts as the report, no mark-up out of the user's texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from graftlm.report import write_card, write_report

from .conftest import HOSTILE, answers, classification, write_run


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return dict(YAML(typ="safe").load(head))


def test_head_and_facts(tmp_path: Path) -> None:
    path = write_card(classification(tmp_path / "tickets-1"))
    card = path.read_text().replace("\u00a0", " ")
    assert path.name == "README.md"
    assert head_of(card) == {
        "base_model": "bundled",
        "library_name": "graftlm",
        "pipeline_tag": "text-classification",
        "tags": ["graftlm", "lora", "head", "text-classification"],
    }
    assert "| LoRA adapter | 0.872 | 0.817 to 0.927 | 0.876 |" in card
    assert "may be noise" in card
    assert "- trained parameters: 163 840 (3.5 % of the base's count)" in card
    assert "kept:" not in card
    assert "graftlm predict" in card
    assert "SHA-256 of tickets.csv" in card
    assert "/home/someone" not in card


def test_any_run_has_a_card(any_run: Path) -> None:
    card = write_card(any_run).read_text()
    assert head_of(card)["library_name"] == "graftlm"
    assert "\n\n\n" not in card


def test_texts_of_the_user_stay_texts(tmp_path: Path) -> None:
    folder = answers(tmp_path / "faq-1", steps=12)
    run = json.loads((folder / "run.json").read_text())
    run["base"]["name"] = 'x"\n- y: <script>'
    run["results"]["scores"][0]["title"] = f"{HOSTILE}\n# title"
    run["data"]["notes"] = [HOSTILE]
    run["command"] = "graftlm train '```'"
    write_run(folder, run)
    card = write_card(folder).read_text()
    assert head_of(card)["base_model"] == 'x"\n- y: <script>'
    body = card.split("---\n", 2)[2]
    outside = "".join(body.split("```")[::2])
    assert "<script" not in outside
    assert "\n# title" not in body
    assert "one\\` \\| two" in body
    assert "````sh\ngraftlm train '```'\n````" in body


def test_a_path_of_this_machine_stays_out_of_the_head(tmp_path: Path) -> None:
    folder = answers(tmp_path / "faq-1", steps=12)
    run = json.loads((folder / "run.json").read_text())
    run["base"]["name"] = "/home/someone/models/small"
    write_run(folder, run)
    assert head_of(write_card(folder).read_text())["base_model"] == "small"


def test_a_card_edited_by_hand_is_kept(tmp_path: Path) -> None:
    folder = answers(tmp_path / "faq-1", steps=12)
    path = write_card(folder)
    first = path.read_text()
    assert write_card(folder) == path
    assert path.read_text() == first
    edited = first.replace("# license: yours", "license: mit\n# yours")
    assert edited != first
    path.write_text(edited)
    other = write_card(folder)
    assert other.name == "README.new.md"
    assert other.read_text() == first
    assert path.read_text() == edited


def test_which_step_is_kept_is_told(tmp_path: Path) -> None:
    folder = classification(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["kept"] = {"step": 2, "of_steps": 80, "line": "stopped early, after 8 of 80 steps; step 2 is kept"}
    (folder / "run.json").write_text(json.dumps(record))
    assert "- kept: stopped early, after 8 of 80 steps; step 2 is kept" in write_card(folder).read_text()
    assert "stopped early, after 8 of 80 steps" in write_report(folder).read_text()
