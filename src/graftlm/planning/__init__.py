"""Planning: what a run takes, known before it starts: memory, operations, time, and what would fit.

Example:
    >>> from graftlm.planning import plan
    >>> plan("bundled", "lora(rank=8)", batch=4, length=128).trainable
    71680
"""

from graftlm.planning.memory import memory_bytes, said
from graftlm.planning.plan import TERMS, Plan, plan

__all__ = ["TERMS", "Plan", "memory_bytes", "plan", "said"]
