"""Objectives: what a batch costs, as pure arithmetic; `count` and `loss_sum`, and the trainer divides.

Because the divisor is the count over all micro-batches of a step (and all processes), loss and gradient do not depend
on how a batch is cut up.
"""

from graftlm.objectives.causal_lm import CausalLM
from graftlm.objectives.classification import Classification
from graftlm.objectives.objective import Objective

__all__ = ["OBJECTIVES", "CausalLM", "Classification", "Objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "classify": Classification,
    "lm": CausalLM,
    "sft": CausalLM,
}
