"""The docs are true: marked code blocks run, generated parts are current, every verb and method has its page.

A block below `<!-- test -->` is run, below `<!-- test: slow -->` only with `-m slow`; `<!-- test: file NAME -->` makes
a file of it, and a file `PACKAGE/pyproject.toml` a package that counts as installed. The blocks of a page are run in order
in one folder that holds `tickets.csv` and `faq.jsonl`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from packages_for_tests import installed_as_in

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DATA = ROOT / "src" / "graftlm" / "bundled" / "data"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"<!-- test(?:: (?P<how>[\w ./-]+))? -->\n+```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Block:
    """A marked block: `how` is empty, `slow` or `file NAME`."""

    how: str
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(m["how"] or "", m["language"], m["code"]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_blocks(blocks: list[Block], folder: Path) -> None:
    shutil.copy(DATA / "messages.csv", folder / "tickets.csv")
    shutil.copy(DATA / "answers.jsonl", folder / "faq.jsonl")
    commands = folder / "bin"
    commands.mkdir()
    program = commands / "graftlm"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graftlm "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",  # torchrun is beside Python
        "PYTHONPATH": f"{ROOT / 'src'}:{folder}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    for block in blocks:
        if block.how.startswith("file "):
            file = folder / block.how.removeprefix("file ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
            if file.name == "pyproject.toml":
                source = installed_as_in(file, file.parent / "src")
                environment["PYTHONPATH"] += f"{os.pathsep}{source}"
            continue
        how = {"python": [sys.executable, "-c", block.code], "sh": ["bash", "-euo", "pipefail", "-c", block.code]}
        done = subprocess.run(
            how[block.language],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS * 4,
            check=False,
        )
        assert done.returncode == 0, f"{block.code}\n--- ended with {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_the_pages_have_marked_blocks():
    marked = {name_of(page): [block.how for block in blocks_of(page)] for page in PAGES}
    assert "" in marked["README.md"]
    assert "slow" in marked["README.md"]
    assert len([how for how in marked["docs/adding-a-method.md"] if how.startswith("file ")]) == 4
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        marks = re.findall(r"^<!-- test.*-->$", text, re.MULTILINE)
        assert len(marks) == len(blocks_of(page)), f"{name_of(page)}: a mark without a block below it"
        assert {block.language for block in blocks_of(page) if not block.how.startswith("file")} <= {"python", "sh"}


@pytest.mark.timeout(SECONDS * 5)
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.how == "" for b in blocks_of(p))], ids=name_of)
def test_quick_blocks_run(page, tmp_path):
    """Some seconds a page: each block is a fresh process that loads the bundled base."""
    run_blocks([block for block in blocks_of(page) if block.how != "slow"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 20)
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.how == "slow" for b in blocks_of(p))], ids=name_of)
def test_all_blocks_run(page, tmp_path):
    run_blocks(blocks_of(page), tmp_path)


def test_a_failing_block_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="ended with 2"):
        run_blocks([Block("", "sh", "graftlm explain Z999")], tmp_path)


# --- generated parts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_generated_parts_are_current(generate, page):
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, "run python docs/generate.py"


def test_what_is_not_current_is_seen(generate):
    page = "<!-- generated: help train -->\nold\n<!-- end -->\n"
    filled = generate.filled(page)
    assert "Usage: graftlm train" in filled
    assert "\nold\n" not in filled
    assert generate.filled(filled) == filled


def test_every_verb_and_every_method_has_its_page(generate):
    from graftlm.cli.program import VERBS
    from graftlm.methods import METHODS

    navigation = (ROOT / "mkdocs.yml").read_text()
    assert {page.stem for page in (DOCS / "verbs").glob("*.md")} == set(VERBS)
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} <= {*METHODS, "index"}
    for page in (
        *(f"verbs/{name}.md" for name in VERBS),
        *(f"methods/{generate.page_of(name)[0].name}" for name in METHODS),
    ):
        assert page in navigation
    index = (DOCS / "methods" / "index.md").read_text()
    for name in METHODS:
        page, heading = generate.page_of(name)
        text = page.read_text()
        for region in (f"settings {name}", f"cost {name}", f"measured {name}"):
            assert f"<!-- generated: {region} -->" in text
        assert f"figures/{page.stem}.svg" in text
        assert f"({page.name}{'#' if heading else ''}{heading})" in index


def test_every_task_has_a_page_that_is_run():
    from graftlm.data.recognise import TASKS

    pages = {page.stem: page for page in (DOCS / "tasks").glob("*.md") if page.stem != "index"}
    assert set(pages) == set(TASKS)
    index, navigation = (DOCS / "tasks" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for task, page in pages.items():
        assert any("graftlm train" in block.code for block in blocks_of(page) if block.how == ""), task
        assert f"[`{task}`]({task}.md)" in index
        assert f"tasks/{task}.md" in navigation


def test_figures_are_current(generate):
    drawn = generate.figures()
    for file, text in drawn.items():
        assert file.read_text() == text, "run python docs/generate.py"
    others = {"mechanism.svg", "plan.svg", "scaling.svg"}  # by hand, and by benchmarks from what they measured
    assert {file.name for file in (DOCS / "figures").glob("*.svg")} == {file.name for file in drawn} | others


def test_each_method_is_drawn_as_itself(generate):
    seen = {}
    for file, text in generate.figures().items():
        body = text.partition("<style>")[2]
        assert body not in seen, f"{file.name} shows the same as {seen[body]}"
        seen[body] = file.name


def test_links_lead_somewhere():
    """Those of README and the pages; mkdocs --strict checks the anchors."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            target = link.partition("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{name_of(page)}: {link}"


def test_the_place_of_the_run_output_is_marked():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"<!-- run output -->\n```text\n.*?```\n<!-- end -->", text, re.DOTALL)


# --- the package of docs/adding-a-method.md -------------------------------------------------------------------------


def test_the_example_package_is_the_page_to_the_letter():
    """Its own tests, the conformance suite among them, lie in it: `pytest examples`."""
    blocks = blocks_of(DOCS / "adding-a-method.md")
    written = {block.how.removeprefix("file "): block.code for block in blocks if block.how.startswith("file ")}
    folder = ROOT / "examples"
    files = {
        file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8")
        for file in folder.rglob("*")
        if file.is_file() and file.suffix in (".py", ".toml")
    }
    assert written == files
