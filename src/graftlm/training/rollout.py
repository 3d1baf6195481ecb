"""Rollouts: prompts become answers of the model as it is, with their rewards.

What is drawn for an answer goes by the seed, the number of the step and the answer's place in it alone: it depends on
neither `train.accumulate` nor the width of a batch nor the number of processes, each of which answers its own prompts,
and a resumed run samples what the unbroken one would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler

from graftlm.data import Collator, Template
from graftlm.evaluation.generating import draw_of, sample_answers
from graftlm.evaluation.losses import evaluating
from graftlm.objectives.sequences import IGNORED
from graftlm.training.processes import gathered, rank
from graftlm.training.rewards import Reward, worth

__all__ = ["RepeatedPrompts", "Rollout", "Written"]


@dataclass(frozen=True)
class Written:
    """Answers to prompts: token ids (with the end, where one was written), text, and what each is worth."""

    tokens: list[list[int]]
    texts: list[str]
    rewards: list[float]


@dataclass
class Rollout:
    """Answers the prompts of a step `answers` times each and puts the answers in their place.

    Args:
        model: the one that learns, with its adapter on.
        tokenizer: of its base.
        template: which the prompts are written with; its end of turn ends an answer.
        reward: what an answer is worth.
        answers: how many are sampled to each prompt.
        max_new_tokens: after which an answer is broken off.
        longest: the most tokens of prompt and answer together; prompts lose their beginning.
        seed: of the draws.
        examples: the rows (`graftlm.data` examples) that the numbers in `row` mean.
        updates: how many steps, one after the other, learn from the same answers.
    """

    model: Any
    tokenizer: Any
    template: Template | None
    reward: Reward
    answers: int
    max_new_tokens: int
    longest: int
    examples: Mapping[int, Any]
    seed: int = 0
    updates: int = 1
    #: The batches of the last step that wrote answers, with what was settled of them.
    kept: list[dict[str, Any]] = field(default_factory=list)
    #: Of the last step: mean reward, mean tokens of an answer.
    told: dict[str, float] = field(default_factory=dict)

    def __call__(self, batches: Sequence[dict[str, Any]], step: int = 0) -> bool:
        """Turn each batch of prompts of a step into one of prompts with answers and `rewards`, in place.

        Gives whether the answers are new: in between `updates` they are those of the step before, with all that was
        settled of them.
        """
        if step % self.updates and self.kept:
            for batch, kept in zip(batches, self.kept, strict=True):
                batch.clear()
                batch.update(kept)
            return False
        rows = [int(row) for batch in batches for row in batch["row"]]
        prompts = [ids for batch in batches for ids in _unpadded(batch)]
        places = _places(batches)
        several = [at for at in range(len(rows)) for _ in range(self.answers)]
        prompts = [prompts[at] for at in several]
        draws = [draw_of(self.seed, step, place, answer) for place in places for answer in range(self.answers)]
        with evaluating(self.model):
            written = self.write(prompts, [self.examples[rows[at]] for at in several], draws)
        counts = [int("void" not in batch) for batch in batches for _ in range(len(batch["row"]) * self.answers)]
        told = (counts, written.rewards, map(len, written.tokens))
        sums = [sum(count * each for count, each in zip(counts, of_each, strict=True)) for of_each in told]
        answers, rewards, tokens = (sum(each) for each in zip(*gathered(sums), strict=True))
        self.told = {"reward": rewards / answers, "answer_tokens": tokens / answers}
        collate = Collator(self.tokenizer.pad_token_id)
        items = [
            {"input_ids": [*ids, *answer], "labels": [*[IGNORED] * len(ids), *answer], "row": rows[at]}
            for at, ids, answer in zip(several, prompts, written.tokens, strict=True)
        ]
        start = 0
        for batch in batches:
            here = slice(start, start + len(batch["row"]) * self.answers)
            made = collate(items[here])
            made["rewards"] = torch.tensor(written.rewards[here])
            device, void = batch["input_ids"].device, batch.get("void")
            batch.clear()
            batch.update({name: tensor.to(device) for name, tensor in made.items()})
            if void is not None:
                batch["void"] = void
            start = here.stop
        self.kept = list(batches)
        return True

    def write(self, prompts: Sequence[Sequence[int]], examples: Sequence[Any], draws: Sequence[int]) -> Written:
        """One answer to each prompt (token ids), under the routing in force; `draws` are their seeds."""
        room = max(self.longest - self.max_new_tokens, 1)
        tokens = sample_answers(
            self.model,
            self.tokenizer,
            self.template,
            [list(ids)[-room:] for ids in prompts],
            draws=draws,
            max_new_tokens=self.max_new_tokens,
        )
        texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        asked = [str(example.messages[-1]["content"]) for example in examples]
        return Written(tokens, texts, worth(self.reward, asked, texts, [example.raw for example in examples]))


class RepeatedPrompts(Sampler[int]):
    """The order of prompts where steps share answers: shuffled by seed and pass, each step's prompts `updates` times.

    The last step of a pass is filled up from its beginning, so that all steps are of `per_step` prompts.

    Example:
        >>> len(list(RepeatedPrompts(count=5, per_step=2, updates=3)))
        18
    """

    def __init__(self, count: int, per_step: int, updates: int, seed: int = 0) -> None:
        self.count, self.per_step, self.updates, self.seed, self.epoch = count, per_step, updates, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass it is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.per_step) * self.per_step * self.updates

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=draws).tolist()
        for start in range(0, self.count, self.per_step):
            together = [order[at % self.count] for at in range(start, start + self.per_step)]
            for _ in range(self.updates):
                yield from together


def _places(batches: Sequence[Mapping[str, Any]]) -> list[int]:
    """The place of each row of this process's batches in the step of all processes; of one that does not count, any."""
    sizes = gathered([0 if "void" in batch else len(batch["row"]) for batch in batches])
    found: list[int] = []
    before = 0
    for at, batch in enumerate(batches):
        start = before + sum(each[at] for each in sizes[: rank()])
        found += range(start, start + len(batch["row"]))
        before += sum(each[at] for each in sizes)
    return found


def _unpadded(batch: Mapping[str, Any]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
