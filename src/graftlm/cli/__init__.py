"""The command line: one file a verb, imported when it is called; no verb's help imports torch or transformers."""

from graftlm.cli.program import main

__all__ = ["main"]
