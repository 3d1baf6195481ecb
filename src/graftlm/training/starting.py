"""Starting from an adapter that exists: it is trained on, or stays as it is while a new one is trained on top of it.

What the folder says holds: method, base, labels, scale, words and template. Settings that say otherwise are refused. On
top means in the same adapter: both act, only the new part is trained, and what is saved holds both.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core import Adapter, Method, attach
from graftlm.data import Labels, PromptTemplate, Scale, Template
from graftlm.errors import AdapterError, Finding, SettingsError
from graftlm.formats import load_adapter, read_facts, stored_method
from graftlm.formats.atomic import sha256_of
from graftlm.settings import RunSettings
from graftlm.training.early import start_folder
from graftlm.training.opening import peft_base

__all__ = ["Start", "attach_start", "on_its_base", "start_of"]

#: Tasks whose adapter has outputs of its own, which another task cannot go on with.
_HEADED = ("classify", "regress", "tag")


@dataclass(frozen=True)
class Start:
    """The adapter that a run starts from."""

    folder: Path
    facts: Mapping[str, Any]
    method: Method
    #: Whether it stays as it is, under a new one.
    kept: bool

    def digest(self) -> str:
        """The SHA-256 of the adapter's files."""
        whole = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".bin"):
                whole.update(f"{file.name}\0{sha256_of(file)}\n".encode())
        return whole.hexdigest()

    def alike(self, method: Method, why: str) -> AdapterError:
        """What is raised where `method` on top would have tensors of the adapter's names."""
        message = f"{method} cannot go on top of {self.folder}, which is {self.method}: {why}"
        folder = shlex.quote(str(self.folder))
        fix = (
            f"graftlm export {folder} --to merged -o OUT, then train -m OUT without --from; or --from without --method"
        )
        return AdapterError(Finding("U149", message, fix=fix))

    def known(self, settings: RunSettings) -> dict[str, Any]:
        """What the adapter says of how rows are read, as `read_with` takes it.

        Raises SettingsError (U148) with every setting that says otherwise.
        """
        facts, found = self.facts, dict[str, Any]()
        faults = []

        def differs(setting: str, asked: object, stored: object) -> None:
            message = f"{setting} is {asked}, and the adapter in {self.folder} was trained with {stored}"
            faults.append(Finding("U148", message, fix=f"leave out {setting}, or start without --from"))

        task = facts.get("task")
        if task in _HEADED:
            if settings.task not in ("auto", task):
                differs("task", settings.task, task)
            found["task"] = task
        if facts.get("labels"):
            found["labels"] = Labels.from_dict(facts["labels"])
        if facts.get("scale"):
            found["scale"] = Scale(**facts["scale"])
        if facts.get("template"):
            found["template"] = Template.from_dict(facts["template"])
            if settings.data.template is not None and settings.data.template not in (
                found["template"].name,
                found["template"].source,
            ):
                differs("data.template", settings.data.template, found["template"].name)
        if facts.get("prompt"):
            found["prompt"] = PromptTemplate(**facts["prompt"])
            given = settings.data
            if given.prompt and PromptTemplate(given.prompt, given.label_words) != found["prompt"]:
                differs("data.prompt", given.prompt, facts["prompt"])
        if faults:
            raise SettingsError(faults)
        return found


def on_its_base(settings: RunSettings, origin: Mapping[str, str]) -> RunSettings:
    """`settings` with the base that the adapter remembers, where none was asked for.

    Raises AdapterError where the folder holds no adapter that can be read.
    """
    if settings.start is None:
        return settings
    folder = start_folder(settings.start)
    facts = read_facts(folder)
    base = facts.get("base") or peft_base(folder)
    if origin.get("model.name", "default") != "default" or not base:
        return settings
    remembered = {"name": base, "revision": facts.get("revision"), "quantize": facts.get("quantize")}
    chosen = {name: value for name, value in remembered.items() if origin.get(f"model.{name}", "default") == "default"}
    return settings.model_copy(update={"model": settings.model.model_copy(update=chosen)})


def start_of(settings: RunSettings, origin: Mapping[str, str], twin: Callable[[], nn.Module]) -> Start | None:
    """The adapter that the run starts from, if it does; `twin` gives the base without values, for folders of PEFT's.

    Raises AdapterError with what is wrong with the folder.
    """
    if settings.start is None:
        return None
    folder = start_folder(settings.start)
    asked = origin.get("method", "default") != "default"
    return Start(folder, read_facts(folder), stored_method(folder, twin), kept=asked)


def attach_start(model: nn.Module, start: Start, method: Method, attach_new: Callable[[Method], Adapter]) -> Adapter:
    """The adapter with its stored values as "default", and what `method` has beyond it, as `attach_new` makes that.

    Raises AdapterError where it belongs to another base (A213), and where both would change the same thing in the same
    words (U149).
    """
    old = load_adapter(model, start.folder, name="default", trainable=True)
    further = method.parts[len(start.method.parts) :]
    if not further:
        return old
    state = {name: tensor.clone() for name, tensor in old.state().items()}
    stored = old.method
    old.detach()
    new = attach_new(functools.reduce(operator.add, further))
    fresh = {name: tensor.clone() for name, tensor in new.state().items()}
    new.detach()
    if twice := sorted(state.keys() & fresh.keys()):
        raise start.alike(new.method, f"two parts have a {twice[0]} ({len(twice)} names twice)")
    adapter = attach(model, stored + new.method, name="default", state={**state, **fresh})
    for part in adapter.parts if start.kept else ():
        if any(part.method is kind for kind in stored.parts):
            part.delta.requires_grad_(False)
    return adapter
