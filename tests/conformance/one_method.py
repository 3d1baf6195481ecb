"""The suite for a method that is in no list of it: every check that takes a case and a model, called one by one.

    CHECKS = [*one_method.checks()]
    one_method.hold(check, "layerscale", LayerScale(), "gpt2", monkeypatch=monkeypatch, tmp_path=tmp_path)

The checks are those that the catalogue's own methods are held to: it starts as the identity, leaves no trace, computes
merged what it computes attached, survives copying and pickling, gives each row of a mixed batch what it gives that row
alone, gets its gradients with and without checkpointing, works in bfloat16.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance import cases
from graftlm.core import Method

__all__ = ["MODELS", "Check", "checks", "hold", "models_of"]

Check = tuple[str, str]  # a file of the suite and a function in it

#: Unlike enough: grouped heads, GPT-2's transposed maps, an encoder, an encoder-decoder, fused maps.
MODELS = ("llama", "gpt2", "bert", "t5", "phi3")

_FIXTURES = {"tmp_path", "monkeypatch"}


def checks() -> list[Check]:
    """Every check that takes a method (LoRA among others) and a model, and else only pytest's fixtures."""
    found = []
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"conformance.{file.stem}")
        for name, check in vars(module).items():
            if name.startswith("test_") and inspect.isfunction(check) and check.__module__ == module.__name__:
                wanted = set(inspect.signature(check).parameters)
                own = {"case", "model_name"} <= wanted <= {"case", "model_name", *_FIXTURES}
                if own and {"lora", "lora-all"} & _parametrised(check, "case"):
                    found.append((file.stem, name))
    return found


def models_of(check: Check) -> list[str]:
    """Those of MODELS that the check is meant for."""
    tried = _parametrised(_function(check), "model_name")
    return [model for model in MODELS if model in tried]


def hold(check: Check, name: str, method: Method, model_name: str, *, monkeypatch: Any, tmp_path: Path) -> None:
    """Run one check on `method` and one tiny model. Raises AssertionError where it does not hold."""
    monkeypatch.setitem(cases.CASES, name, method)
    function = _function(check)
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    wanted = inspect.signature(function).parameters
    function(case=name, model_name=model_name, **{key: given[key] for key in wanted if key in given})


def _function(check: Check) -> Callable[..., None]:
    file, name = check
    return getattr(importlib.import_module(f"conformance.{file}"), name)


def _parametrised(check: Callable[..., None], name: str) -> set[str]:
    """The values that a check's marks give to one of its parameters."""
    found = set()
    for mark in getattr(check, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
            if name in names:
                at = names.index(name)
                found |= {value[at] if len(names) > 1 else value for value in mark.args[1]}
    return found
