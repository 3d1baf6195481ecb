"""What frozen blocks make of rows, kept between passes: whether a run can have it, told before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from graftlm.core import Method
from graftlm.data import Prepared
from graftlm.data.collating import length_of
from graftlm.data.prepare import ONLINE
from graftlm.errors import Finding, GraftError, SettingsError
from graftlm.kernels import bottom_of
from graftlm.planning.step import attached, meta_model
from graftlm.settings import RunSettings
from graftlm.training.decisions import decide_epochs

__all__ = ["check_bottom", "kept_bytes"]


def check_bottom(settings: RunSettings, prepared: Prepared, method: Method, config: Any, folder: Path) -> None:
    """Raise SettingsError (U171, U172) where `train.cache_bottom` could keep nothing, or has no room for it."""
    train = settings.train
    faults = []
    rows = len(prepared.train)
    passes = train.epochs or decide_epochs(rows)
    if train.steps is not None:
        passes = train.steps * train.batch / max(rows, 1)
    why = ""
    if prepared.task in (*ONLINE, "mlm") or prepared.stream is not None:
        why = "no row is read twice"
    elif passes <= 1:
        why = "the run is one pass"
    if why:
        faults.append(_refusal(f"nothing can be kept between passes: {why}"))
    try:
        model = meta_model(config, prepared.task, torch.float32)
        attached(model, method)
        bottom_of(model)
    except GraftError as error:
        faults += error.findings
    except (ValueError, TypeError, RuntimeError, NotImplementedError):  # a base that does not run without values
        pass
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    wanted, room = kept_bytes(prepared, config), shutil.disk_usage(there).free
    if not why and wanted > 0.9 * room:
        message = f"results of frozen blocks would take {wanted / 1e9:.3g} GB on disk, {room / 1e9:.3g} GB are free"
        faults.append(Finding("U172", message, fix="another -o, or without train.cache_bottom"))
    if faults:
        raise SettingsError(faults)


def kept_bytes(prepared: Prepared, config: Any) -> int:
    """Bytes that one block's results of all rows take in float32."""
    several = len(prepared.train[0].get("sequences", [None])) if prepared.train else 0
    return 4 * several * sum(map(length_of, prepared.train)) * int(config.get_text_config().hidden_size)


def _refusal(message: str) -> Finding:
    return Finding("U171", message, fix="without train.cache_bottom")
