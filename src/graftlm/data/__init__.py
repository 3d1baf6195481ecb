"""The room that turns a user's file into checked rows, splits and batches.

The way through it: `reading` (file to rows) > `prompting` (rows to questions, where that is asked for) > `recognise`
(which column is what) > `checking` (every fault at once) > `splitting` > `templates` and `tokenising` (token ids and
what is trained) > `collating` (batches); `prepare` walks it in one call. Only `collating` imports torch, so collators
are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftlm.data.labels import Labels, Scale
from graftlm.data.prepare import Prepared, look, prepare  # the function, which hides the module of its name
from graftlm.data.prompting import PromptTemplate
from graftlm.data.templates import Template

if TYPE_CHECKING:
    from graftlm.data.collating import Collator, MaskingCollator, SequencesCollator, TargetsCollator

__all__ = [
    "Collator", "Labels", "MaskingCollator", "Prepared", "PromptTemplate", "Scale", "SequencesCollator",
    "TargetsCollator", "Template", "look", "prepare",
]  # fmt: skip

_COLLATORS = ("Collator", "MaskingCollator", "SequencesCollator", "TargetsCollator")


def __getattr__(name: str) -> Any:
    if name not in _COLLATORS:
        raise AttributeError(f"module 'graftlm.data' has no attribute {name!r}")
    from graftlm.data import collating

    return getattr(collating, name)
