"""Sources: where the weight behind some codes lies, so that it can be read once more, one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftlm.errors import Finding, ModelError

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """A tensor in a safetensors file: the path of the file, and the tensor's name in it."""

    file: str
    key: str

    def read(self) -> Tensor:
        """The tensor, as it stands in the file. Raises ModelError where it is not there any more."""
        try:
            # Read, not mapped: pages of a mapped file count as the process's own until something else needs them.
            with safe_open(self.file, framework="pt", backend="pread") as file:
                found: Tensor = file.get_tensor(self.key)
        except (OSError, SafetensorError) as error:
            message = f"the weight {self.key} that was packed cannot be read again: {error}"
            raise ModelError(Finding("Q110", message, self.file, fix="load the base again")) from error
        return found

    def check(self, same: Tensor, held: Tensor) -> None:
        """Raise ModelError where the codes `held` are not those (`same`) that the file's weight has now.

        One in a thousand may differ: devices round in their own ways.
        """
        if same.shape != held.shape or (same != held.to(same.device)).float().mean(dtype=torch.float64) > 1e-3:
            message = f"{self.key} is not the weight that was packed: the file changed since the base was loaded"
            raise ModelError(Finding("Q110", message, self.file, fix="load the base again"))
