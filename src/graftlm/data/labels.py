"""The names of the classes and their ids: what a classifier's outputs mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Label", "Labels"]

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

    @classmethod
    def of(cls, values: Iterable[Label]) -> Labels:
        """The labels that occur in `values`."""
        names = {label_name(value) for value in values}
        if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
            return cls(tuple(sorted(names, key=lambda name: (int(name), name))))
        return cls(tuple(sorted(names)))

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
        return {"names": list(self.names)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Labels:
        """The labels that `to_dict` wrote."""
        return cls(tuple(stored["names"]))


def label_name(value: Label) -> str:
    """A label as text: truth values as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else str(value)
