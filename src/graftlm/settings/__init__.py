"""The settings of a run: one typed schema with three faces, the run file, the flags and Python; never imports torch.

Example:
    >>> from graftlm.settings import resolve, to_yaml
    >>> resolved = resolve(flags={"lr": "2e-4"}, sets=["train.epochs=2"])
    >>> resolved.settings.train.learning_rate, resolved.origin["train.learning_rate"]
    (0.0002, '--lr')
    >>> print(to_yaml(resolved.settings), end="")
    train:
      epochs: 2.0
      learning_rate: 0.0002
"""

from .faults import CODES
from .foreign import FOREIGN, NO_COUNTERPART
from .reading import Attempted, Resolved, attempt, resolve
from .schema import (
    FLAGS,
    SETTINGS,
    DataSettings,
    Flag,
    GenerateSettings,
    ModelSettings,
    PreferenceSettings,
    RunSettings,
    Setting,
    TrainSettings,
)
from .translating import Translation, translate
from .writing import dump, recorded, to_yaml

__all__ = [
    "CODES",
    "FLAGS",
    "FOREIGN",
    "NO_COUNTERPART",
    "SETTINGS",
    "Attempted",
    "DataSettings",
    "Flag",
    "GenerateSettings",
    "ModelSettings",
    "PreferenceSettings",
    "Resolved",
    "RunSettings",
    "Setting",
    "TrainSettings",
    "Translation",
    "attempt",
    "dump",
    "recorded",
    "resolve",
    "to_yaml",
    "translate",
]
