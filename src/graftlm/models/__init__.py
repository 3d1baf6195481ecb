"""Base models as others made them: loading, and fingerprints that tell one from another."""

from graftlm.models.fingerprint import fingerprint
from graftlm.models.loading import (
    BUNDLED,
    HEADS,
    bundled_base,
    head_of,
    is_encoder,
    load_base,
    load_config,
    load_tokenizer,
    resolve_base,
)

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
