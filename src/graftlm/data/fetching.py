"""Brings the data files of a set from a hub into a local folder: `hub:owner/name`, `hub:owner/name@revision`.

What is fetched are files of the kinds that `reading` knows, documents apart (a set's own description is one); no code
of the set is run. What is in the folder is then read like any other.
"""

from __future__ import annotations

import re
from pathlib import Path

from graftlm.data.reading import FORMATS
from graftlm.errors import DataError, Finding

__all__ = ["fetched"]

_NAME = re.compile(r"hub:(?P<set>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def fetched(name: str) -> Path:
    """The local folder with the data files of the set `name`. Raises DataError (D116) where it cannot be had.

    Example:
        >>> fetched("hub:owner/name@main")                                                      # doctest: +SKIP
    """
    asked = _NAME.fullmatch(name)
    if asked is None:
        raise DataError(Finding("D116", f"'{name}' names no set of a hub", fix="hub:owner/name"))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kinds = [f"*{ending}" for ending, kind in FORMATS.items() if kind != "text"]
    try:
        return Path(
            snapshot_download(asked["set"], repo_type="dataset", revision=asked["revision"], allow_patterns=kinds)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        fix = "look at the name and the network, or download it and give its folder"
        raise DataError(Finding("D116", f"cannot fetch {asked['set']}: {reason}", fix=fix)) from None
