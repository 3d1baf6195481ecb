"""Optimizers: what a run can be told to train with, what transformers calls it, and where it runs.

All are AdamW (Loshchilov and Hutter 2019). `adamw_8bit` holds its two moments in 8 bits with a size for each 256 of
them (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"; tensors below 4,096 numbers stay in
float32), the `paged_` ones let them move to the processor's memory where a GPU's is short (Dettmers et al. 2023,
"QLoRA", section 3).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from graftlm.errors import EnvironmentFault, Finding

__all__ = ["check_optimizer", "named_for_trainer"]

#: Ours to the name in transformers; without one, the Trainer's own choice.
_NAMES = {
    "adamw": None,
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def named_for_trainer(optimizer: str) -> dict[str, Any]:
    """The argument that transformers' Trainer takes for it.

    Example:
        >>> named_for_trainer("adamw"), named_for_trainer("adamw_8bit")
        ({}, {'optim': 'adamw_8bit'})
    """
    name = _NAMES[optimizer]
    return {} if name is None else {"optim": name}


def check_optimizer(optimizer: str) -> None:
    """Raise EnvironmentFault where this machine has not what `optimizer` needs."""
    faults = []
    if optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        message = f"train.optimizer {optimizer} is of bitsandbytes, which is not installed"
        faults.append(Finding("E106", message, fix="pip install 'graftlm[quantised]'"))
    if optimizer.startswith("paged_") and not torch.cuda.is_available():
        message = f"train.optimizer {optimizer} moves its memory between a GPU and the processor, and there is no GPU"
        plain = optimizer.removeprefix("paged_")
        faults.append(Finding("E107", message, fix=f"--set train.optimizer={plain}"))
    if faults:
        raise EnvironmentFault(faults)
