"""Runs the command line in this process, with stand-ins for the training and evaluation rooms."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli_stand_ins import Rooms, Said, Screen

from graftlm.cli import main
from graftlm.data.labels import Labels


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`cli("train", "x.csv", stdin="text")`; without stdin it is a terminal that nobody types on."""

    def run(*words: str, stdin: str | None = None) -> Said:
        monkeypatch.setattr(sys, "stdin", Screen() if stdin is None else io.StringIO(stdin))
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Rooms:
    """Stand-ins for `graftlm.training`, `graftlm.evaluation` and `graftlm.core.use`."""
    fake = Rooms()
    routed = ["tuned"]

    def train_resolved(resolved: Any, **options: Any) -> Any:
        fake.note("train_resolved", resolved, **options)
        record = {"task": fake.task, "status": fake.status, "data": {"columns": fake.columns}}
        return SimpleNamespace(folder=Path("runs/x y"), record=record)

    def evaluate(path: Any, data: Any = None, **options: Any) -> dict[str, Any]:
        fake.note("evaluate", path, data, **options)
        return fake.results

    def open_adapter(path: Any, *, base: str | None = None, **placing: Any) -> Any:
        asked = {name: value for name, value in placing.items() if value is not None}
        fake.note("open_adapter", path, base=base, **asked)
        return SimpleNamespace(
            prompt=None,
            model="model",
            tokenizer="tokenizer",
            adapter="adapter" if fake.tuned else None,
            facts=fake.facts,
            task=fake.task,
            labels=Labels(("no", "yes")) if fake.task == "classify" else None,
            template=fake.template,
            max_length=64,
        )

    def classify_texts(model: Any, tokenizer: Any, labels: Any, texts: Any, *, max_length: int | None) -> list[Any]:
        fake.note("classify_texts", model, tokenizer, labels, texts, max_length=max_length)
        return [SimpleNamespace(label="yes", probability=0.75, probabilities={"no": 0.25, "yes": 0.75}) for _ in texts]

    def generate_texts(model: Any, tokenizer: Any, template: Any, conversations: Any, **options: Any) -> list[str]:
        fake.note("generate_texts", template, conversations, **options)
        return [f"{routed[-1]} answer {at}" for at, _ in enumerate(conversations)]

    def stream_text(model: Any, tokenizer: Any, template: Any, messages: Any, **options: Any) -> Iterator[str]:
        fake.note("stream_text", template, messages, **options)
        yield from (f"{routed[-1]} ", "says ", "so")

    class use:  # noqa: N801
        def __init__(self, model: Any, spec: Any) -> None:
            assert spec is None

        def __enter__(self) -> None:
            routed.append("base")

        def __exit__(self, *_: object) -> None:
            routed.pop()

    def room(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members, __path__=list(import_module(name).__path__))  # its modules are the real ones
        monkeypatch.setitem(sys.modules, name, module)

    room("graftlm.training", train_resolved=train_resolved, evaluate=evaluate, open_adapter=open_adapter)
    room("graftlm.evaluation", classify_texts=classify_texts, generate_texts=generate_texts, stream_text=stream_text)
    monkeypatch.setattr("graftlm.core.use", use)
    return fake


@pytest.fixture
def adapter_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run folder `runs/faq-1` that looks like one, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "faq-1" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder.parent / "run.json").write_text("{}")
    return "runs/faq-1"
