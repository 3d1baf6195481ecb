"""What the outputs of a head mean: the names of classes and their ids, or the scale of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

__all__ = ["Label", "Labels", "Scale", "is_number", "label_name", "truth"]

Label = str | int | bool


@dataclass(frozen=True, slots=True)
class Labels:
    """Class names in the order of their ids.

    Words are sorted as words, whole numbers (also those written as text) as numbers, truth values as false, true.

    Example:
        >>> labels = Labels.of(["10", "9", "9"])
        >>> labels.names, labels.id("10"), labels.name(0)
        (('9', '10'), 1, '9')
    """

    names: tuple[str, ...]
    #: Whether a row may have several of them, or none.
    several: bool = False

    @classmethod
    def of(cls, values: Iterable[Label], *, several: bool = False) -> Labels:
        """The labels that occur in `values`."""
        names = {label_name(value) for value in values}
        if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
            return cls(tuple(sorted(names, key=lambda name: (int(name), name))), several)
        return cls(tuple(sorted(names)), several)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, value: Label) -> bool:
        return label_name(value) in self.names

    def id(self, value: Label) -> int:
        """The id of a label; ValueError for one that is not there."""
        if value not in self:
            raise ValueError(f"no label {value!r}; labels: {', '.join(self.names)}")
        return self.names.index(label_name(value))

    def name(self, id: int) -> str:
        """The name of an id."""
        return self.names[id]

    @property
    def ids(self) -> dict[str, int]:
        """Name to id."""
        return {name: id for id, name in enumerate(self.names)}

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back; plain JSON."""
        return {"names": list(self.names)} | ({"several": True} if self.several else {})

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Labels:
        """The labels that `to_dict` wrote."""
        return cls(tuple(stored["names"]), bool(stored.get("several")))


@dataclass(frozen=True, slots=True)
class Scale:
    """The mean and the standard deviation of the numbers to be told; a model tells them in standard units.

    Example:
        >>> scale = Scale.of([1.0, 3.0])
        >>> scale.standard(3.0), scale.value(1.0)
        (1.0, 3.0)
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """The scale of these numbers."""
        deviation = pstdev(values)
        return cls(fmean(values), deviation if deviation > 0 else 1.0)

    def standard(self, value: float) -> float:
        """A number in standard units."""
        return (value - self.mean) / self.deviation

    def value(self, standard: float) -> float:
        """The number that a model means."""
        return self.mean + self.deviation * standard

    def to_dict(self) -> dict[str, float]:
        """What `Scale(**...)` reads back; plain JSON."""
        return {"mean": self.mean, "deviation": self.deviation}


def label_name(value: Label) -> str:
    """A label as text: truth values as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def truth(value: Any) -> bool | None:
    """What a row says of true and false: as JSON has it, as a CSV file writes it, or as 1 and 0; None for all else.

    Example:
        >>> truth("False"), truth(1), truth("maybe")
        (False, True, None)
    """
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def is_number(value: Any) -> bool:
    """Whether this is a finite number, or text that reads as one, as the cells of a CSV file do.

    Example:
        >>> is_number("4.5"), is_number("nan"), is_number(True)
        (True, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False
