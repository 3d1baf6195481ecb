"""What a run says while it goes: a live line on a terminal, plain lines elsewhere, metrics to a file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from graftlm.training.remaining import Remaining

if TYPE_CHECKING:
    from graftlm.training.trainer import GraftTrainer

__all__ = ["Progress", "Voice", "clock"]

_PLAIN_EVERY_S = 20.0


def clock(seconds: float) -> str:
    """Seconds as `8:40` or `1:02:03`.

    Example:
        >>> clock(520)
        '8:40'
    """
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Voice:
    """Says lines to the person who runs it, and keeps them in the run's log."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._log: Path | None = None
        self._kept: list[str] = []

    def keep_in(self, log: Path) -> None:
        """Write every line said so far and from now on to `log` too."""
        self._log = log
        with log.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self._kept)
        self._kept = []

    def say(self, subject: str, text: str) -> None:
        """One line: a subject of at most eight letters, then the text."""
        for at, part in enumerate(text.splitlines() or [""]):
            head = subject if at == 0 else ""
            self.console.print(f"[bold]{head:<9}[/bold]", end="") if self.console.is_terminal else self.console.print(
                f"{head:<9}", end="", markup=False
            )
            self.console.print(part, markup=False)
            self.note(f"{head:<9}{part}")

    def note(self, line: str) -> None:
        """A line for the log only."""
        if self._log is None:
            self._kept.append(line)
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Progress(TrainerCallback):
    """Shows steps, losses, speed and the time left until the training ends; writes metrics.jsonl."""

    def __init__(self, voice: Voice, metrics: Path, unit: str, remaining: Remaining | None = None) -> None:
        self.voice, self.metrics, self.unit = voice, metrics, unit
        self.remaining = remaining or Remaining()
        #: The task's own measure, told beside the loss of evaluations.
        self.measure = "loss"
        self.trainer: GraftTrainer | None = None
        self._bar: Any = None
        self._task: Any = None
        self._began_s = self._said_s = self._mark_s = 0.0
        self._loss = self._best = self._eval = self._reward = self._own = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, and the bar on a terminal."""
        del args, control
        self._began_s = self._said_s = self._mark_s = time.monotonic()
        if self.voice.console.is_terminal and not self.voice.console.quiet:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("  {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}"),
                console=self.voice.console,
                transient=True,
            )
            self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, said="")
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Keep the numbers."""
        del args, control
        logs = logs or {}
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            self._loss = logs["loss"]
            self._best = min(self._loss, self._best) if self._best == self._best else self._loss
        self._reward = logs.get("reward", self._reward)
        if "eval_loss" in logs:
            self._eval = logs["eval_loss"]
        names: tuple[str, ...]
        names = ("loss", "penalty", "learning_rate", "grad_norm", "eval_loss", "reward", "answer_tokens", "eval_reward")
        own = f"eval_{self.measure}"
        if own not in names:
            names += (own,)
            self._own = logs.get(own, self._own)
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row |= {name: logs[name] for name in names if name in logs}
        if "loss" in logs:
            row |= {f"{self.unit}_per_s": round(self._rate(), 1), "seconds": round(time.monotonic() - self._began_s, 2)}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, or say a plain line when it is time."""
        del control
        self.remaining.step(self.trainer.step_tokens if self.trainer else 0, self._since())
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, said=self._line(args, state))
        elif self._mark_s - self._said_s > _PLAIN_EVERY_S:
            self._said_s = self._mark_s
            share = 100 * state.global_step / max(state.max_steps, 1)
            self.voice.say("", f"{state.global_step}/{state.max_steps}  {share:.0f} %  {self._line(args, state)}")
            sys.stdout.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """How long it took is known now."""
        del args, state, control
        self.remaining.pause("evaluation", self._since())

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """How long it took is known now."""
        del args, state, control
        self.remaining.pause("checkpoint", self._since())

    def _since(self) -> float:
        """The seconds since this was last asked, or since the training began."""
        before, self._mark_s = self._mark_s, time.monotonic()
        return self._mark_s - before

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away."""
        del args, state, control
        self.close()

    def close(self) -> None:
        """Take the bar away, also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _rate(self) -> float:
        return (self.trainer.counted if self.trainer else 0) / max(time.monotonic() - self._began_s, 1e-9)

    def _left_s(self, args: Any, state: Any) -> float:
        """What is left until the last step, its evaluation and its checkpoint are done."""
        step, steps = state.global_step, state.max_steps

        def due(every: int) -> int:
            """What is done every so many steps, and after the last one."""
            return -(-steps // every) - step // every if every else 0

        # At the end of this step both may be due: they are still to come.
        now = [0 if not every or step % every or not step else 1 for every in (args.eval_steps, args.save_steps)]
        return self.remaining.seconds(steps - step, due(args.eval_steps) + now[0], due(args.save_steps) + now[1])

    def _line(self, args: Any, state: Any) -> str:
        parts = [f"loss {self._loss:.3f} (best {self._best:.3f})"] if self._loss == self._loss else []
        if self._reward == self._reward:
            parts = [f"reward {self._reward:.3f}"]  # the loss of a step says nothing of how good answers are
        parts += [f"eval {self._eval:.3f}"] if self._eval == self._eval else []
        parts += [f"{self.measure} {self._own:.3f}"] if self._own == self._own else []
        return "  ".join(
            [
                *parts,
                f"{self._rate():,.0f} {self.unit}/s",
                f"ETA {clock(self._left_s(args, state))}",
            ]
        )
