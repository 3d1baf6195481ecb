"""Masked language modelling: hidden tokens are told from those around them.

Devlin et al. 2019, "BERT", section 3.1: 15 % of the tokens, of these 80 % masked, 10 % random, 10 % as they were;
which ones is decided where batches are made (`graftlm.data.collating`).
"""

from __future__ import annotations

from graftlm.objectives.token_labels import TokenLabels

__all__ = ["MaskedLM"]


class MaskedLM(TokenLabels):
    """Cross-entropy of the hidden tokens; labels [rows, tokens] are the tokens that were there, -100 elsewhere.

    Example:
        >>> import torch
        >>> MaskedLM().count({"labels": torch.tensor([[-100, 7, -100, 9]])})
        2
    """
