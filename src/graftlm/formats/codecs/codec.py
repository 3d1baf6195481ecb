"""Codecs: how one of PEFT's methods is written in its format and read from there.

A codec is one class: PEFT's name for the method, its configuration's fields with their defaults, the key of each
tensor, the configuration for some parts, and the method for a configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graftlm.core import Method, Part, Site
from graftlm.errors import Finding

__all__ = ["PREFIX", "Codec", "Planned", "lacks"]

#: What PEFT puts before the path of a module.
PREFIX = "base_model.model."

#: Fields of every PEFT configuration; what they say holds whatever their value.
_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": None,
}


@dataclass(frozen=True)
class Planned:
    """One delta as a file sees it: where it acts, its tensors, and the numbers that steer it (scales)."""

    method: Method
    site: Site
    is_parameter: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    numbers: tuple[tuple[str, float], ...]
    #: For a part of a fused map: the whole map.
    whole: Site | None = None
    #: Whether only the file tells the sizes; `shapes` are then those of a fresh delta, and binding in their names only.
    sizes_from_file: bool = False

    def state_key(self, name: str) -> str:
        """The name of the delta's tensor `name` in `Adapter.state()`."""
        return self.site.key if self.is_parameter else f"{self.site.key}.{name}"


class Codec(ABC):
    """How one of PEFT's methods is written and read. To add one, subclass this and add it to `CODECS`.

    Most methods need `key`, `describe` and `understand`. Those whose tensors lie otherwise in PEFT's file (stacked over
    layers, one for all) replace `shapes`, `pack` and `unpack` too.
    """

    #: PEFT's name of the method, as in `adapter_config.json`.
    peft_type: ClassVar[str]
    #: Our method.
    method: ClassVar[type[Method]]
    #: Every field of PEFT's configuration class beside the common ones, with the default there.
    defaults: ClassVar[Mapping[str, Any]]
    #: The fields that `understand` reads, with the types that their values may have.
    reads: ClassVar[Mapping[str, tuple[type, ...]]]
    #: Fields without a meaning after training, whatever their value.
    inert: ClassVar[frozenset[str]] = frozenset()
    #: The word for "the biases of the targeted modules" in `bias`.
    own_biases: ClassVar[str] = "lora_only"
    #: What stands before module paths in the file; prompt methods have "base_model." alone.
    prefix: ClassVar[str] = PREFIX
    #: Whether PEFT does nothing for a model whose task it has no name for.
    needs_task: ClassVar[bool] = False

    def as_written(self, parts: Sequence[Planned]) -> Sequence[Planned]:
        """`parts` as they come back from PEFT's words where these cut them up otherwise, and compute the same."""
        return parts

    def key(self, path: str, name: str) -> str:
        """The key in the file of tensor `name` (a parameter's own name, for trained parameters) at module `path`."""
        return f"{self.prefix}{path}.{name}"

    def keys(self, parts: Sequence[Planned]) -> dict[str, str]:
        """The key in the file for each name in the adapter's state."""
        return {
            part.state_key(name): self.key(part.site.path, part.site.parameter or name)
            for part in parts
            for name, _ in part.shapes
        }

    def shapes(self, parts: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the file."""
        shapes = {part.state_key(name): shape for part in parts for name, shape in part.shapes}
        return {key: shapes[name] for name, key in self.keys(parts).items()}

    def pack(self, parts: Sequence[Planned], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors out of the adapter's state."""
        return {key: state[name] for name, key in self.keys(parts).items()}

    def unpack(self, parts: Sequence[Planned], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's state out of the file's tensors; the reverse of `pack`."""
        return {name: tensors[key] for name, key in self.keys(parts).items()}

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """The file's tensors as PEFT uses them: without what it stores in vain, with what it computes on loading."""
        del config, model
        return tensors

    def complete(self, parts: Sequence[Planned], state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """`state` with what the file leaves out because it follows from the base; most methods have no such thing."""
        del parts, model
        return dict(state)

    @abstractmethod
    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """The fields of the configuration that differ from the defaults; None where PEFT has no words for `parts`.

        What is written is read again and compared, so this need not foresee everything.
        """

    @abstractmethod
    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """The method that a PEFT configuration says, without what stands beside it.

        Raises AdapterError with everything that does not fit; TypeError, ValueError or re.error for values that cannot
        be read, which the caller reports.
        """

    def configuration(self, model: nn.Module, **fields: Any) -> dict[str, Any]:
        """All fields of PEFT's configuration, with `fields` in place of defaults."""
        name = getattr(model, "name_or_path", None) or None
        return {**_COMMON, **self.defaults, "base_model_name_or_path": name, "peft_type": self.peft_type, **fields}


def lacks(codec: Codec, config: Mapping[str, Any], place: str) -> list[Finding]:
    """What `config` asks for that is not there, and what has the wrong type."""
    faults = []
    for field, value in sorted(config.items()):
        if field in _COMMON or field in codec.inert or field in ("peft_type", "runtime_config"):
            continue
        if field in codec.reads:
            if not isinstance(value, codec.reads[field]) or (
                isinstance(value, bool) and bool not in codec.reads[field]
            ):
                faults.append(Finding("A216", f"{field} cannot be {value!r}", place=place))
        elif value != codec.defaults.get(field) and value not in (None, False, [], {}):
            faults.append(
                Finding("A206", f"{codec.peft_type} with {field}={value!r} is not supported here", place=place)
            )
    return faults
