"""Base models as others made them: loading, and fingerprints that tell one from another."""

from graftlm.models.fingerprint import fingerprint
from graftlm.models.loading import BUNDLED, bundled_base, load_base, load_config, load_tokenizer, resolve_base

__all__ = ["BUNDLED", "bundled_base", "fingerprint", "load_base", "load_config", "load_tokenizer", "resolve_base"]
