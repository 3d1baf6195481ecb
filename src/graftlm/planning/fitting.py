"""What fits into a machine's memory: the largest batch, length and rank, and the changes that make a run fit.

Every figure comes from the step itself, run without values (`graftlm.planning.step`). Memory grows with rows, tokens
and rank in nearly straight lines, so a few runs find a limit; the one that is told has been run, or, where it would be
long, lies on the line through two that were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from graftlm.core import Method
from graftlm.methods import Full, read_method
from graftlm.models.loading import generates
from graftlm.planning.memory import memory_bytes, said
from graftlm.planning.plan import Asked, Plan
from graftlm.planning.serving import cache_bytes

__all__ = ["Fitting", "Option", "fitting", "largest"]

#: Few-shot prompting is told with so many examples, or as many as the base's context holds.
_SHOTS = 32
#: Runs of more tokens than this are told from the line through two smaller ones.
_RUN_TOKENS = 8192
#: Fewer tokens than this say little of more.
_FEW_TOKENS = 512
_UNIT = 8  # what lengths of batches are multiples of
_MOST = {"batch": 65_536, "length": 1 << 20}
_SMALL = "lora(rank=8)"


@dataclass(frozen=True)
class Option:
    """One row of the table: what is changed, as flags to paste, and what the step then takes."""

    changes: str
    plan: Plan
    #: Of few-shot prompting: examples before each question; its `plan` is then of one answer, and nothing is trained.
    shots: int = 0

    @property
    def total_bytes(self) -> int:
        """The most memory that the process holds."""
        return self.plan.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        told = self.plan
        return {
            "changes": self.changes,
            "method": told.method,
            "dtype": str(told.shape.dtype).removeprefix("torch."),
            "quantize": told.shape.quantize,
            "recompute": told.shape.recompute,
            "accumulate": told.accumulate,
            "shots": self.shots,
            "total_bytes": self.total_bytes,
            "trainable": told.trainable,
            "flops": told.flops,
        }


@dataclass(frozen=True)
class Fitting:
    """What fits into `memory_bytes`; `print` shows the table.

    `asked` is the plan as it was asked for, `options` what else could be run, the cheapest change first. `largest` has
    the largest batch, length and rank that fit, each with all else as in `within` (what was asked for, or the first
    option that fits); it is empty where nothing fits.
    """

    memory_bytes: int
    asked: Plan
    options: tuple[Option, ...]
    within: Option | None
    largest: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether what was asked for fits."""
        return self.asked.fits(self.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "within": self.within.changes if self.within else None,
            "largest": dict(self.largest),
            "options": [
                option.to_dict() | {"fits": option.total_bytes <= self.memory_bytes} for option in self.options
            ],
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: change, memory, whether it fits, operations."""
        return [
            (
                option.changes or "as asked",
                said(option.total_bytes),
                "fits" if option.total_bytes <= self.memory_bytes else "no",
                f"{option.plan.flops / 1e12:,.3g} TFLOP" + (" an answer" if option.shots else ""),
            )
            for option in self.options
        ]

    def __str__(self) -> str:
        rows = self.rows()
        wide = max(len(row[0]) for row in rows)
        lines = [f"{'fits' if self.fits else 'does not fit'} into {said(self.memory_bytes)}"]
        lines += [f"  {what:<{wide}}  {size:>8}  {fits:<4}  {work}" for what, size, fits, work in rows]
        if self.within is not None and self.largest:
            each = ", ".join(f"{name} {value:,}" for name, value in self.largest.items())
            lines.append(f"largest that fits{' with ' + self.within.changes if self.within.changes else ''}: {each}")
        if self.within is None:
            lines.append("nothing of this fits: take a smaller base")
        return "\n".join(lines)


def fitting(step: Asked, memory: str | float, *, context: int | None = None) -> Fitting:
    """What of `step`, and of its cheaper forms, fits into `memory`; `context` is the most tokens that the base reads.

    First come changes that leave the result as it is (computing twice, a batch in parts), then numbers in 16 bits, the
    base in 4 bits, other methods; full fine-tuning and few-shot prompting for comparison. Raises as `graftlm.plan`.

    Example:
        >>> from graftlm.planning.plan import asked
        >>> found = fitting(asked("bundled", "lora(rank=8)", batch=16, length=128), "2GB")
        >>> found.fits, found.largest["batch"] > 16
        (True, True)
    """
    room = memory_bytes(memory)
    known: dict[Any, Plan] = {}

    def planned(one: Asked) -> Plan:
        key = (str(one.method), one.shape)
        if (found := known.get(key)) is None or found.accumulate != one.accumulate:
            found = known[key] = one.plan()
        return found

    context = context or _context(step.config)
    pairs = [(changes, one, planned(one)) for changes, one in _ladder(step, lambda one: planned(one).fits(room))]
    options = [Option(changes, plan) for changes, _, plan in pairs]
    options += _prompting(step, context)
    first = next((at for at, (_, _, plan) in enumerate(pairs) if plan.fits(room)), None)
    within = options[first] if first is not None else None
    found = _limits(pairs[first][1], planned, room, context) if first is not None else {}
    return Fitting(room, pairs[0][2], tuple(options), within, found)


def _ladder(step: Asked, fits: Callable[[Asked], bool]) -> Iterator[tuple[str, Asked]]:
    """The changes, the cheapest first."""
    shape, batch = step.shape, step.shape.rows * step.accumulate
    yield "", step
    best, flags = step, ""
    if shape.recompute == "none":
        yield "--set train.recompute=feedforward", _with(step, recompute="feedforward")
    parts = next((n for n in _divisors(batch) if n > step.accumulate and fits(_in_parts(step, n, batch))), batch)
    if parts > step.accumulate:
        best, flags = _in_parts(step, parts, batch), f"--set train.accumulate={parts}"
        yield flags, best
    if shape.recompute != "blocks":
        yield "--set train.recompute=blocks", _with(step, recompute="blocks")
        if parts > step.accumulate:
            best = _with(_in_parts(step, batch, batch), recompute="blocks")
            flags = f"--set train.recompute=blocks --set train.accumulate={batch}"
            yield flags, best
        else:
            best, flags = _with(step, recompute="blocks"), "--set train.recompute=blocks"
    if shape.dtype == torch.float32 and not shape.quantize:
        best, flags = _with(best, dtype=torch.bfloat16), f"--set model.dtype=bfloat16 {flags}".strip()
        yield flags, best
    whole = step.method is not None and any(isinstance(part, Full) for part in step.method.parts)
    small = read_method(_SMALL)
    if whole:
        yield f"--method {_SMALL!r}", replace(step, method=small)
        best, flags = replace(best, method=small), f"--method {_SMALL!r} {flags}".strip()
    if not shape.quantize:
        best, flags = _with(best, quantize="nf4"), f"--quantize nf4 {flags}".strip()
        yield flags, best
    for method in (_SMALL, "ia3", "full"):
        other = read_method(method)
        if str(other) != str(step.method) and not (whole and method == _SMALL):
            quantize = None if method == "full" else shape.quantize
            yield f"--method {method!r}", _with(replace(step, method=other), quantize=quantize)


def _prompting(step: Asked, context: int) -> list[Option]:
    """Examples before every question, answered by the untouched base: the weights, and keys and values of all of it."""
    shots = min(_SHOTS, context // step.shape.length - 1)
    if shots < 1 or not generates(step.config):
        return []
    length = (shots + 1) * step.shape.length
    shape = replace(step.shape, rows=1, length=length, labelled=1 / length, evaluation_rows=0, recompute="none")
    plan = replace(step, method=None, task="lm", shape=shape, accumulate=1).plan()
    kept = cache_bytes(step.config, shape)
    terms = {**plan.terms, "activations": plan.terms["activations"] + kept}
    flops = plan.traced.flops["evaluation"]
    return [Option(f"no training, {shots} examples in the prompt", replace(plan, terms=terms, flops=flops), shots)]


def _limits(step: Asked, planned: Callable[[Asked], Plan], room: int, context: int) -> dict[str, int]:
    shape, found = step.shape, {}

    def size(one: Asked) -> int:
        return planned(one).total_bytes

    few = max(1, _FEW_TOKENS // shape.length)
    rows = largest(
        lambda n: size(_with(step, rows=n)), room, few, shape.rows, _MOST["batch"], run=_RUN_TOKENS // shape.length
    )
    found["batch"] = rows * step.accumulate
    units = [max(1, length // _UNIT) for length in (shape.length // 2, shape.length, min(context, _MOST["length"]))]
    found["length"] = _UNIT * largest(
        lambda n: size(_with(step, length=_UNIT * n)), room, *units, run=_RUN_TOKENS // (_UNIT * shape.rows)
    )
    if any(each.name == "rank" for each in dataclasses.fields(step.method)):  # type: ignore[arg-type]
        widest = int(getattr(step.config.get_text_config(), "hidden_size", 4096))
        method: Any = step.method
        ranks = (method.rank, 2 * method.rank, widest)
        found["rank"] = largest(lambda n: size(replace(step, method=_of_rank(method, n))), room, *ranks)
    return found


def largest(size: Callable[[int], int], room: int, few: int, some: int, most: int, *, run: int = 1 << 60) -> int:
    """The largest n from 1 to `most`, within a fiftieth, for which `size(n)` is at most `room`; 0 where there is none.

    `size` grows with n in nearly a straight line, told from `few` and `some`. It is asked for no other n above `run`:
    there the line through the two largest tells.

    Example:
        >>> largest(lambda n: 100 + 7 * n, 1000, 4, 8, 10_000)
        128
    """
    few, some = min(few, most), min(some, most)
    some = some if some > few else min(2 * few, most)
    seen = {n: size(n) for n in {few, some}}
    if seen[few] > room and few > 1:
        seen[1] = size(1)
    while True:
        low = max((n for n, of in seen.items() if of <= room), default=0)
        high = min((n for n, of in seen.items() if of > room), default=most + 1)
        if not low or high - low <= 1 + low // 50:
            return low
        first, second = sorted(seen)[-2:] if high > most else (low, high)
        slope = (seen[second] - seen[first]) / (second - first) if second > first else 0
        guess = int(low + (room - seen[low]) / slope) if slope > 0 else most
        guess = min(max(guess, low + 1), high - 1)
        if guess > run:
            return guess
        seen[guess] = size(guess)


def _with(step: Asked, **changes: Any) -> Asked:
    return replace(step, shape=replace(step.shape, **changes))


def _in_parts(step: Asked, parts: int, batch: int) -> Asked:
    return replace(_with(step, rows=batch // parts), accumulate=parts)


def _of_rank(method: Any, rank: int) -> Method:
    found: Method = replace(method, rank=rank)
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _context(config: Any) -> int:
    """The most tokens that the base reads at once."""
    config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)
