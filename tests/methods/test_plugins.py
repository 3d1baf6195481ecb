"""Methods of installed packages: found by entry point, behind graftlm's own, and named where they cannot be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftlm.core import attach
from graftlm.errors import AdapterError, MethodError
from graftlm.formats import load_adapter
from graftlm.methods import METHODS, LoRA, find_method, method_names, read_method
from models_for_tests import logits_of, perturb, tiny
from packages_for_tests import installed, installed_as_in

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "graftlm-layerscale"


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A folder on the path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("graftlm_layerscale", "their_")):
            del sys.modules[name]


@pytest.fixture
def layerscale(path, monkeypatch):
    """The example package as if pip had installed it for working on."""
    installed_as_in(EXAMPLE / "pyproject.toml", path)
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    return path


def code_of(text: str) -> str:
    with pytest.raises(MethodError) as caught:
        read_method(text)
    (finding,) = caught.value.findings
    return finding.code


def test_without_packages_there_are_the_built_in_ones():
    assert find_method("layerscale") is None
    assert code_of("layerscale") == "T101"


def test_a_package_adds_a_method(layerscale):
    method = read_method("lora + layerscale(targets=down, layers='-1:') + head")
    assert str(method) == "lora+layerscale(targets=down,layers='-1:')+head"
    assert type(method.parts[1]).__module__ == "graftlm_layerscale"
    assert method_names() == sorted([*METHODS, "layerscale"])
    assert "layerscale" not in METHODS


def test_inside_another_method(layerscale):
    method = read_method("rezero(layerscale,start=0.5)")
    assert str(method) == "rezero(method=layerscale,start=0.5)"
    assert read_method(str(method)) == method


def test_its_settings_are_checked_like_any(layerscale):
    assert code_of("layerscale(tragets=down)") == "T112"
    with pytest.raises(MethodError, match="Did you mean layerscale"):
        read_method("layerscal")


def test_names_are_known_without_running_the_package(path):
    installed(path, "their-methods", {"broken": "their_missing:Broken"})
    assert "broken" in method_names()
    assert code_of("brokn") == "T101"


def test_built_in_names_win(path):
    (path / "their_lora.py").write_text("raise AssertionError('imported')")
    installed(path, "their-methods", {"lora": "their_lora:LoRA"})
    assert read_method("lora") == LoRA()
    assert method_names() == sorted(METHODS)


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("", "T115", "AttributeError"),
        ("import nothing_of_that_name", "T115", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def Theirs(: pass", "T115", "SyntaxError"),
        ("1 / 0", "T115", "ZeroDivisionError"),
        ("def Theirs(): pass", "T116", "wanted a subclass of graftlm.core.Method"),
        ("from graftlm.errors import Finding as Theirs", "T116", "wanted a subclass of graftlm.core.Method"),
        ("from graftlm.methods import LoRA as Theirs", "T116", "is named 'lora'"),
        ("from graftlm.core import Method as M\nclass Theirs(M): name = title = 'theirs'", "T116", "no dataclass"),
        (
            "from dataclasses import dataclass\nfrom graftlm.core import Method as M\n"
            "@dataclass(frozen=True)\nclass Theirs(M): pass",
            "T116",
            "has no name and no title",
        ),
    ],
)
def test_what_cannot_be_loaded_names_its_package(path, module, code, said):
    (path / "their_module.py").write_text(module)
    installed(path, "their-methods", {"theirs": "their_module:Theirs"}, version="2.1")
    with pytest.raises(MethodError) as caught:
        read_method("theirs + lora(rnak=1)")
    first, second = caught.value.findings
    assert (first.code, second.code) == (code, "T112")  # every fault at once
    assert "'theirs'" in first.message
    assert "their-methods 2.1" in first.message
    assert "their_module:Theirs" in first.message
    assert said in first.message


def test_two_packages_with_one_name(layerscale, path):
    installed(path / "other", "other-methods", {"layerscale": "other:LayerScale"})
    sys.path.insert(0, str(path / "other"))
    try:
        with pytest.raises(MethodError, match=r"graftlm-layerscale 0\.1\.0 .* other-methods 0\.1\.0") as caught:
            read_method("layerscale")
    finally:
        sys.path.remove(str(path / "other"))
    assert caught.value.findings[0].code == "T117"


def test_saved_and_loaded(layerscale, path, monkeypatch):
    model = tiny("llama")
    plain = logits_of(model)
    adapter = attach(model, read_method("layerscale+lora(rank=2)"))
    perturb(adapter)
    changed = logits_of(model)
    adapter.save(path / "kept")
    adapter.detach()
    stored = json.loads((path / "kept" / "graftlm.json").read_text())["method"]["parts"]
    assert [part.get("package") for part in stored] == ["graftlm-layerscale 0.1.0", None]
    load_adapter(model, path / "kept")
    assert torch.equal(logits_of(model), changed)
    assert not torch.equal(changed, plain)


def test_an_adapter_of_a_package_that_is_not_here(layerscale, path, monkeypatch):
    model = tiny("llama")
    texts = {"plain": "layerscale", "inside": "rezero(layerscale,start=0.5)"}
    for folder, text in texts.items():
        adapter = attach(model, read_method(text))
        adapter.save(path / folder)
        adapter.detach()
    monkeypatch.setattr("graftlm.methods.plugins.entry_points", lambda **_: ())
    for folder in texts:
        with pytest.raises(AdapterError, match=r"graftlm-layerscale 0\.1\.0 is not known") as caught:
            load_adapter(model, path / folder)
        assert [finding.code for finding in caught.value.findings] == ["A215"]


def test_the_command_line_shows_it(layerscale, path):
    (path / "their_module.py").write_text("import nothing_of_that_name")
    installed(path, "their-methods", {"theirs": "their_module:Theirs"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}

    line = [sys.executable, "-m", "graftlm", "methods", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert [method["name"] for method in json.loads(done.stdout)] == sorted([*METHODS, "layerscale"])
    assert done.returncode == 2
    assert "'theirs' of the package their-methods 0.1.0" in done.stderr
    assert "Traceback" not in done.stderr
