"""Base models as others made them: loading, and fingerprints that tell one from another.

Only `places` does without torch, so the others are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftlm.models.places import BUNDLED, bundled_base, resolve_base

if TYPE_CHECKING:
    from graftlm.models.fingerprinting import fingerprint
    from graftlm.models.loading import HEADS, head_of, is_encoder, load_base, load_config, load_tokenizer

__all__ = [
    "BUNDLED",
    "HEADS",
    "bundled_base",
    "fingerprint",
    "head_of",
    "is_encoder",
    "load_base",
    "load_config",
    "load_tokenizer",
    "resolve_base",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graftlm.models' has no attribute {name!r}")
    home = "fingerprinting" if name == "fingerprint" else "loading"
    return getattr(import_module(f"graftlm.models.{home}"), name)
