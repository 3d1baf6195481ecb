"""How long a training still takes, told from what its steps, evaluations and checkpoints have taken so far.

    seconds = steps left x (a + b x tokens of a step) + evaluations left x one's seconds + checkpoints left x one's

`a` and `b` are a line through the steps so far (least squares), or their share a token where steps are alike or few.
Tokens are those that are computed, padding too. Steps to come have the tokens of batches drawn at random from the rows,
so that a beginning of short or of long batches does not mislead. An evaluation that has not been seen yet takes as much
as the forward part of so many tokens of steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Remaining", "tokens_of_steps"]

_MULTIPLE = 8  # what the collator rounds the length of a batch up to
_DRAWN_STEPS = 400
_FORWARD_SHARE = 0.4  # of a step, where base weights have no gradient: between a third and a half
_LEAST_STEPS, _LEAST_SPREAD = 8, 0.05
_FADE = 0.995  # of what a step counts, with each that comes after it: machines get slower and faster


def tokens_of_steps(lengths: Sequence[int], rows: int, parts: int) -> float:
    """The mean tokens of a step of `parts` batches of `rows` rows of such `lengths`, drawn at random and padded.

    The last step of an epoch has what is left.

    Example:
        >>> tokens_of_steps([12] * 9, rows=4, parts=2)
        72.0
    """
    drawn = random.Random(0)
    steps = tokens = 0
    while steps < _DRAWN_STEPS:
        order = drawn.sample(lengths, min(len(lengths), _DRAWN_STEPS * rows * parts))
        for batch in (order[at : at + rows] for at in range(0, len(order), rows)):
            tokens += len(batch) * -(-max(batch) // _MULTIPLE) * _MULTIPLE
        steps += -(-len(order) // (rows * parts))
    return tokens / steps


@dataclass
class _Sums:
    """Faded sums over steps: how many, tokens, seconds, and their products."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        new = (1.0, x, y, x * x, x * y)
        self.n, self.x, self.y, self.xx, self.xy = (
            _FADE * old + each for old, each in zip((self.n, self.x, self.y, self.xx, self.xy), new, strict=True)
        )

    def line(self) -> tuple[float, float]:
        """Seconds a step and seconds a token; one of them is 0 where a line would have a negative part."""
        if not self.x:  # tokens are not known
            return self.y / self.n, 0.0
        mean, spread = self.x / self.n, self.xx / self.n - (self.x / self.n) ** 2
        if self.n < _LEAST_STEPS or spread < (_LEAST_SPREAD * mean) ** 2:
            return 0.0, self.y / self.x
        slope = (self.xy / self.n - mean * self.y / self.n) / spread
        slope = min(max(slope, 0.0), self.y / self.x)
        return self.y / self.n - slope * mean, slope


@dataclass
class Remaining:
    """What is left of a training; told of each step, evaluation and checkpoint as it is done.

    `step_tokens` are the tokens of a step to come in the mean (0: as of those so far), `evaluation_tokens` those of an
    evaluation.

    Example:
        >>> left = Remaining(step_tokens=100, evaluation_tokens=0)
        >>> for tokens in (100, 50, 150):
        ...     left.step(tokens, tokens / 100)
        >>> left.seconds(steps=7)
        7.0
    """

    step_tokens: float = 0.0
    evaluation_tokens: float = 0.0
    _sums: _Sums = field(default_factory=_Sums)
    _first: tuple[float, float] | None = None
    _pauses: dict[str, list[float]] = field(default_factory=lambda: {"evaluation": [], "checkpoint": []})

    def step(self, tokens: float, seconds: float) -> None:
        """A step of so many tokens is done. The first is left out later: what is made then is made once."""
        if self._first is None:
            self._first = (tokens, seconds)
        else:
            self._sums.add(tokens, seconds)

    def pause(self, what: str, seconds: float) -> None:
        """An `evaluation` or a `checkpoint` is done."""
        self._pauses[what].append(seconds)

    def seconds(self, steps: int, evaluations: int = 0, checkpoints: int = 0) -> float:
        """What so many steps, evaluations and checkpoints will take; 0 where no step is done yet."""
        if self._first is None:
            return 0.0
        sums = self._sums
        if not sums.n:
            sums = _Sums()
            sums.add(*self._first)
        each_s, token_s = sums.line()
        step_s = each_s + token_s * (self.step_tokens or sums.x / sums.n)
        judged, written = self._pauses["evaluation"], self._pauses["checkpoint"]
        rate = token_s + each_s * sums.n / sums.x if sums.x else 0.0
        evaluation_s = sum(judged) / len(judged) if judged else _FORWARD_SHARE * self.evaluation_tokens * rate
        checkpoint_s = sum(written) / len(written) if written else 0.0
        return steps * step_s + evaluations * evaluation_s + checkpoints * checkpoint_s
