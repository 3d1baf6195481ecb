"""One run in a process of its own that may be killed: what the drills start, over and over, until the run is done.

The processes are forked from a server that has imported everything, so that each starts at once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Start the server; it takes the seconds that the imports take."""
    _SERVER.set_forkserver_preload(["drills.preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server is not told of this one's path
    try:
        forkserver.ensure_running()
        process = _SERVER.Process(target=int)
        process.start()
        process.join(120)
        assert process.exitcode == 0
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _train(settings: dict[str, Any], folder: str, resume: bool, kill_in: tuple[str, int] | None) -> None:
    import torch

    from graftlm.training import train
    from training.tiny_runs import leave_out_the_slow

    torch.set_num_threads(1)
    leave_out_the_slow(setattr)
    if kill_in is not None:
        _kill_at(*kill_in)
    if resume:
        train(output=folder, resume=True, quiet=True)
    else:
        train(output=folder, quiet=True, **settings)


def _kill_at(place: str, call: int) -> None:
    """Kill this process in the midst of the `call`-th call of a function that writes."""
    import importlib

    module_name, _, name = place.rpartition(".")
    module = importlib.import_module(module_name)
    real, calls = getattr(module, name), []

    def killing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(module, name, killing)


def attempt(
    settings: dict[str, Any], folder: Path, *, kill_after_s: float | None = None, kill_in: tuple[str, int] | None = None
) -> tuple[int, float]:
    """Start the run in `folder`, or take it up; give the exit code (-9 for a kill) and the seconds it took."""
    start_server()
    resume = (folder / "run.json").exists()
    process = _SERVER.Process(target=_train, args=(settings, str(folder), resume, kill_in), daemon=True)
    began_s = time.monotonic()
    process.start()
    process.join(120 if kill_after_s is None else kill_after_s)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, time.monotonic() - began_s
