"""The frozen bottom: what blocks below the lowest change make of a row, kept on disk and read in later passes.

Where only upper blocks are trained, the blocks below compute the same of a row in every pass. The first time a row is
read, what comes out of the last of them is written to a file (hidden width times the bytes of the type for each
token); later the blocks are passed over. A row is known by its tokens and whatever else it is given with, not by its
padding. The first rows that are read again are computed once more and compared: blocks that draw something at
random are found out before anything is learnt from what was kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core import survey
from graftlm.core.junction import junction_of
from graftlm.errors import Finding, RunError

__all__ = ["FrozenBottom", "bottom_of"]

#: Arguments of a model that say nothing of what its blocks make of a row.
_ASIDE = ("labels", "logits_to_keep", "use_cache", "return_dict")


def bottom_of(model: nn.Module) -> list[str]:
    """The paths of the blocks, from the first on, below everything that acts on the model.

    Raises RunError (U171) with the reason where there are none whose results can be kept.

    Example:
        >>> adapter = attach(model, LoRA(layers="-2:"))                        # doctest: +SKIP
        >>> bottom_of(model)                                                   # doctest: +SKIP
        ['model.layers.0', 'model.layers.1', 'model.layers.2']
    """
    found = survey(model)
    roots = {
        match[1]
        for site in found.sites
        if site.layer is not None and (match := re.match(rf"(.*?)\.{site.layer}\.", f"{site.path}."))
    }
    if len(roots) != 1:
        raise _refusal(f"{type(model).__name__} has no single row of blocks")
    root = roots.pop()
    blocks = [f"{root}.{at}" for at in range(found.layer_count)]
    modules = dict(model.named_modules())
    heads = {site.path for site in found.sites if site.role == "head"}
    lowest = len(blocks)
    for path, module in modules.items():
        junction = junction_of(module)
        if junction is None or not any(junction.deltas.values()) or path in heads:
            continue
        inside = [at for at, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")]
        if not inside:
            raise _refusal(f"what acts at {path} lies outside the blocks")
        lowest = min(lowest, inside[0])
    if lowest == 0:
        raise _refusal("something acts in the first block", "layers=-2: in the method")
    # Whatever is not above: embeddings and their kin are below, and draw as blocks do.
    above = (*blocks[lowest:], *heads)
    for path, module in modules.items():
        if any(f"{path}.".startswith(f"{each}.") for each in above):
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise _refusal(f"{path} drops entries at random")
        if "_hf_hook" in module.__dict__:
            raise _refusal("the base is laid over devices")
    return blocks[:lowest]


class FrozenBottom:
    """Keeps and puts in place what the blocks `paths` of `model` make of rows, while it is entered.

    Only calls in training that want gradients are served. The file lies in `folder`, has no name, and is gone
    afterwards. `read` and `computed` count rows.

    Example:
        >>> with FrozenBottom(model, bottom_of(model), Path("runs/mine")): train(model)    # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, paths: list[str], folder: Path) -> None:
        self.model, self.paths, self.folder = model, paths, folder
        self.read = self.computed = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0
        self._checked = False
        #: Of the call that is under way: its rows (key and tokens), and the states to be put in place.
        self._rows: list[tuple[bytes, int]] | None = None
        self._states: Tensor | None = None
        self._like: Tensor | None = None
        #: What a block gives behind the states, all None; None where it gives the states alone.
        self._behind: tuple[None, ...] | None = None

    def __enter__(self) -> FrozenBottom:
        self._file = tempfile.TemporaryFile(dir=self.folder)  # open as long as this is entered
        self._hook = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for path in self.paths:
            block = self.model.get_submodule(path)
            block.__dict__["forward"] = functools.partial(self._pass, block.forward, path == self.paths[-1])
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for path in self.paths:
            self.model.get_submodule(path).__dict__.pop("forward", None)
        self._file.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._rows = self._states = None
        if args or not (module.training and torch.is_grad_enabled()) or kwargs.get("output_hidden_states"):
            return
        self._rows = _rows_of(kwargs)
        if self._rows is None or self._like is None or not all(key in self._places for key, _ in self._rows):
            return
        if self._checked:
            shape = (*kwargs["input_ids"].shape, self._like.shape[-1])
            self._states = self._like.new_zeros(shape)
            for row, (key, length) in enumerate(self._rows):
                self._states[row, :length] = self._kept(key)
            self.read += len(self._rows)

    def _pass(self, forward: Any, last: bool, *args: Any, **kwargs: Any) -> Any:
        if self._states is not None:
            given = args[0] if args else kwargs["hidden_states"]
            states = self._states if last else given
            return states if self._behind is None else (states, *self._behind)
        output = forward(*args, **kwargs)
        if last and self._rows is not None:
            states, self._behind = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if any(each is not None for each in self._behind or ()):
                raise _refusal(f"{self.paths[-1]} hands more than states to the next block")
            self._keep(states.detach())
        return output

    def _keep(self, states: Tensor) -> None:
        assert self._rows is not None
        self._like = states.new_empty(0, 0, states.shape[-1])  # a view would hold the states
        for row, (key, length) in enumerate(self._rows):
            own = states[row, :length]
            if key in self._places:
                self._compare(own, self._kept(key).to(own.device))
                continue
            data = own.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            done = 0
            while done < len(data):  # a disk that is nearly full takes a part, and then raises OSError
                done += os.pwrite(self._file.fileno(), data[done:], self._end + done)
            self._places[key] = (self._end, len(data))
            self._end += len(data)
            self.computed += 1

    def _kept(self, key: bytes) -> Tensor:
        assert self._like is not None
        start, size = self._places[key]
        data = bytearray(os.pread(self._file.fileno(), size, start))
        return torch.frombuffer(data, dtype=self._like.dtype).view(-1, self._like.shape[-1]).to(self._like.device)

    def _compare(self, own: Tensor, kept: Tensor) -> None:
        close = 1e-4 if own.dtype == torch.float32 else 3e-2
        if not (own - kept).norm() <= close * kept.norm():
            raise _refusal("what the blocks below make of a row differs from pass to pass")
        self._checked = True


def _rows_of(given: Mapping[str, Any]) -> list[tuple[bytes, int]] | None:
    """Of each row, what it is known by, and its tokens without padding behind them; None for calls of another kind."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or given.get("past_key_values") is not None:
        return None
    count, width = ids.shape
    lengths = [width] * count
    told = {name: value for name, value in given.items() if name not in _ASIDE and value is not None}
    if isinstance(mask, Tensor):
        if mask.shape != ids.shape:
            return None
        seen = mask.bool()
        if torch.equal(seen, torch.arange(width, device=mask.device) < seen.sum(1, keepdim=True)):
            lengths = seen.sum(1).tolist()
            del told["attention_mask"]
    rows = []
    tensors = {name: value.detach().cpu() for name, value in told.items() if isinstance(value, Tensor)}
    others = repr({name: value for name, value in sorted(told.items()) if name not in tensors})
    for row, length in enumerate(lengths):
        digest = hashlib.blake2b(others.encode(), digest_size=16)
        for name, value in sorted(tensors.items()):
            own = value[row % len(value)] if len(value.shape) and len(value) in (1, count) else value
            if own.shape[:1] == (width,):
                own = own[:length]
            digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
            digest.update(own.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        rows.append((digest.digest(), length))
    return rows


def _refusal(why: str, fix: str = "without train.cache_bottom") -> RunError:
    return RunError(Finding("U171", f"nothing below the changes can be kept between passes: {why}", fix=fix))
