"""Methods: values that choose sites of a model and build a delta for each; `+` composes them.

A method is a frozen dataclass with the field's own names for its settings. It is inert: nothing happens until `attach`.

Example:
    >>> from graftlm.methods import BitFit, LoRA
    >>> method = LoRA(rank=8) + BitFit()
    >>> str(method)
    'lora(rank=8)+bitfit'
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from graftlm.core.delta import Delta
from graftlm.core.sites import Site, Survey
from graftlm.errors import Finding, MethodError

__all__ = ["Method", "Sum"]

#: Texts that need no quotes in a method's text: they cannot be read as anything else.
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(-[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Method:
    """What to change in a model and how; subclasses choose `sites` and `build` a delta for each."""

    name: ClassVar[str]
    #: How people write it: "LoRA", "full fine-tuning".
    title: ClassVar[str]
    #: Learning rate used where the run names none, and the usual range around it.
    learning_rate: ClassVar[float] = 1e-3
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)

    def sites(self, survey: Survey) -> Sequence[Site]:
        """The sites of the surveyed model that this method changes, at least one. Raises SiteError, MethodError."""
        raise NotImplementedError

    def build(self, site: Site, module: nn.Module) -> Delta:
        """A fresh delta for `site`, whose module is `module`; created on the current default device."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is the sum of."""
        return (self,)

    def __add__(self, other: Method) -> Method:
        """Both at once: their deltas act together."""
        if not isinstance(other, Method):
            return NotImplemented
        return Sum((*self.parts, *other.parts))

    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default:
                found[field.name] = value
        return found

    def __str__(self) -> str:
        chosen = ",".join(f"{name}={_text(value)}" for name, value in self.settings().items())
        return f"{self.name}({chosen})" if chosen else self.name

    def require(self, *checks: tuple[bool, str, str]) -> None:
        """Raise one MethodError with every check that is not met: (met, what is wrong, fix)."""
        faults = [Finding("T102", f"{self.name}: {message}", fix=fix) for met, message, fix in checks if not met]
        if faults:
            raise MethodError(faults)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item) for item in value) + "]"
    if isinstance(value, str) and (not _WORD.fullmatch(value) or value.lower() in ("true", "false", "none")):
        return repr(value)
    return str(value)


@dataclass(frozen=True)
class Sum(Method):
    """Several methods at once, made by `+`; linear ports sum, parameters add up their changes."""

    name: ClassVar[str] = "sum"
    title: ClassVar[str] = "sum"
    methods: tuple[Method, ...]

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods summed, in the order they were written."""
        return self.methods

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.methods)
