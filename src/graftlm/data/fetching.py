"""Brings the data files of a set from a hub into a local folder: `hub:owner/name`, `hub:owner/name@revision`.

What is fetched are files of the kinds that `reading` knows, documents apart (a set's own description is one); no code
of the set is run. What is in the folder is then read like any other. With `hub_rows` nothing is brought: the rows of
the set's `train` part come as they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from graftlm.data.reading import FORMATS, Table
from graftlm.errors import DataError, EnvironmentFault, Finding

__all__ = ["fetched", "hub_commit", "hub_rows"]

_NAME = re.compile(r"hub:(?P<set>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def fetched(name: str) -> Path:
    """The local folder with the data files of the set `name`. Raises DataError (D116) where it cannot be had.

    Example:
        >>> fetched("hub:owner/name@main")                                                      # doctest: +SKIP
    """
    asked = _asked(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kinds = [f"*{ending}" for ending, kind in FORMATS.items() if kind != "text"]
    try:
        return Path(
            snapshot_download(asked["set"], repo_type="dataset", revision=asked["revision"], allow_patterns=kinds)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _cannot(asked["set"], error) from None


def hub_rows(name: str, max_rows: int | None = None, *, chunk: int = 256) -> Iterator[Table]:
    """The rows of the set's `train` part in tables of at most `chunk`, as `datasets` streams them.

    Raises DataError (D116) where they cannot be had, EnvironmentFault (E133) without `datasets`.
    """
    asked = _asked(name)
    try:
        import datasets
    except ImportError:
        message = "reading a set of the hub while training needs datasets, which is not installed"
        raise EnvironmentFault(Finding("E133", message, fix="pip install 'graftlm[hub]'")) from None

    place, rows, before = asked["set"], list[dict[str, object]](), 0

    def table() -> Table:
        columns = tuple(dict.fromkeys(column for row in rows for column in row))
        places = [f"{place} row {before + at}" for at in range(1, len(rows) + 1)]
        return Table(Path(name), "hub", "", columns, list(rows), places)

    try:
        for row in datasets.load_dataset(place, revision=asked["revision"], split="train", streaming=True):
            rows.append(dict(row))
            if before + len(rows) == max_rows:
                break
            if len(rows) == chunk:
                yield table()
                before += len(rows)
                rows.clear()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _cannot(place, error) from None
    if rows:
        yield table()


def hub_commit(name: str) -> str:
    """The commit that the set's rows are read from. Raises DataError (D116) where it cannot be told."""
    asked = _asked(name)
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(asked["set"], revision=asked["revision"]).sha)
    except (OSError, ValueError) as error:  # what the hub's client raises are such
        raise _cannot(asked["set"], error) from None


def _asked(name: str) -> re.Match[str]:
    asked = _NAME.fullmatch(name)
    if asked is None:
        raise DataError(Finding("D116", f"'{name}' names no set of a hub", fix="hub:owner/name"))
    return asked


def _cannot(place: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    fix = "look at the name and the network, or download it and give its folder"
    return DataError(Finding("D116", f"cannot fetch {place}: {reason}", fix=fix))
