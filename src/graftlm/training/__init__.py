"""The run: from settings to a trained, scored and saved adapter, on a subclass of transformers' Trainer."""

from graftlm.training.evaluating import evaluate
from graftlm.training.exporting import export
from graftlm.training.opening import Opened, open_adapter
from graftlm.training.run import Run, train, train_resolved
from graftlm.training.trainer import GraftTrainer

__all__ = ["GraftTrainer", "Opened", "Run", "evaluate", "export", "open_adapter", "train", "train_resolved"]
