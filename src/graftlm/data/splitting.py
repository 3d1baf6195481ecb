"""Divides rows into train and eval: the same way each time, each label on both sides, a text on one side only."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence

__all__ = ["default_share", "split", "split_document"]

_FEW_ROWS = 2000


def default_share(rows: int) -> float:
    """The share of rows for eval when nobody said: 20 %, above 2 000 rows 5 %.

    Example:
        >>> default_share(500), default_share(12_000)
        (0.2, 0.05)
    """
    return 0.2 if rows <= _FEW_ROWS else 0.05


def split(
    rows: Sequence[str], labels: Sequence[Hashable] | None = None, *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of train and eval rows, both ascending.

    Equal rows stay together. With labels, each label gets its share of eval rows (largest remainder), and keeps at
    least one row in train. Which rows go is decided by a hash of seed and row, so a row mostly keeps its side when
    others are added to the file.

    Args:
        rows: one text for each row; equal texts are duplicates.
        labels: one label for each row, or None.
        share: of rows for eval, in [0, 1).
        seed: another seed, another split.

    Example:
        >>> split(["a", "b", "c", "d", "a"], share=0.2, seed=0)
        ([0, 1, 2, 4], [3])
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}, wanted at least 0 and below 1")
    groups: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        groups[row].append(at)
    strata: dict[Hashable, list[list[int]]] = defaultdict(list)
    for row in sorted(groups, key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest()):
        members = groups[row]
        strata[labels[members[0]] if labels is not None else None].append(members)
    sizes = {label: sum(map(len, members)) for label, members in strata.items()}
    chosen: list[int] = []
    at_least = 1 if share > 0 and len(groups) > 1 else 0
    for label, wanted in _apportioned(sizes, max(round(share * len(rows)), at_least)).items():
        for members in strata[label]:
            if 0 < len(members) <= min(wanted, sizes[label] - 1):
                chosen += members
                wanted -= len(members)
                sizes[label] -= len(members)
    inside = set(chosen)
    return [at for at in range(len(rows)) if at not in inside], sorted(chosen)


def _apportioned(sizes: dict[Hashable, int], total: int) -> dict[Hashable, int]:
    """`total` places over labels in proportion to their sizes, by largest remainder; a label of one row gets none."""
    rows = sum(sizes.values())
    exact = {label: total * size / rows for label, size in sizes.items()}
    places = {label: int(share) for label, share in exact.items()}
    order = sorted(sizes, key=lambda label: (places[label] - exact[label], -sizes[label], str(label)))
    for label in order:
        if sum(places.values()) < total and sizes[label] > 1:
            places[label] += 1
    return places


def split_document(text: str, share: float) -> tuple[str, str]:
    """One long text in two: the last `share` of it, from a paragraph (or line) boundary on, is for eval.

    Example:
        >>> split_document("One.\\n\\nTwo.\\n\\nThree.\\n\\nFour.", 0.2)
        ('One.\\n\\nTwo.\\n\\nThree.\\n\\n', 'Four.')
    """
    target = len(text) - round(share * len(text))
    for boundary in ("\n\n", "\n", " "):
        before, after = text.rfind(boundary, 0, target), text.find(boundary, target)
        cuts = [at + len(boundary) for at in (before, after) if at >= 0]
        near = [at for at in cuts if text[:at].strip() and text[at:].strip()]
        if near:
            at = min(near, key=lambda cut: abs(cut - target))
            return text[:at], text[at:]
    return text, ""
