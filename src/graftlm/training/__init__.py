"""The run: from settings to a trained, scored and saved adapter, on a subclass of transformers' Trainer.

What is looked at before a run (`early` and `folder`) does without torch, so the rest is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftlm.training.evaluating import evaluate, evaluate_harness
    from graftlm.training.exporting import export
    from graftlm.training.opening import Opened, open_adapter
    from graftlm.training.run import Run, train, train_resolved
    from graftlm.training.trainer import GraftTrainer

__all__ = [
    "GraftTrainer",
    "Opened",
    "Run",
    "evaluate",
    "evaluate_harness",
    "export",
    "open_adapter",
    "train",
    "train_resolved",
]

_HOME_OF = {
    "GraftTrainer": "trainer", "Opened": "opening", "evaluate": "evaluating", "evaluate_harness": "evaluating",
    "export": "exporting",
    "open_adapter": "opening",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graftlm.training' has no attribute {name!r}")
    return getattr(import_module(f"graftlm.training.{_HOME_OF.get(name, 'run')}"), name)
