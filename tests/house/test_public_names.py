"""What every module shares: a docstring that says what it is, an `__all__` that is true, one idea a module."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

import graftlm

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "graftlm"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for file in FILES
    if file.name != "__main__.py"
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_it_is(file):
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = text.split("\n\n")[0]
    assert first[:1].isupper() or first.startswith(("`", "graftlm")), "the docstring begins with a sentence"
    assert re.search(r"[.:)]$", first.rstrip()), f"no sentence: {first!r}"
    assert file.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("name", MODULES)
def test_all_is_true(name):
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        pytest.fail(f"{name} has no __all__")
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [each for each in module.__all__ if not hasattr(module, each)]
    assert not missing


def test_the_front_door():
    assert len(graftlm.__all__) == len(set(graftlm.__all__))
    for name in graftlm.__all__:
        assert getattr(graftlm, name) is not None
    assert set(dir(graftlm)) == set(graftlm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = graftlm.lora


def test_the_front_door_tells_type_checkers_the_same():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told | {"__version__"} == set(graftlm.__all__)


def test_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == graftlm.__version__
    assert f'version = "{graftlm.__version__}"' in (ROOT / "pyproject.toml").read_text()


#: Written in two halves, so that this file does not name what it looks for.
HOSTS = [
    "huggingface" ".co", "://hf" ".co", "pypi" ".org", "pythonhosted" ".org", "download.pytorch" ".org", "conda" ".org",
    "docker" ".io", "ghcr" ".io", "quay" ".io", "modelscope" ".cn", "jsdelivr" ".net", "unpkg" ".com",
    "googleapis" ".com", "cloudflare" ".com", "kaggle" ".com",
]  # fmt: skip


def files_of_the_project() -> list[Path]:
    """Every text file that is or would be kept in the repository."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and done.stdout:
        names = done.stdout.splitlines()
    else:  # a copy without git
        kept = ("src", "tests", "docs", "scripts")
        names = [str(file.relative_to(ROOT)) for room in kept for file in (ROOT / room).rglob("*")]
        names += [file.name for file in ROOT.iterdir()]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_registry_and_no_hub_is_named():
    found = []
    for file in files_of_the_project():
        if file.suffix in {".safetensors", ".png", ".pyc", ".parquet"}:
            continue
        text = file.read_text(encoding="utf-8", errors="ignore").lower()
        found += [f"{file.relative_to(ROOT)}: {host}" for host in HOSTS if host in text]
    assert not found
