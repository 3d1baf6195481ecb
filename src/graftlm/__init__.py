"""graftlm: adapt pre-trained language models by training a tiny change to them.

Names are imported when they are first used, so that `import graftlm` costs nothing and `graftlm --help` needs no torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# bitsandbytes tells everyone who imports it on a processor that it found no further kernels, and at each call of a map
# in eight bits that it computes in 16; torchao that it has no kernels for a GPU, and torch that torchao calls it in an
# old way. transformers' Trainer imports both through peft, hence here, before all of them.
for _speaker in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torchao", "torch.utils._pytree"):
    logging.getLogger(_speaker).setLevel(logging.ERROR)

_HOMES = {
    "graftlm.core": (
        "Adapter", "Delta", "LinearDelta", "Method", "ParameterDelta", "Samples", "Site", "Survey",
        "adapters", "attach", "summary", "survey", "trainable", "use",
    ),
    "graftlm.methods": (
        "AdaLoRA", "Attempt", "BitFit", "DoRA", "Full", "Gated", "Head", "IA3", "Last", "Layers", "LoRA", "LoRAPlus",
        "MAM", "METHODS", "Modules", "NormTuning", "OLoRA", "PTuning", "ParallelAdapter", "PiSSA", "PrefixTuning",
        "PromptTuning", "Prune", "ReZero", "RsLoRA", "SeriesAdapter", "Sparse", "TrainableTokens", "UniPELT", "VeRA",
        "method", "read_method",
    ),
    "graftlm.comparison": ("Choice", "Comparison", "choose", "compare"),
    "graftlm.evaluation": ("Ensemble", "ensemble"),
    "graftlm.models": ("load_base",),
    "graftlm.planning": ("Plan", "plan"),
    "graftlm.quantisation": ("merged_copy", "quantize", "repacked_copy"),
    "graftlm.formats": ("load_adapter", "save_adapter"),
    "graftlm.training": ("Run", "train"),
    "graftlm.errors": ("GraftError",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]

if TYPE_CHECKING:
    from graftlm.comparison import Choice, Comparison, choose, compare
    from graftlm.core import (
        Adapter,
        Delta,
        LinearDelta,
        Method,
        ParameterDelta,
        Samples,
        Site,
        Survey,
        adapters,
        attach,
        summary,
        survey,
        trainable,
        use,
    )
    from graftlm.errors import GraftError
    from graftlm.evaluation import Ensemble, ensemble
    from graftlm.formats import load_adapter, save_adapter
    from graftlm.methods import (
        IA3,
        MAM,
        METHODS,
        AdaLoRA,
        Attempt,
        BitFit,
        DoRA,
        Full,
        Gated,
        Head,
        Last,
        Layers,
        LoRA,
        LoRAPlus,
        Modules,
        NormTuning,
        OLoRA,
        ParallelAdapter,
        PiSSA,
        PrefixTuning,
        PromptTuning,
        Prune,
        PTuning,
        ReZero,
        RsLoRA,
        SeriesAdapter,
        Sparse,
        TrainableTokens,
        UniPELT,
        VeRA,
        method,
        read_method,
    )
    from graftlm.models import load_base
    from graftlm.planning import Plan, plan
    from graftlm.quantisation import merged_copy, quantize, repacked_copy
    from graftlm.training import Run, train


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'graftlm' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
