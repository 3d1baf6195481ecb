"""The verdict on a run: its score against the baselines, and whether the difference may be noise.

Two scores are called different only when their 95 % intervals do not overlap. That is stricter than a paired test, so
it errs on the side of calling a gain unproven.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .folder import RunFolder, finite
from .wording import counted, measured, whole

__all__ = ["Score", "Verdict", "judge", "scores"]


@dataclass(frozen=True)
class Score:
    """One line of the comparison: `value` is that of the run's measure, such as macro-F1 or loss."""

    name: str
    title: str
    value: float
    low: float | None
    high: float | None
    second: float | None
    """The measure told beside it, such as accuracy or perplexity."""

    @property
    def interval(self) -> str:
        """The interval, empty without one."""
        return "" if self.low is None or self.high is None else f"{measured(self.low)} to {measured(self.high)}"

    @property
    def second_text(self) -> str:
        """Three decimals up to 1, about three digits above."""
        value = self.second
        return measured(value) if value is None or value <= 1 or value >= 10 else f"{value:.2f}"

    @property
    def text(self) -> str:
        """The value with its interval in parentheses."""
        return measured(self.value) + (f" ({self.interval})" if self.interval else "")


@dataclass(frozen=True)
class Verdict:
    """`headline` in a few words, `sentence` with the numbers, `caution` on chance and on the state of the run."""

    kind: Literal["better", "unclear", "worse", "unknown"]
    headline: str
    sentence: str
    caution: str


def scores(run: RunFolder) -> list[Score]:
    """The scores in run.json that have a value, in the order of the file."""
    key, second = run.measure["key"], run.second["key"]
    found = []
    for row in run.rows("results.scores"):
        value = finite(row.get(key))
        if value is None:
            continue
        low, high = finite(row.get(f"{key}_low")), finite(row.get(f"{key}_high"))
        if low is None or high is None:
            low = high = None
        name = str(row.get("name") or "")
        title = " ".join(str(row.get("title") or name).split())
        found.append(Score(name, title, value, low, high, finite(row.get(second))))
    return found


def judge(run: RunFolder) -> Verdict:
    """The tuned model against the strongest baseline, and against the untuned base where that is another one."""
    found = scores(run)
    tuned = next((score for score in found if score.name == "tuned"), None)
    rivals = [score for score in found if score is not tuned]
    state = _state(run)
    if tuned is None:
        return Verdict("unknown", "Not evaluated", "This run has no score of the tuned model.", state)
    more_is_better, measure = bool(run.measure["more_is_better"]), str(run.measure["title"])
    unit = f" {run.measure['unit']}" if run.measure["unit"] else ""
    first_interval = f" (95\u00a0% interval {tuned.interval})" if tuned.interval else ""
    sentence = f"{tuned.title}: {measure} {measured(tuned.value)}{first_interval}{unit}{_held_out(run)}"
    if not rivals:
        return Verdict("unknown", "No baseline to compare with", f"{sentence}.", state)

    best = (max if more_is_better else min)(rivals, key=lambda score: score.value)
    base = next((score for score in rivals if score.name in ("probe", "base")), best)
    sentence += f", against {base.text} for {base.title}"
    if best is not base:
        sentence += f" and {best.text} for {best.title}, the strongest baseline"
    if run.second["key"] == "perplexity" and tuned.second is not None and base.second is not None:
        sentence += f"; perplexity {tuned.second_text} instead of {base.second_text}"

    gain = tuned.value - best.value if more_is_better else best.value - tuned.value
    overlap = _overlap(tuned, best)
    if overlap is None:
        kind: Literal["better", "unclear", "worse"] = "unclear"
        headline = f"{'Ahead of' if gain > 0 else 'Not ahead of'} {best.title}, without intervals"
        caution = "There are no intervals, so it cannot be told whether the difference is noise."
    elif overlap:
        kind, headline = "unclear", f"No clear {'gain over' if gain > 0 else 'difference from'} {best.title}"
        caution = f"The intervals of {tuned.title} and {best.title} overlap, so the difference may be noise."
        if best is not base and _overlap(tuned, base) is False and _is_better(tuned, base, more_is_better):
            caution += f" Against {base.title} they do not overlap."
    else:
        kind, headline = ("better", f"Better than {best.title}") if gain > 0 else ("worse", f"Worse than {best.title}")
        caution = "The intervals do not overlap: a difference of this size is unlikely to be noise."
    return Verdict(kind, headline, f"{sentence}.", " ".join(filter(None, (caution, state))))


def _is_better(one: Score, other: Score, more_is_better: bool) -> bool:
    return one.value > other.value if more_is_better else one.value < other.value


def _overlap(one: Score, other: Score) -> bool | None:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.low <= other.high and other.low <= one.high


def _held_out(run: RunFolder) -> str:
    rows: Any = run.number("results.eval_rows")
    tokens = run.number("results.eval_tokens")
    if rows is None:
        return " on rows kept out of training"
    more = f" ({whole(tokens)}\u00a0tokens)" if tokens is not None else ""
    return f" on {counted(rows, 'row')}{more} kept out of training"


def _state(run: RunFolder) -> str:
    steps = run.number("steps")
    after = f" after {counted(steps, 'step')}" if steps is not None else ""
    return {
        "stopped": f"The run was stopped{after}, before its end.",
        "failed": f"The run failed{after}; what is here was written before that.",
        "running": "The run had not finished when this was written.",
    }.get(run.text("status"), "")
