"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "A130": "an ensemble is asked to combine its members in a way that there is not",
    "A131": "an ensemble was given no adapters",
    "A132": "the weights of an ensemble are not one number from 0 for each of its members",
    "A133": "an ensemble was given a batch without token ids or embeddings",
    "D195": "a task of the evaluation harness is not there, or cannot be loaded",
    "E130": "the libraries that score written answers are not installed",
    "E132": "the evaluation harness is not installed",
}
"""Code to meaning."""
