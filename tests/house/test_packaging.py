"""What a user gets: the wheel, what it needs, and the commands that README and CI promise."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in the wheel, and its metadata."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    program = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    return names, metadata


def test_the_wheel_holds_everything_and_nothing_else(wheel):
    names, _ = wheel
    package = ROOT / "src" / "graftlm"
    wanted = {
        file.relative_to(ROOT / "src").as_posix()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.endswith(".pyc")
    }
    assert {name for name in names if name.startswith("graftlm/")} == wanted
    for needed in (
        "graftlm/py.typed",
        "graftlm/bundled/base/model.safetensors",
        "graftlm/bundled/base/tokenizer.json",
        "graftlm/bundled/data/messages.csv",
        "graftlm/bundled/data/answers.jsonl",
        "graftlm/report/page.html.jinja",
        "graftlm/report/card.md.jinja",
    ):
        assert needed in names
    assert {name.split("/")[0] for name in names} == {
        "graftlm",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata(wheel):
    _, metadata = wheel
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.MULTILINE)
    assert re.search(r"^Requires-Python: >=3.11$", metadata, re.MULTILINE)
    assert not re.search(r"^Requires-Dist: (peft|datasets)\b[^;]*$", metadata, re.MULTILINE)


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", text)[0].lower().replace("_", "-").replace(".", "-") for text in requirements}


#: Import name to the name it is installed by, where they differ.
INSTALLED_AS = {"sklearn": "scikit-learn", "ruamel": "ruamel-yaml", "rouge_score": "rouge-score", "lm_eval": "lm-eval"}
#: Extras whose packages are imported where they are needed only, with an error that names the extra.
LAZY_EXTRAS = ("scores", "compare", "quantised", "harness", "track", "hub")
#: Brought by a dependency of ours that would not be itself without it.
BROUGHT = {
    "annotated_types": "pydantic",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "tokenizers": "transformers",
}


#: In an extra, and imported by torch or transformers for us.
THROUGH_OTHERS = {"torchao", "tensorboard"}


def test_what_is_imported_is_required_and_the_other_way_round():
    imported: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    ours = {name for name in imported if name not in sys.stdlib_module_names} - {"graftlm"}
    needed = {INSTALLED_AS.get(name, BROUGHT.get(name, name)) for name in ours}
    required = names_of(PROJECT["dependencies"])
    lazy = names_of([text for name in LAZY_EXTRAS for text in PROJECT["optional-dependencies"][name]])
    assert needed - required == lazy - THROUGH_OTHERS
    assert required <= needed


def test_constraints_pin_every_direct_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9A-Za-z.]*", line) for line in lines)
    extras = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "dev" for text in texts]
    assert names_of([*PROJECT["dependencies"], *extras]) <= names_of(lines)
    assert "torch==2.13.0" in lines


def commands_of_readme() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block.strip() for block in blocks if "pip install" in block]


def test_readme_has_two_commands_and_ci_runs_the_second():
    first, second = commands_of_readme()
    assert first.endswith(".venv/bin/graftlm train")
    assert second.endswith(".venv/bin/pytest -n auto")
    for command in (first, second):
        assert "\n" not in command
        assert "-c constraints.txt" in command
    assert second in (ROOT / ".ci" / "run").read_text()


def test_ci_is_sound():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for check in ("ruff check", "ruff format --check", "mypy", "lint-imports", "docs/generate.py --check", "--strict"):
        assert check in text
    assert text.rstrip().splitlines()[-1] == "[ $tests -eq 0 ] && [ ${#failed[@]} -eq 0 ]"


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    targets = set(shlex.split(phony))
    assert targets == set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
    wanted = "install test test-slow test-device check docs bench pretrain clean help"
    assert targets >= set(wanted.split())
