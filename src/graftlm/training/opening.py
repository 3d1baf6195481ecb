"""Opening what a run left: a run folder, an adapter folder or a bare base, as a model that is ready for use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core import Adapter
from graftlm.data import Labels, PromptTemplate, Scale, Template
from graftlm.errors import AdapterError, Finding, RunError
from graftlm.formats import load_adapter, read_facts
from graftlm.models import load_base

__all__ = ["Opened", "open_adapter", "peft_base"]


@dataclass(frozen=True)
class Opened:
    """A base with (or without) an adapter, and what the adapter says of its own use."""

    model: Any
    tokenizer: Any
    adapter: Adapter | None
    facts: Mapping[str, Any]
    folder: Path | None
    task: str
    labels: Labels | None
    template: Template | None
    max_length: int | None
    #: Of adapters that tell numbers.
    scale: Scale | None = None
    #: Of adapters whose rows were written as questions.
    prompt: PromptTemplate | None = None
    #: The adapter that this one stands on, by its name on the model.
    beneath: str | None = None


def open_adapter(
    path: str | Path, *, base: str | None = None, dtype: str = "auto", device: str | None = None, **placing: Any
) -> Opened:
    """The model that `path` means: a run folder, an adapter folder, or a base model (folder, hub id or "bundled").

    `base` names the base model where it lies elsewhere than the adapter remembers; `placing` may be `device_map`,
    `max_memory` and `offload_folder`, which lay it out over devices and disk as in `load_base`. Raises RunError,
    AdapterError or ModelError with what is wrong.

    Example:
        >>> opened = open_adapter("runs/messages-1")        # doctest: +SKIP
    """
    folder = _adapter_folder(Path(path))
    if folder is None:
        model, tokenizer = load_base(base or str(path), dtype=dtype, device=device, **placing)
        chat = getattr(tokenizer, "chat_template", None) is not None
        return Opened(
            model, tokenizer, None, {}, None, "lm", None, Template.of(tokenizer, chat=True) if chat else None, None
        )
    facts = read_facts(folder)
    remembered = facts.get("base") or peft_base(folder)
    if base is None and not remembered:
        raise AdapterError(Finding("A120", f"{folder} does not say which base it belongs to", fix="--base MODEL"))
    labels = Labels.from_dict(facts["labels"]) if facts.get("labels") else None
    task = facts.get("task") or "lm"
    names = [labels.name(at) for at in range(len(labels))] if labels else None
    if task in ("classify", "tag") and names is None:
        raise AdapterError(Finding("A121", f"{folder} does not name its classes: it was not written by graftlm train"))
    model, tokenizer = load_base(
        base or str(remembered),
        task=task,
        labels=names,
        several=labels is not None and labels.several,
        dtype=dtype,
        device=device,
        quantize=facts.get("quantize"),
        revision=None if base else facts.get("revision"),
        **placing,
    )
    beneath = None
    if task in ("dpo", "kto") and (folder.parent / "start").is_dir():
        beneath = load_adapter(model, folder.parent / "start", name="start").name
    adapter = load_adapter(model, folder)
    stored = facts.get("template")
    template = Template.from_dict(stored) if stored else None
    if template is None and task in ("lm", "sft") and getattr(tokenizer, "chat_template", None):
        template = Template.of(tokenizer, chat=True)
    scale = Scale(**facts["scale"]) if facts.get("scale") else None
    asked = PromptTemplate(**facts["prompt"]) if facts.get("prompt") else None
    return Opened(
        model, tokenizer, adapter, facts, folder, task, labels, template, facts.get("max_length"), scale, asked, beneath
    )


def _adapter_folder(path: Path) -> Path | None:
    """The adapter in `path`, or None where `path` is no run and no adapter."""
    if (path / "run.json").is_file():
        if not (path / "adapter" / "adapter_config.json").is_file():
            raise RunError(
                Finding(
                    "U108", f"the run in {path} has no finished adapter yet", fix=f"graftlm train --resume -o {path}"
                )
            )
        return path / "adapter"
    return path if (path / "adapter_config.json").is_file() else None


def peft_base(folder: Path) -> str | None:
    """The base that a folder of PEFT's names."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
    return str(found) if found else None
