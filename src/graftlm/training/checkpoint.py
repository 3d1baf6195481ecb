"""Checkpoints of a run: adapter, optimizer, schedule, random state, position; complete or absent, and never the base.

A checkpoint is a folder: `adapter.safetensors`, `optimizer.safetensors` (moments by parameter number),
`random.safetensors`, `schedule.json` and `trainer_state.json`, with a manifest of sizes and hashes; where the next step
learns from the same answers, `answers.safetensors` too. It is written beside its place and renamed into it, so a kill
at any moment leaves the last complete one. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.core import Adapter
from graftlm.errors import Finding, RunError
from graftlm.formats.atomic import atomic_folder, check_manifest, write_json, write_manifest

__all__ = [
    "adapter_state", "latest", "load_adapter_state", "load_answers", "load_optimizer", "load_random_state",
    "random_state", "step_of", "write",
]  # fmt: skip

_NAME = re.compile(r"checkpoint-(\d+)")


def write(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    trainer_state: dict[str, Any],
    *,
    answers: Sequence[Sequence[Mapping[str, Tensor]]] = (),
    randoms: Sequence[tuple[dict[str, Tensor], dict[str, Any]]] = (),
) -> None:
    """Write everything that resuming needs into `folder`, at once or not at all.

    Of each process, `answers` are batches of answers that the next step learns from too, `randoms` the random states.
    """
    moments, settings = _split(optimizer.state_dict())
    with atomic_folder(folder) as inside:
        _save({name: tensor.contiguous() for name, tensor in adapter.state().items()}, inside / "adapter.safetensors")
        _save(moments, inside / "optimizer.safetensors")
        for rank, own in enumerate(answers):
            batches = {f"{at}.{name}": tensor for at, batch in enumerate(own) for name, tensor in batch.items()}
            _save({name: tensor.contiguous() for name, tensor in batches.items()}, inside / _answers_of(rank))
        (tensors, numbers), *others = randoms or [random_state()]
        _save(tensors, inside / "random.safetensors")
        for rank, (tensors, _) in enumerate(others, 1):
            _save(tensors, inside / f"random.{rank}.safetensors")
        told = {"optimizer": settings, "scheduler": scheduler.state_dict(), "random": numbers}
        if others:
            told["random_of_others"] = [numbers for _, numbers in others]
        write_json(inside / "schedule.json", told)
        write_json(inside / "trainer_state.json", trainer_state)
        write_manifest(inside)


def step_of(folder: Path) -> int:
    """The optimizer step after which the checkpoint was written."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def latest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint in `folder` that is whole, and the damaged ones that are newer; None where there is none.

    Raises RunError where there are checkpoints and every one is damaged.
    """
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    damaged: list[Path] = []
    for path in sorted(found, key=step_of, reverse=True):
        if not check_manifest(path):
            return path, damaged
        damaged.append(path)
    if damaged:
        raise RunError(
            Finding(
                "U120",
                f"every checkpoint in {folder} is damaged: {', '.join(path.name for path in damaged)}",
                fix=f"rm -r {folder}, then --resume starts anew",
            )
        )
    return None, []


def load_adapter_state(folder: Path, adapter: Adapter) -> None:
    """Put the checkpoint's weights into `adapter`; RunError for a damaged checkpoint, AdapterError for another's."""
    adapter.load_state(adapter_state(folder))


def adapter_state(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors as the checkpoint has them; RunError for a damaged one."""
    _check(folder)
    return load_file(folder / "adapter.safetensors")


def load_answers(folder: Path, rank: int = 0, processes: int = 1) -> list[dict[str, Tensor]]:
    """The batches of answers that the checkpoint has for a process; none where the next step writes its own.

    Raises RunError where it has them for another number of processes.
    """
    written = len(list(folder.glob("answers*.safetensors")))
    if written not in (0, processes):
        raise RunError(
            Finding(
                "U170",
                f"{folder.name} lies between steps that share answers, of {written} processes, not {processes}",
                fix=f"torchrun --nproc_per_node {written} -m graftlm train ... --resume"
                if written > 1
                else "graftlm train ... --resume, without torchrun",
            )
        )
    path = folder / _answers_of(rank)
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items() if path.is_file() else ():
        at, _, name = key.partition(".")
        found.setdefault(int(at), {})[name] = tensor
    return [found[at] for at in sorted(found)]


def _answers_of(rank: int) -> str:
    return f"answers.{rank}.safetensors" if rank else "answers.safetensors"


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Put back moments, step counts and the schedule."""
    stored = json.loads((folder / "schedule.json").read_text())
    optimizer.load_state_dict(_join(load_file(folder / "optimizer.safetensors"), stored["optimizer"]))
    scheduler.load_state_dict(stored["scheduler"])


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every random generator's state, in tensors and in numbers."""
    return _random_tensors(), _random_numbers()


def load_random_state(folder: Path, rank: int = 0) -> None:
    """Put back every random generator of a process; the main one's, where fewer processes ran before."""
    stored = json.loads((folder / "schedule.json").read_text())
    tensors, numbers = load_file(folder / "random.safetensors"), stored["random"]
    if 0 < rank <= len(stored.get("random_of_others", ())):
        tensors, numbers = load_file(folder / f"random.{rank}.safetensors"), stored["random_of_others"][rank - 1]
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), position, has_gauss, cached))


def _check(folder: Path) -> None:
    if faults := check_manifest(folder):
        raise RunError([Finding("U120", f"checkpoint {folder.name} is damaged"), *faults])


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it wraps what the system says of a full disk
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `<parameter>.<name>` and everything else as JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.contiguous()
            elif isinstance(value, dict):  # bitsandbytes puts what it holds together, code books that all share too
                tensors |= {f"{number}.{name}.{inner}": tensor.clone() for inner, tensor in value.items()}
            else:
                plain.setdefault(str(number), {})[name] = value
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def _join(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in settings["plain"].items()}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        name, _, inner = name.partition(".")
        own = state.setdefault(int(number), {})
        if inner:
            own.setdefault(name, {})[inner] = tensor
        else:
            own[name] = tensor
    groups = [{**g, "betas": tuple(g["betas"])} if "betas" in g else g for g in settings["param_groups"]]
    return {"state": state, "param_groups": groups}


def _random_tensors() -> dict[str, Tensor]:
    numpy_state: Any = np.random.get_state()
    found = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy_state[1].view(np.int32).copy())}
    found |= {f"cuda.{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return found


def _random_numbers() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, _, position, has_gauss, cached = np.random.get_state()
    return {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
