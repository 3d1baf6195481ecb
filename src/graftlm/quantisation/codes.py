"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "Q101": "a quantisation is asked for that does not exist",
    "Q102": "blocks of an odd number of entries, or of none, are asked for",
    "Q103": "a model with adapters attached is to be quantised",
    "Q104": "the model has no dense linear maps in its blocks that could be quantised",
    "Q105": "a model without values is to be quantised",
    "Q107": "a plain copy is wanted of a model that is partly on disk",
    "Q108": "an adapter is to be merged into a copy, and none of that name is attached",
    "Q109": "a merged copy is to be packed again, and no format is named or known",
    "Q110": "the weight behind some codes is to be read once more, and its file has gone or changed",
}
"""Code to meaning."""
