"""The flags of verbs that open a model which say on which devices, and on disk, its base lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from graftlm.cli.usage import UsageFault
from graftlm.errors import Finding

__all__ = ["PLACING", "placing_flags"]

PLACING = ("device_map", "max_memory", "offload_folder")
"""What the flags are called where a model is opened."""


def _sizes(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, str] | None:
    """`cpu=8GiB,0=20GiB` as a mapping. Raises UsageFault."""
    del context, parameter
    if value is None:
        return None
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not pairs or not all(device.strip() and size.strip() for device, _, size in pairs):
        message = f"--max-memory is {value!r}; wanted pairs such as cpu=8GiB"
        raise UsageFault(Finding("L103", message, fix="--max-memory cpu=8GiB"))
    return {device.strip(): size.strip() for device, _, size in pairs}


def placing_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb `device_map`, `max_memory` and `offload_folder`, as `open_adapter` takes them."""
    from graftlm.settings import SETTINGS

    where, most, folder = (SETTINGS[f"model.{key}"].text for key in ("device_map", "max_memory", "offload_folder"))
    options = (
        click.option("--device-map", metavar="TEXT", help=where),
        click.option("--max-memory", metavar="DEVICE=SIZE", callback=_sizes, help=most),
        click.option("--offload-folder", metavar="FOLDER", help=folder.partition(";")[0]),
    )
    for option in reversed(options):
        function = option(function)
    return function
