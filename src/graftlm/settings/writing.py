"""How settings are written down: as plain values for run.json, and as a run file that reads back to the same."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from .schema import SETTINGS, RunSettings

__all__ = ["dump", "recorded", "to_yaml"]

#: Section and name of a setting that there was once -> its name now, and what each value is now.
_ONCE: dict[tuple[str, str], tuple[str, dict[Any, Any]]] = {
    ("train", "gradient_checkpointing"): ("recompute", {True: "blocks"}),
}


def _safe(value: Any) -> Any:
    """Text with control characters is quoted, because the plain style loses some of them."""
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value


def dump(settings: RunSettings) -> dict[str, Any]:
    """Every setting as plain JSON values, nested by section; `RunSettings(**dump(x)) == x`.

    Example:
        >>> dump(RunSettings())["train"]["batch"]
        16
    """
    return settings.model_dump(mode="json")


def recorded(values: Mapping[str, Any]) -> RunSettings:
    """The settings that `dump` once wrote, by this version or an earlier one.

    Raises SettingsError where there are settings that no version up to this one has had.

    Example:
        >>> recorded({"train": {"batch": 8, "gradient_checkpointing": True}}).train.recompute
        'blocks'
    """
    tree: dict[str, Any] = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }
    for (section, old), (new, words) in _ONCE.items():
        inside = tree.get(section)
        if isinstance(inside, dict) and old in inside:
            value = inside.pop(old)
            if value in words:
                inside[new] = words[value]
    return RunSettings(**tree)


def to_yaml(settings: RunSettings, only_changed: bool = True) -> str:
    """A run file with the settings that differ from the defaults, or with all of them and what each means.

    Example:
        >>> print(to_yaml(RunSettings(task="lm")), end="")
        task: lm
    """
    tree = CommentedMap()
    for setting in SETTINGS.values():
        value = setting.of(settings)
        if only_changed and value == setting.default:
            continue
        section = tree.setdefault(setting.section, CommentedMap()) if setting.section else tree
        is_map = isinstance(value, dict)
        section[setting.key] = (
            {_safe(role): _safe(column) for role, column in value.items()} if is_map else _safe(value)
        )
        if not only_changed:
            usual = ", ".join(setting.choices) or (setting.usual_text and f"usually {setting.usual_text}")
            usual = f" ({usual})" if usual else ""
            section.yaml_add_eol_comment(setting.text + usual, setting.key, column=32)
    yaml = YAML()
    yaml.width = 1 << 20  # a long value stays on its line
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    out = StringIO()
    yaml.dump(tree, out)
    return out.getvalue()
