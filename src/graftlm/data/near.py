"""Texts that are nearly the same: candidates by MinHash over runs of five characters, kept by their true likeness.

MinHash (Broder 1997) with banding: sets that share a share J of their runs agree in one hash with probability J, so two
texts with J = 0.8 meet in one of 16 bands of 4 hashes with probability 0.9998.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

__all__ = ["near_duplicates"]

_RUN = 5  # characters
_BANDS, _HASHES = 16, 4
_MOST_RUNS = 20_000  # of a text, from its beginning
_SEPARATORS = re.compile(r"[\W_]+")


def near_duplicates(texts: Sequence[str], *, least: float = 0.8) -> list[tuple[int, int]]:
    """For each text that is nearly an earlier one, the indices of the two; at most one pair for each later text.

    Compared are the sets of runs of five characters, without case, punctuation and the number of spaces; `least` is the
    share of all runs of two texts that both must have. A text that has occurred to the letter is not looked at again.

    Example:
        >>> near_duplicates(["Where is my parcel, please?", "Who are you?", "where is my  parcel please"])
        [(0, 2)]
    """
    draw = np.random.default_rng(0)
    factors = draw.integers(1, 2**63, size=(_BANDS * _HASHES, 1), dtype=np.uint64) | np.uint64(1)
    runs = [_runs(text) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    seen: set[str] = set()
    for at, here in enumerate(runs):
        if not len(here) or texts[at] in seen:
            continue
        seen.add(texts[at])
        mixed = here * factors
        signature = (mixed ^ (mixed >> np.uint64(29))).min(axis=1).reshape(_BANDS, _HASHES)
        for band in range(_BANDS):
            bucket = buckets[band, signature[band].tobytes()]
            for other in (bucket[0], bucket[-1]) if bucket and at not in found else ():
                if _likeness(here, runs[other]) >= least:
                    found[at] = other
                    break
            bucket.append(at)
    return [(other, at) for at, other in found.items()]


def _runs(text: str) -> np.ndarray:
    """One number for each run of characters of the text, each once, ascending; the whole text where it is shorter."""
    plain = _SEPARATORS.sub(" ", text.casefold()).strip()[:_MOST_RUNS]
    letters = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    width = min(_RUN, len(letters))
    number = np.zeros(len(letters) - width + 1 if width else 0, dtype=np.uint64)
    for at in range(width):
        number = number * np.uint64(0x9E3779B97F4A7C15) + letters[at : len(letters) - width + 1 + at]
    return np.unique(number ^ (number >> np.uint64(31)))


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard's: what both have of what either has."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
