"""Placing: which device, or the disk, holds which part of a base, in the words of accelerate and transformers."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graftlm.errors import Finding, ModelError, nearest

__all__ = ["STRATEGIES", "Placing"]

#: Ways to fill the devices, as accelerate names them.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


class Placing:
    """Where the parts of a base go: `options` for transformers' loader, and what is to be seen to afterwards.

    `device_map` is one of `STRATEGIES`, a device for all, or a mapping of module paths to devices and "disk";
    `max_memory` is the most that each device ("cpu", or the number of a GPU) holds, in bytes or as "10GiB";
    `offload_folder` is where weights on disk lie that cannot be read from the checkpoint as they are (packed ones,
    experts); without one a folder that lasts as long as the model. Raises ModelError with everything that is wrong.

    Example:
        >>> Placing("auto", {"cpu": "2GiB", "0": "10GiB"}).options["max_memory"]
        {'cpu': '2GiB', 0: '10GiB'}
    """

    def __init__(
        self,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | Path | None = None,
        *,
        device: Any = None,
    ) -> None:
        faults = _faults_of(device_map, max_memory, device)
        if offload_folder is not None and device_map is None:
            faults.append(Finding("M119", "offload_folder does nothing without device_map", fix="device_map=auto"))
        if faults:
            raise ModelError(faults)
        self.options: dict[str, Any] = {}
        self._own: str | None = None
        if device_map is not None:
            self.options["device_map"] = dict(device_map) if isinstance(device_map, Mapping) else device_map
            self.options["offload_folder"] = None if offload_folder is None else str(offload_folder)
        if max_memory:
            self.options["max_memory"] = {_as_device(key): value for key, value in max_memory.items()}

    def __enter__(self) -> Placing:
        """For the time of loading: with a folder for what is put on disk, which goes again where loading fails."""
        if self.options and self.options["offload_folder"] is None:
            self._own = self.options["offload_folder"] = tempfile.mkdtemp(prefix="graftlm-")
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None and self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def settle(self, model: Any, name: str) -> None:
        """See that the loaded model can be run; a folder made for it lasts as long as it. Raises ModelError."""
        if model.device.type == "meta":
            message = (
                f"nothing of {name} fits into max_memory: its embeddings would be on disk, and a call starts there"
            )
            raise ModelError(Finding("M120", message, fix="a larger max_memory"))
        if self._own is not None:
            weakref.finalize(model, shutil.rmtree, self._own, True)


def _faults_of(device_map: Any, max_memory: Any, device: Any) -> list[Finding]:
    faults = []
    if device_map is not None and device is not None:
        faults.append(Finding("M119", "device and device_map are both given", fix="leave out device"))
    places = device_map.values() if isinstance(device_map, Mapping) else [] if device_map is None else [device_map]
    known = ("disk",) if isinstance(device_map, Mapping) else STRATEGIES
    for place in dict.fromkeys(places):
        if place not in known and not _is_device(place):
            close = nearest(str(place), [*known, "cpu", "cuda:0"])
            message = f"device_map: {place!r} is none of {', '.join(known)} and no device"
            faults.append(Finding("M119", message, fix=f"device_map={close[0]}" if close else "device_map=auto"))
    if max_memory and device_map is None:
        faults.append(Finding("M119", "max_memory does nothing without device_map", fix="device_map=auto"))
    for key, size in (max_memory or {}).items():
        if not _is_device(_as_device(key)):
            message = f"max_memory: {key!r} is no device: want cpu, or the number of a GPU"
            faults.append(Finding("M119", message, fix=f"cpu={size}"))
        if not _is_size(size):
            message = f"max_memory of {key}: {size!r} is no size"
            faults.append(Finding("M119", message, fix=f"{key}=10GiB"))
    return faults


def _as_device(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _is_device(place: Any) -> bool:
    try:
        torch.device(place)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_size(size: Any) -> bool:
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(size)) > 0
    except (ValueError, TypeError, AttributeError):
        return False
