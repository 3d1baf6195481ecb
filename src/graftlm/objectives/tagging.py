"""Token classification: every word has a tag, told at its first token."""

from __future__ import annotations

from graftlm.objectives.token_labels import TokenLabels

__all__ = ["Tagging"]


class Tagging(TokenLabels):
    """Cross-entropy of each word's tag; labels [rows, tokens], -100 at all but the first token of a word.

    Example:
        >>> import torch
        >>> Tagging().count({"labels": torch.tensor([[-100, 0, -100, 2]])})
        2
    """
