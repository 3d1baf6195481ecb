"""Objectives: what a batch costs, as pure arithmetic; `count` and `loss_sum`, and the trainer divides.

Because the divisor is the count over all micro-batches of a step (and all processes), loss and gradient do not depend
on how a batch is cut up.
"""

from graftlm.objectives.causal_lm import CausalLM
from graftlm.objectives.choice import Choice
from graftlm.objectives.classification import Classification
from graftlm.objectives.dpo import DPO
from graftlm.objectives.grpo import GRPO
from graftlm.objectives.kto import KTO
from graftlm.objectives.masked_lm import MaskedLM
from graftlm.objectives.multi_label import MultiLabel
from graftlm.objectives.objective import Objective
from graftlm.objectives.online import Online
from graftlm.objectives.ppo import PPO
from graftlm.objectives.reference import Reference, mean_loss, settle
from graftlm.objectives.regression import Regression
from graftlm.objectives.reward import Reward
from graftlm.objectives.rloo import RLOO
from graftlm.objectives.seq2seq import Seq2Seq
from graftlm.objectives.tagging import Tagging
from graftlm.objectives.tfew import TFew

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "OBJECTIVES",
    "PPO",
    "RLOO",
    "CausalLM",
    "Choice",
    "Classification",
    "MaskedLM",
    "MultiLabel",
    "Objective",
    "Online",
    "Reference",
    "Regression",
    "Reward",
    "Seq2Seq",
    "TFew",
    "Tagging",
    "mean_loss",
    "settle",
]

#: Task to objective; of `classify` that of one label a row (`MultiLabel` is for several).
OBJECTIVES: dict[str, type[Objective]] = {
    "choice": Choice,
    "classify": Classification,
    "dpo": DPO,
    "grpo": GRPO,
    "kto": KTO,
    "lm": CausalLM,
    "mlm": MaskedLM,
    "ppo": PPO,
    "regress": Regression,
    "reward": Reward,
    "rloo": RLOO,
    "seq2seq": Seq2Seq,
    "sft": CausalLM,
    "tag": Tagging,
    "tfew": TFew,
}
