"""Adapters on disk: Hugging Face PEFT's format, with one more file for what it cannot say."""

from graftlm.formats.atomic import atomic_folder, check_manifest, sha256_of, write_json, write_manifest
from graftlm.formats.codecs import CODECS, Codec
from graftlm.formats.exporting import Exported, export_adapter
from graftlm.formats.peft import load_adapter, read_facts, save_adapter

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
    "write_json",
    "write_manifest",
]
