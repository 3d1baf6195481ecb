"""The mechanism: sites of a model, deltas that act there, adapters that come and go, routing that chooses among them.

Only torch is imported here. See `docs/mechanism.md` for the picture.
"""

from graftlm.core.adapter import (
    Adapter,
    Using,
    adapters,
    attach,
    keep_merged,
    original_parameters,
    parts_of,
    trainable,
    use,
    without_adapters,
)
from graftlm.core.delta import (
    Base,
    BottleneckMaps,
    BranchDelta,
    Delta,
    EmbedDelta,
    KeyValueDelta,
    LinearDelta,
    LowRank,
    ParameterDelta,
    Port,
    ReadingDelta,
    WholeParameterDelta,
)
from graftlm.core.method import Method, Part, Samples, Sum, device_at, in_eval_mode, model_loss, one_of
from graftlm.core.routing import Routing
from graftlm.core.sites import ROLE_GROUPS, ROLES, Site, Survey, Targets, linear_kind
from graftlm.core.storage import dense, parameter_count
from graftlm.core.summary import Summary, summary
from graftlm.core.survey import survey

__all__ = [
    "ROLES",
    "ROLE_GROUPS",
    "Adapter",
    "Base",
    "BottleneckMaps",
    "BranchDelta",
    "Delta",
    "EmbedDelta",
    "KeyValueDelta",
    "LinearDelta",
    "LowRank",
    "Method",
    "ParameterDelta",
    "Part",
    "Port",
    "ReadingDelta",
    "Routing",
    "Samples",
    "Site",
    "Sum",
    "Summary",
    "Survey",
    "Targets",
    "Using",
    "WholeParameterDelta",
    "adapters",
    "attach",
    "dense",
    "device_at",
    "in_eval_mode",
    "keep_merged",
    "linear_kind",
    "model_loss",
    "one_of",
    "original_parameters",
    "parameter_count",
    "parts_of",
    "summary",
    "survey",
    "trainable",
    "use",
    "without_adapters",
]
