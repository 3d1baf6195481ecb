"""Adapters on disk: Hugging Face PEFT's format, with one more file for what it cannot say.

Only `atomic` does without torch, so the others are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftlm.formats.atomic import atomic_folder, check_manifest, sha256_of, write_json, write_manifest

if TYPE_CHECKING:
    from graftlm.formats.codecs import CODECS, Codec
    from graftlm.formats.exporting import Exported, export_adapter
    from graftlm.formats.peft import load_adapter, read_facts, save_adapter, stored_method

__all__ = [
    "CODECS",
    "Codec",
    "Exported",
    "atomic_folder",
    "check_manifest",
    "export_adapter",
    "load_adapter",
    "read_facts",
    "save_adapter",
    "sha256_of",
    "stored_method",
    "write_json",
    "write_manifest",
]

_HOME_OF = {"CODECS": "codecs", "Codec": "codecs", "Exported": "exporting", "export_adapter": "exporting"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graftlm.formats' has no attribute {name!r}")
    return getattr(import_module(f"graftlm.formats.{_HOME_OF.get(name, 'peft')}"), name)
