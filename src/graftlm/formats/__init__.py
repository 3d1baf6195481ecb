"""Adapters on disk: Hugging Face PEFT's format, with one more file for what it cannot say."""

from graftlm.formats.atomic import atomic_folder, check_manifest, sha256_of, write_json, write_manifest
from graftlm.formats.codecs import CODECS, Codec
from graftlm.formats.peft import load_adapter, read_facts, save_adapter

__all__ = [
    "CODECS",
    "Codec",
    "atomic_folder",
    "check_manifest",
    "load_adapter",
    "read_facts",
    "save_adapter",
    "sha256_of",
    "write_json",
    "write_manifest",
]
