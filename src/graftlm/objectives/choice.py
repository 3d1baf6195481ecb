"""Multiple choice: the right one of a row's answers, by a head's score or by how likely the model finds each.

Rank classification (Brown et al. 2020, GPT-3, section 2.4; Liu et al. 2022, T-Few, section 3.2): the score of an answer
is its log-probability after the prompt, divided by its length in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from graftlm.objectives.by_row import Answers
from graftlm.objectives.sequences import by_row, sequence_scores

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice(Answers):
    """Cross-entropy of the right answer among those of its row.

    A batch has one sequence for each answer, `group` [sequences] and `target` [rows], the right answer's place. With
    `by_head` the score is the one output of a classification head, otherwise the mean log-probability of the labelled
    tokens.

    Example:
        >>> import torch
        >>> Choice().count({"group": torch.tensor([0, 0, 1, 1, 1]), "target": torch.tensor([1, 0])})
        2
    """

    by_head: bool = False

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """All answers' token ids, one sequence each."""
        if self.by_head:
            return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        return super().inputs(batch)

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """A head's outputs; or the loss of each token [sequences, tokens], or logits where the head is not known."""
        return model(**self.inputs(batch)) if self.by_head else super().outputs(model, batch)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """The number of rows."""
        return int(batch["target"].shape[0])

    def scores(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The score of each answer, [rows, most answers]; minus infinity where a row has fewer."""
        if self.by_head:
            each = outputs.logits[:, 0].float()
        else:
            sums, counts = sequence_scores(outputs, batch)
            each = sums / counts.clamp(min=1)
        return by_row(each, batch["group"], empty=float("-inf"))

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The cross-entropy of each row in nats."""
        return F.cross_entropy(self.scores(outputs, batch), batch["target"], reduction="none")
