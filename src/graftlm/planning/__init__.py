"""Planning: what a run takes, known before it starts: memory, operations, time, and what would fit.

Example:
    >>> from graftlm.planning import plan
    >>> plan("bundled", "lora(rank=8)", batch=4, length=128).trainable
    71680
"""

from graftlm.planning.calibration import Speed, said_time, speed_of, time_of
from graftlm.planning.fitting import Fitting, Option, fitting
from graftlm.planning.memory import memory_bytes, said
from graftlm.planning.plan import TERMS, Asked, Plan, asked, plan
from graftlm.planning.serving import Serving, serving

__all__ = [
    "TERMS", "Asked", "Fitting", "Option", "Plan", "Serving", "Speed", "asked", "fitting", "memory_bytes",
    "plan", "said", "said_time", "serving", "speed_of", "time_of",
]  # fmt: skip
