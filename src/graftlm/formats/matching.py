"""Which modules of a model the words of a PEFT configuration mean, by PEFT 0.21.2's own rules, and words for modules.

The rules are those of PEFT's `check_target_module_exists`, `_set_trainable` and `get_pattern_key`; they differ from our
selectors (a role is a role here, and only a name there), so files are always read by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from graftlm.core import Survey, linear_kind
from graftlm.errors import Finding, GraftError, nearest

__all__ = [
    "exactly",
    "kept",
    "parameter_suffixes",
    "pattern_of",
    "selectors_for",
    "shortest_suffixes",
    "targeted",
    "targeted_or_faults",
    "targeted_parameters",
]

#: Names under which PEFT looks for the head of a classifier when "all-linear" is expanded.
_CLASSIFIERS = ("score", "classifier")


def targeted(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The paths of the modules that `target_modules` and its companions select. Raises re.error for a bad pattern."""
    targets = config["target_modules"] or ()
    excluded = config.get("exclude_modules") or ()
    saved = config.get("modules_to_save") or ()
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, config.get("task_type"))
    found = []
    for path, _ in model.named_modules():
        if not path or _is_excluded(excluded, path):
            continue
        if any(re.match(rf"(^|.*\.){word}($|\..*)", path) for word in saved):
            continue
        if isinstance(targets, str):
            hit = re.fullmatch(targets, path) is not None
        else:
            hit = path in targets or (_ends(targets, path) and _in_layers(config, path))
        if hit:
            found.append(path)
    return found


def targeted_or_faults(
    config: Mapping[str, Any], model: nn.Module, peft_type: str, kinds: Iterable[str] | None
) -> tuple[list[str], list[Finding]]:
    """As `targeted`, with what is wrong with it: words that match nothing, modules of other `kinds` (None: of any)."""
    words = config.get("target_modules")
    if not words:
        return [], []
    paths = targeted(config, model)
    modules = dict(model.named_modules())
    faults = []
    if not paths:
        names = {path.rpartition(".")[2] for path, module in modules.items() if kinds is None or linear_kind(module)}
        shown = words if isinstance(words, str) else ", ".join(map(str, words[:4]))
        close = [near for word in (words if isinstance(words, list) else [words]) for near in nearest(word, names)]
        hint = f", nearest: {', '.join(dict.fromkeys(close))}" if close else ""
        faults.append(Finding("A217", f"target_modules ({shown}) match nothing in {type(model).__name__}{hint}"))
    if kinds is None:
        return paths, faults
    allowed = tuple(kinds)
    faults += [
        Finding("A217", f"{path} is a {type(modules[path]).__name__}, which {peft_type} cannot target here")
        for path in paths
        if linear_kind(modules[path]) not in allowed
    ]
    return paths, faults


def targeted_parameters(words: Iterable[str], model: nn.Module) -> list[str]:
    """The parameters that `target_parameters` means: whole names, or what they end with at a dot."""
    return [name for name, _ in model.named_parameters() if _ends(tuple(words), name)]


def kept(words: Iterable[str], model: nn.Module) -> list[str]:
    """The outermost modules that `modules_to_save` means: every path that ends with a word, at a dot or not."""
    endings = tuple(words)
    found: list[str] = []
    for path, _ in model.named_modules(remove_duplicate=False):
        inside = any(path.startswith(outer + ".") for outer in found)
        if path and endings and path.endswith(endings) and not inside:
            found.append(path)
    return found


def pattern_of(patterns: Iterable[str], path: str) -> str | None:
    """The first of `patterns` that names the end of `path`, as in `rank_pattern`."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)


def shortest_suffixes(wanted: Iterable[str], model: nn.Module) -> list[str] | str:
    """The shortest dotted suffixes that select exactly the paths `wanted`; a regular expression where none do."""
    chosen = set(wanted)
    taken = {suffix for path, _ in model.named_modules() if path not in chosen for suffix in _suffixes(path)}
    found = {next((suffix for suffix in _suffixes(path) if suffix not in taken), None) for path in chosen}
    if None in found:
        return "|".join(re.escape(path) for path in sorted(chosen))
    return sorted(suffix for suffix in found if suffix is not None)


def parameter_suffixes(wanted: Iterable[str], model: nn.Module) -> list[str]:
    """The shortest dotted suffixes that mean exactly the parameters `wanted`, each with its module's name."""
    chosen = set(wanted)
    taken = {suffix for name, _ in model.named_parameters() if name not in chosen for suffix in _suffixes(name)}
    return sorted({next((s for s in _suffixes(name)[1:] if s not in taken), name) for name in chosen})


def selectors_for(words: str | Sequence[str], paths: Sequence[str], here: Survey) -> list[str]:
    """Our selectors for exactly `paths`: PEFT's words where ours mean the same by them, else exact paths."""
    if not isinstance(words, str):
        words = sorted(words)
        try:
            if {site.path for site in here.select(words)} == set(paths):
                return list(words)
        except GraftError:
            pass
    return [exactly(path) for path in paths]


def exactly(path: str) -> str:
    """A selector of ours that means the module at `path` and no other, even where its name is also a role."""
    return path if "." in path else f"({re.escape(path)})"


def _suffixes(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[start:]) for start in range(len(words) - 1, -1, -1)]


def _ends(words: Sequence[str], path: str) -> bool:
    return any(path == word or path.endswith(f".{word}") for word in words)


def _is_excluded(words: str | Sequence[str], path: str) -> bool:
    return re.fullmatch(words, path) is not None if isinstance(words, str) else _ends(words, path)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if match := re.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", path):
            return int(match["index"]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _all_linear(model: nn.Module, task: str | None) -> list[str]:
    find: Any = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    if output is None and task == "SEQ_CLS":
        output = next((getattr(model, name) for name in _CLASSIFIERS if hasattr(model, name)), None)
    return [
        path
        for path, module in model.named_modules()
        if linear_kind(module) in ("linear", "conv1d") and module is not output
    ]
