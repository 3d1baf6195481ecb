"""Methods that installed packages add: entry points of the group `graftlm.methods`, each a name and a class.

A package says in its `pyproject.toml` which classes it has, and needs nothing else to be found:

    [project.entry-points."graftlm.methods"]
    layerscale = "graftlm_layerscale:LayerScale"

The names are read from the packages' metadata; a package's code runs when one of its methods is asked for, or told of.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points

from graftlm.core import Method
from graftlm.errors import Finding, MethodError

__all__ = ["GROUP", "load_plugin", "package_of", "plugin_names"]

GROUP = "graftlm.methods"


def plugin_names() -> set[str]:
    """The names that installed packages offer; nothing of theirs is run.

    Example:
        >>> plugin_names()                                                                     # doctest: +SKIP
        {'layerscale'}
    """
    return {point.name for point in entry_points(group=GROUP)}


def load_plugin(name: str) -> type[Method] | None:
    """The class that an installed package offers as the method `name`; None where none does.

    Raises MethodError where it cannot be loaded, is no method of that name, or comes from several packages.

    Example:
        >>> load_plugin("layerscale")                                                          # doctest: +SKIP
        <class 'graftlm_layerscale.LayerScale'>
    """
    points = sorted(entry_points(group=GROUP, name=name), key=_package)
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        offers = " and ".join(f"{_package(point)} ({point.value})" for point in points)
        raise MethodError(
            Finding("T117", f"method {name!r} is offered by {offers}: which one is meant cannot be told",
                    fix=f"pip uninstall {_package(points[-1]).partition(' ')[0]}")
        )  # fmt: skip
    point = points[0]
    package = _package(point)
    try:
        kind = point.load()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise MethodError(
            Finding("T115", f"method {name!r} of the package {package} cannot be loaded from {point.value}: {why}",
                    fix=f"pip install --upgrade {package.partition(' ')[0]}")
        ) from error  # fmt: skip
    if wrong := _wrong(kind, name):
        raise MethodError(Finding("T116", f"method {name!r} of the package {package}: {point.value} {wrong}"))
    return kind  # type: ignore[no-any-return]


def package_of(name: str) -> str:
    """The package that offers the method `name`, with its version; "" where none does."""
    return next((_package(point) for point in entry_points(group=GROUP, name=name)), "")


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "that is not named"


def _wrong(kind: object, name: str) -> str:
    """What keeps `kind` from being the method `name`; "" for nothing."""
    if not inspect.isclass(kind) or not issubclass(kind, Method):
        return f"is {kind!r}, wanted a subclass of graftlm.core.Method"
    if "__dataclass_fields__" not in vars(kind):
        return "is no dataclass: its settings could not be read. Wanted @dataclass(frozen=True) above it"
    missing = [word for word in ("name", "title") if not isinstance(getattr(kind, word, None), str)]
    if missing:
        return f"has no {' and no '.join(missing)}"
    return "" if kind.name == name else f"is named {kind.name!r}; its entry point must bear that name"
