"""Rewards: what an answer that the model wrote is worth, by a check, by the user's own function, or by a reward model.

| `reinforcement.reward` | an answer is worth |
|---|---|
| `regex:PATTERN` | 1 where the pattern is found in it, else 0 |
| `match:COLUMN` | 1 where it is what the row has in that column, blanks at its ends aside, else 0 |
| `FILE.py:FUNCTION` | what `FUNCTION(prompt, answer, row)` returns, a number |
| `model:FOLDER` | what the reward model says that `--task reward` left in the folder of its run |

A function is code of the person who names it on the command line. An adapter never brings code: what it remembers of
its reward is told, and run again only where it is one of the checks.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.data import Collator
from graftlm.errors import Finding, GraftError, RunError
from graftlm.evaluation.losses import batches, evaluating
from graftlm.training.named_rewards import look_at_reward, wrong_reward

__all__ = ["Reward", "RewardModel", "checked", "read_reward", "worth"]

#: Prompt, answer and the row as it was read, to what the answer is worth.
Reward = Callable[[str, str, Mapping[str, Any]], float]


def read_reward(text: str | None, columns: Sequence[str] | None = None) -> Reward:
    """The reward that `text` names; `columns` are those of the rows, where they are known.

    Raises SettingsError (U140) where there is none, or it cannot be had.

    Example:
        >>> read_reward("regex:^Yes")("Is it?", "Yes, it is.", {})
        1.0
    """
    look_at_reward(text, columns)
    assert text is not None
    kind, _, rest = text.partition(":")
    if kind == "regex":
        pattern = re.compile(rest)
        return lambda _prompt, answer, _row: float(pattern.search(answer) is not None)
    if kind == "match":
        return lambda _prompt, answer, row: float(answer.strip() == str(row.get(rest, "")).strip())
    if kind == "python":
        raise wrong_reward(f"the reward was the function {rest} of a Python program: give it again there")
    if kind == "model":
        return RewardModel(Path(rest).expanduser())
    place, _, name = text.rpartition(":")
    return _function(Path(place).expanduser(), name)


def _function(path: Path, name: str) -> Reward:
    spec = importlib.util.spec_from_file_location(f"graftlm_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise wrong_reward(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise wrong_reward(f"{path} has no function {name!r}, only {', '.join(there) or 'none'}")
    reward: Reward = found
    return reward


class RewardModel:
    """The number that a reward model gives a prompt with an answer; it is read at the first call.

    The model is one of its own: it has another head, and often another base, than the one that learns.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._opened = folder, None

    def __call__(self, prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        """What the answer is worth."""
        del row
        return self.many([prompt], [answer])[0]

    def many(self, prompts: Sequence[str], answers: Sequence[str], *, batch: int = 32) -> list[float]:
        """What each answer is worth."""
        from graftlm.training.opening import open_adapter

        if self._opened is None:
            found: Any = open_adapter(self.folder)
            if found.task != "reward":
                raise wrong_reward(f"{self.folder} learnt {found.task}, not reward")
            self._opened = found
        opened: Any = self._opened
        tokenizer, template = opened.tokenizer, opened.template
        items = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if template is None:
                ids = tokenizer(prompt, answer, verbose=False)["input_ids"]
            else:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                ids = template.encode(tokenizer, turns, answer=False)
            items.append({"input_ids": list(ids)[-(opened.max_length or len(ids)) :]})
        collate = Collator(tokenizer.pad_token_id)
        told: list[float] = []
        with evaluating(opened.model):
            for part in batches(items, batch):
                together = {name: tensor.to(opened.model.device) for name, tensor in collate(part).items()}
                told += opened.model(**together).logits[:, 0].float().tolist()
        return told


def worth(
    reward: Reward, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    """What each answer is worth. Raises RunError (U141) where the reward fails or gives no finite number."""
    if isinstance(reward, RewardModel):
        return reward.many(prompts, answers)
    return [checked(reward, prompt, answer, row) for prompt, answer, row in zip(prompts, answers, rows, strict=True)]


def checked(reward: Reward, prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """What one answer is worth, a finite number."""
    try:
        value = reward(prompt, answer, row)
        found = float(value)
    except GraftError:
        raise
    except Exception as error:
        message = f"the reward failed on the answer {answer[:60]!r}: {type(error).__name__}: {error}"
        raise RunError(Finding("U141", message, fix="let it return a number for any text")) from error
    if not math.isfinite(found):
        message = f"the reward of the answer {answer[:60]!r} is {found}"
        raise RunError(Finding("U141", message, fix="let it return a finite number for any text"))
    return found
