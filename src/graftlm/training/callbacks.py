"""What a run adds to the trainer's loop: stopping on Ctrl-C."""

from __future__ import annotations

import signal
import time
from typing import Any

from transformers import TrainerCallback

from graftlm.data import MaskingCollator
from graftlm.training.processes import any_of, count
from graftlm.training.progress import Voice

__all__ = ["Interrupt", "OtherTokensEachEpoch"]


_ONE_CTRL_C_S = 5.0


class Interrupt(TrainerCallback):
    """Ctrl-C once: stop after this step, save, evaluate and report; twice: stop at once."""

    def __init__(self, voice: Voice) -> None:
        self.voice, self.asked = voice, False
        self._before: Any = None
        self._asked_s = 0.0

    def __enter__(self) -> Interrupt:
        try:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:  # not in the main thread: the caller's own handling stays
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: Any) -> None:
        again_s = time.monotonic() - self._asked_s
        # The terminal tells each of several processes, and torchrun tells them again.
        if self.asked and count() > 1 and again_s < _ONE_CTRL_C_S:
            return
        self._asked_s = time.monotonic()
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.voice.say("stopping", "after this step: the adapter is saved and scored. Ctrl-C again stops at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the trainer to save and stop."""
        del args, state
        if any_of(self.asked):
            self.asked = True
            control.should_save = control.should_training_stop = True


class OtherTokensEachEpoch(TrainerCallback):
    """Hide other tokens in each pass over the data; they follow from the pass, so that resuming changes nothing."""

    def __init__(self, collate: MaskingCollator) -> None:
        self.collate = collate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the collator which pass it is."""
        del args, control
        self.collate.epoch = int(state.epoch or 0)
