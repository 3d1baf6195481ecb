"""What a run adds to the trainer's loop: stopping on Ctrl-C."""

from __future__ import annotations

import signal
from typing import Any

from transformers import TrainerCallback

from graftlm.data import MaskingCollator
from graftlm.training.progress import Voice

__all__ = ["Interrupt", "OtherTokensEachEpoch"]


class Interrupt(TrainerCallback):
    """Ctrl-C once: stop after this step, save, evaluate and report; twice: stop at once."""

    def __init__(self, voice: Voice) -> None:
        self.voice, self.asked = voice, False
        self._before: Any = None

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
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.voice.say("stopping", "after this step: the adapter is saved and scored. Ctrl-C again stops at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the trainer to save and stop."""
        del args, state
        if self.asked:
            control.should_save = control.should_training_stop = True


class OtherTokensEachEpoch(TrainerCallback):
    """Hide other tokens in each pass over the data; they follow from the pass, so that resuming changes nothing."""

    def __init__(self, collate: MaskingCollator) -> None:
        self.collate = collate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the collator which pass it is."""
        del args, control
        self.collate.epoch = int(state.epoch or 0)
