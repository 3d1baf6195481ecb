"""The docs are true: marked code blocks run, generated parts are current, every verb and method has its page.

A block below `<!-- test -->` is run, below `<!-- test: slow -->` only with `-m slow`; `<!-- test: file NAME -->` makes
a file of it. The blocks of a page are run in order in one folder that holds `tickets.csv` and `faq.jsonl`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DATA = ROOT / "src" / "graftlm" / "bundled" / "data"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"<!-- test(?:: (?P<how>[\w .-]+))? -->\n+```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
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
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{folder}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    for block in blocks:
        if block.how.startswith("file "):
            (folder / block.how.removeprefix("file ")).write_text(block.code)
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
    assert "file ia3.py" in marked["docs/adding-a-method.md"]
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


def test_figures_are_current(generate):
    drawn = generate.figures()
    for file, text in drawn.items():
        assert file.read_text() == text, "run python docs/generate.py"
    assert {file.name for file in (DOCS / "figures").glob("*.svg")} == {file.name for file in drawn} | {"mechanism.svg"}


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


# --- the method of docs/adding-a-method.md --------------------------------------------------------------------------

MODELS = ("llama", "gpt2", "bert", "t5", "phi3")


@pytest.fixture(scope="module")
def ia3(tmp_path_factory):
    """The example's module, made of the page's own text."""
    (block,) = [b for b in blocks_of(DOCS / "adding-a-method.md") if b.how == "file ia3.py"]
    file = tmp_path_factory.mktemp("example") / "example_ia3.py"
    file.write_text(textwrap.dedent(block.code))
    spec = importlib.util.spec_from_file_location("example_ia3", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickling finds its classes by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def parametrised(check: Callable[..., None], name: str) -> set[str]:
    """The values that a check's marks give to one of its parameters."""
    found = set()
    for mark in getattr(check, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
            if name in names:
                at = names.index(name)
                found |= {value[at] if len(names) > 1 else value for value in mark.args[1]}
    return found


def conformance_checks() -> list[tuple[str, str]]:
    """Every check of the suite that takes a method (LoRA among others) and a model, and else only pytest's fixtures."""
    found = []
    for file in sorted((ROOT / "tests" / "conformance").glob("test_*.py")):
        module = importlib.import_module(f"conformance.{file.stem}")
        for name, check in vars(module).items():
            if name.startswith("test_") and inspect.isfunction(check) and check.__module__ == module.__name__:
                wanted = set(inspect.signature(check).parameters)
                own = {"case", "model_name"} <= wanted <= {"case", "model_name", "tmp_path", "monkeypatch"}
                if own and {"lora", "lora-all"} & parametrised(check, "case"):
                    found.append((file.stem, name))
    return found


def test_there_are_conformance_checks():
    assert len(conformance_checks()) >= 6


@pytest.mark.parametrize(("file", "name"), conformance_checks(), ids=lambda value: value)
def test_the_example_conforms(file, name, ia3, monkeypatch, tmp_path):
    from conformance import cases

    method = ia3.IA3(targets="attention,down")
    monkeypatch.setitem(cases.CASES, "ia3", method)
    check = getattr(importlib.import_module(f"conformance.{file}"), name)
    extra = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    models = [model for model in MODELS if model in parametrised(check, "model_name")]
    assert models
    for model in models:
        given = {key: extra[key] for key in inspect.signature(check).parameters if key in extra}
        check(case="ia3", model_name=model, **given)


def test_the_example_is_what_the_paper_counts(ia3):
    """Three vectors a layer: two widths of keys and values, one inner width."""
    from graftlm.core import attach
    from models_for_tests import tiny

    model = tiny("llama")
    config = model.config
    adapter = attach(model, ia3.IA3())
    per_layer = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert adapter.parameter_count == config.num_hidden_layers * (per_layer + config.intermediate_size)
    assert str(ia3.IA3(targets="down")) == "ia3(targets=down)"
