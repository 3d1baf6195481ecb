"""Divides rows into train and eval: the same way each time, each label on both sides, a text on one side only."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
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
    rows: Sequence[str],
    labels: Sequence[Hashable] | None = None,
    *,
    share: float,
    seed: int,
    groups: Sequence[Hashable] | None = None,
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
        groups: one for each row, or None; rows of one group stay together (so do equal rows, whatever their group).
            Labels then have their share as far as whole groups allow, and shares may be missed by a group's size.

    Example:
        >>> split(["a", "b", "c", "d", "a"], share=0.2, seed=0)
        ([0, 1, 2, 4], [3])
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}, wanted at least 0 and below 1")
    if groups is not None:
        return _by_group(rows, labels, groups, share, seed)
    alike: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        alike[row].append(at)
    strata: dict[Hashable, list[list[int]]] = defaultdict(list)
    for row in sorted(alike, key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest()):
        members = alike[row]
        strata[labels[members[0]] if labels is not None else None].append(members)
    sizes = {label: sum(map(len, members)) for label, members in strata.items()}
    chosen: list[int] = []
    at_least = 1 if share > 0 and len(alike) > 1 else 0
    for label, wanted in _apportioned(sizes, max(round(share * len(rows)), at_least)).items():
        for members in strata[label]:
            if 0 < len(members) <= min(wanted, sizes[label] - 1):
                chosen += members
                wanted -= len(members)
                sizes[label] -= len(members)
    inside = set(chosen)
    return [at for at in range(len(rows)) if at not in inside], sorted(chosen)


def _by_group(
    rows: Sequence[str], labels: Sequence[Hashable] | None, groups: Sequence[Hashable], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """As `split`, with whole groups: first those that no label has too many rows of, then those that fit by number."""
    together = _joined(rows, groups)
    order = sorted(together, key=lambda at: hashlib.sha256(f"{seed}:{groups[at]}".encode()).digest())
    names = labels if labels is not None else [None] * len(rows)
    sizes = Counter(names)
    left = Counter(_apportioned(dict(sizes), max(round(share * len(rows)), 1))) if share > 0 else Counter()
    room = sum(left.values())
    chosen: list[int] = []
    for strict in (True, False):
        for first in order if len(order) > 1 else ():
            has = Counter(names[at] for at in together[first])
            fits = len(together[first]) <= room and all(n < sizes[name] for name, n in has.items())
            if first in chosen or not fits or (strict and any(n > left[name] for name, n in has.items())):
                continue
            chosen.append(first)
            room -= len(together[first])
            left.subtract(has)
            sizes.subtract(has)
    if not chosen and share > 0 and len(order) > 1:  # every group is larger than the share: the smallest
        chosen = [min(order, key=lambda first: len(together[first]))]
    held = sorted(at for first in chosen for at in together[first])
    inside = set(held)
    return [at for at in range(len(rows)) if at not in inside], held


def _joined(rows: Sequence[str], groups: Sequence[Hashable]) -> dict[int, list[int]]:
    """Rows that must stay on one side, by the first of them: equal rows, and rows of one group, and what these join."""
    leader = list(range(len(rows)))

    def find(at: int) -> int:
        while leader[at] != at:
            leader[at] = leader[leader[at]]
            at = leader[at]
        return at

    seen: dict[tuple[str, Hashable], int] = {}
    for at, pair in enumerate(zip(rows, groups, strict=True)):
        for key in (("row", pair[0]), ("group", pair[1])):
            one, other = find(seen.setdefault(key, at)), find(at)
            leader[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = defaultdict(list)
    for at in range(len(rows)):
        found[find(at)].append(at)
    return dict(found)


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
