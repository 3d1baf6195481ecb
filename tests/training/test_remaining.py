"""The time that is told to be left, at a tenth of a training, against what the rest then takes by the same clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm.training import progress as progress_module
from graftlm.training.progress import Progress
from graftlm.training.remaining import Remaining, tokens_of_steps

BATCH = 8


def lengths_of(kind: str, seed: int) -> list[int]:
    """Tokens of 400 rows."""
    drawn = random.Random(seed)
    of: dict[str, Callable[[], float]] = {
        "alike": lambda: 64,
        "uneven": lambda: drawn.lognormvariate(4, 0.8),
        "few long": lambda: 900 if drawn.random() < 0.02 else 40,
    }
    return [max(4, min(1024, int(of[kind]()))) for _ in range(400)]


def padded(lengths: list[int]) -> int:
    return len(lengths) * -(-max(lengths) // 8) * 8


class Clock:
    """Stands in for `time` where the progress looks at it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def at_a_tenth(
    monkeypatch: pytest.MonkeyPatch, folder: Path, lengths: list[int], *, epochs: int, eval_every: int, save_every: int,
    seed: int, step_s: Callable[[int], float], evaluation_s: float = 0.0, save_s: float = 0.0, evaluation_tokens: float = 0,
) -> tuple[float, float]:  # fmt: skip
    """What is told to be left after a tenth of the steps, and what they then took."""
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    drawn, batches = random.Random(seed), list[list[int]]()
    for _ in range(epochs):
        order = drawn.sample(lengths, len(lengths))
        batches += [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    steps = len(batches)
    voice: Any = SimpleNamespace(console=SimpleNamespace(is_terminal=False, quiet=True), say=lambda *_: None)
    left = Remaining(tokens_of_steps(lengths, BATCH, 1), evaluation_tokens)
    shown = Progress(voice, folder / "metrics.jsonl", "tokens", left)
    shown.trainer = SimpleNamespace(step_tokens=0, counted=0)  # type: ignore[assignment]
    args, state = (
        SimpleNamespace(eval_steps=eval_every, save_steps=save_every),
        SimpleNamespace(global_step=0, max_steps=steps),
    )
    shown.on_train_begin(args, state, None)
    told = asked_s = 0.0
    for step, batch in enumerate(batches, start=1):
        tokens = padded(batch)
        clock.now_s += step_s(tokens) + (5.0 if step == 1 else 0.0)  # what is made when it is first called
        state.global_step, shown.trainer.step_tokens = step, tokens
        shown.on_step_end(args, state, None)
        if step == steps // 10:
            told, asked_s = shown._left_s(args, state), clock.now_s
        if step % eval_every == 0 or step == steps:
            clock.now_s += evaluation_s
            shown.on_evaluate(args, state, None)
        if step % save_every == 0 or step == steps:
            clock.now_s += save_s
            shown.on_save(args, state, None)
    return told, clock.now_s - asked_s


def linear(tokens: int) -> float:
    return 0.04 + 2e-4 * tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["alike", "uneven", "few long"])
@pytest.mark.parametrize(("eval_every", "save_every"), [(50, 50), (7, 10), (1000, 1000)])
def test_at_a_tenth_the_rest_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, seed: int, eval_every: int, save_every: int
) -> None:
    """Evaluations cost as much as twenty steps and are seen early, late, or at the end only."""
    lengths = lengths_of(kind, seed)
    held = lengths
    told, took = at_a_tenth(
        monkeypatch, tmp_path, lengths, epochs=3, eval_every=eval_every, save_every=save_every, seed=seed,
        step_s=linear, evaluation_s=0.4 * linear(sum(held)), save_s=0.2, evaluation_tokens=sum(held),
    )  # fmt: skip
    assert told == pytest.approx(took, rel=0.15)


def test_a_step_of_few_tokens_costs_its_calls_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a token takes grows with the length where attention does, and a step has a price without tokens."""
    for step_s in (lambda _: 0.3, lambda tokens: 1e-4 * tokens + 5e-8 * tokens**2 / BATCH):
        told, took = at_a_tenth(
            monkeypatch, tmp_path, lengths_of("uneven", 1), epochs=3, eval_every=1000, save_every=1000, seed=1,
            step_s=step_s,
        )  # fmt: skip
        assert told == pytest.approx(took, rel=0.15)


def test_tokens_to_come_are_those_of_random_batches() -> None:
    lengths = lengths_of("uneven", 0)
    drawn, found = random.Random(1), list[int]()
    for _ in range(40):
        order = drawn.sample(lengths, len(lengths))
        found += [padded(order[at : at + BATCH]) for at in range(0, len(order), BATCH)]
    assert tokens_of_steps(lengths, BATCH, 1) == pytest.approx(sum(found) / len(found), rel=0.03)
    assert tokens_of_steps(lengths, BATCH // 2, 2) < tokens_of_steps(lengths, BATCH, 1)  # less padding


def test_nothing_is_told_before_the_first_step() -> None:
    left = Remaining()
    assert left.seconds(steps=10, evaluations=1) == 0.0
    left.step(0, 3.0)
    assert left.seconds(steps=10) == 30.0
    left.step(0, 1.0)
    assert left.seconds(steps=9) == 9.0


def test_a_machine_that_gets_slower_is_followed() -> None:
    left = Remaining()
    for _ in range(300):
        left.step(100, 1.0)
    for _ in range(700):
        left.step(100, 3.0)
    assert left.seconds(steps=100) > 285
