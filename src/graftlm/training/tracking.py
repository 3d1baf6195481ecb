"""Trackers: where a run tells its numbers while it goes, TensorBoard or another that transformers' Trainer knows.

TensorBoard's files lie in the run's folder, `tensorboard/`. The others take their project, key and place from their own
environment variables, as with any Trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlm.errors import Finding, SettingsError

__all__ = ["need_tracker", "tensorboard_callback"]

#: Trackers that are installed under another name than their own.
_PACKAGES = {"tensorboard": "graftlm[track]", "comet_ml": "comet-ml"}


def need_tracker(name: str | None) -> None:
    """Raise SettingsError (U147) where what the tracker `name` needs is not installed."""
    if name is None:
        return
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    if name not in get_available_reporting_integrations():  # type: ignore[no-untyped-call]
        message = f"--track {name}: it is not installed"
        raise SettingsError(Finding("U147", message, fix=f"pip install '{_PACKAGES.get(name, name)}'"))


def tensorboard_callback(folder: Path) -> Any:
    """The Trainer's callback for TensorBoard that writes into `folder`."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))  # type: ignore[no-untyped-call]
