"""KTO: answers that are wanted become likelier than the reference has them, those that are not wanted less likely.

Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 8. With
r = log p(y) - log p_ref(y) and z the mean of r over answers that belong to other prompts, at least 0 and without
gradient:

    wanted    w_d (1 - sigmoid(b (r - z)))
    unwanted  w_u (1 - sigmoid(b (z - r)))

z is taken over the whole optimizer step, so that loss and gradient do not depend on how the step is cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftlm.objectives.by_row import Answers
from graftlm.objectives.sequences import sequence_scores

__all__ = ["KTO"]


@dataclass(frozen=True)
class KTO(Answers):
    """The KTO loss of each row; its sequences are the answer, and the answer to another prompt (which gives z).

    The batch has `target` [rows], 1 where the answer is wanted, `reference` and `policy` [sequences], and `baseline`,
    the z of the step.

    Example:
        >>> import torch
        >>> KTO().count({"target": torch.tensor([1, 0, 1])})
        3
    """

    needs: ClassVar[tuple[str, ...]] = ("reference", "policy")

    beta: float = 0.1
    wanted_weight: float = 1.0
    unwanted_weight: float = 1.0

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The answers' token ids; those that only z needs are left out."""
        return super().inputs(_answers(batch))

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """The loss of each token of the answers, or what the model returns where its head is not known."""
        return super().outputs(model, _answers(batch))

    def outputs_before(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """The same of both sequences of each row."""
        return super().outputs(model, batch)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """The number of rows."""
        return int(batch["target"].shape[0])

    def sequence_values(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The log-probability of each sequence's answer, [sequences]."""
        return sequence_scores(outputs, batch)[0]

    def before_step(self, batches: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]) -> None:
        """Write z, over all micro-batches and processes, into each batch."""
        gaps = [(batch["policy"] - batch["reference"])[1::2][: 0 if "void" in batch else None] for batch in batches]
        sums = torch.stack([torch.cat(gaps).sum(), torch.tensor(float(sum(map(len, gaps))), device=gaps[0].device)])
        whole, rows = total(sums)
        for batch in batches:
            batch["baseline"] = (whole / rows.clamp(min=1)).clamp(min=0)

    def rewards(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The implied rewards b r of the answers, [rows]."""
        answers = _answers(batch)
        return self.beta * (self.sequence_values(outputs, answers) - answers["reference"])

    def each(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row."""
        wanted = batch["target"].bool()
        above = self.rewards(outputs, batch) - self.beta * batch["baseline"]
        value = torch.sigmoid(torch.where(wanted, above, -above))
        return torch.where(wanted, self.wanted_weight, self.unwanted_weight) * (1 - value)


def _answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with each row's own answer only, the first of its two sequences."""
    names = ("input_ids", "attention_mask", "labels", "position_ids", "decoder_input_ids", "reference")
    return {name: batch[name][::2] for name in names if name in batch}
