"""How settings come together: the run file, then `--set`, then flags and Python, each value with its origin.

Every fault of every source is told at once, with its place. A run file is YAML 1.2 (`2e-4` is a number, `yes` is
text), nested by section; a dotted key such as `train.epochs: 3` is the same as the nested one. What a value is
follows from its setting: the text of a number is a number wherever it stands, that of a path is a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from graftlm.errors import Finding, SettingsError, nearest

from .faults import (
    Given,
    Stranger,
    contradictions,
    meant,
    name_of,
    not_a_section,
    placed,
    printable,
    read,
    strangers,
    wrong_value,
)
from .foreign import known_elsewhere
from .schema import FLAGS, KEYS, SECTIONS, SETTINGS, RunSettings, Setting, whole_of

__all__ = ["Attempted", "Resolved", "attempt", "resolve"]

_MOST_BYTES = 1 << 20
_PLAIN_TAGS = ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")
_NULL = ("", "null", "~")


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and where each came from.

    `origin` has every dotted name: `default`, `run.yaml:7:3` (file:line:column of the key), `--lr`, `--set`,
    `python`, or `decided` for what the run itself chose.
    """

    settings: RunSettings
    origin: dict[str, str]

    def decide(self, values: Mapping[str, Any]) -> Resolved:
        """These settings with what the run decided, by dotted name; only a None or an `auto` can be decided.

        Raises:
            ValueError: a setting that was given, or that has a value of its own.
            SettingsError: a value that the schema refuses.

        Example:
            >>> resolve().decide({"train.epochs": 3.0}).origin["train.epochs"]
            'decided'
        """
        for name in values:
            if SETTINGS[name].of(self.settings) not in (None, "auto"):
                raise ValueError(f"{name} is {SETTINGS[name].of(self.settings)!r} already, from {self.origin[name]}")
        merged = {name: setting.of(self.settings) for name, setting in SETTINGS.items()} | dict(values)
        return Resolved(RunSettings(**_nested(merged)), self.origin | dict.fromkeys(values, "decided"))


@dataclass(frozen=True)
class Attempted:
    """What could be read of settings: the sound ones, every fault, and the names that the faults leave open."""

    resolved: Resolved
    findings: tuple[Finding, ...]
    doubtful: frozenset[str]


@dataclass(frozen=True)
class _Tree:
    """A value with its place: either `pairs` of (key, place of the key, value), or `value`."""

    place: str
    value: Any = None
    pairs: list[tuple[str, str, _Tree]] | None = None


@dataclass
class _Source:
    """What one source gives: settings by dotted name, names that are none, and faults."""

    given: dict[str, Given] = field(default_factory=dict)
    unknown: list[Stranger] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    mappings: set[int] = field(default_factory=set)  # nodes of the file that were read

    def is_new(self, name: str, place: str) -> bool:
        """Whether `name` is met for the first time; the second time is a fault."""
        if name in self.seen:
            before = f", first at {self.seen[name]}" if self.seen[name] != place else ""
            message = f"{printable(name)} is given twice{before}"
            self.findings.append(Finding("S111", message, place, "leave out one of the two"))
            return False
        self.seen[name] = place
        return True


def resolve(
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    python: Mapping[str, Any] | RunSettings | None = None,
) -> Resolved:
    """The settings out of all sources; a later one wins: default, `file`, `sets`, `flags`, `python`.

    Args:
        file: a run file in YAML.
        flags: values by `Flag.key`, such as `{"lr": "2e-4"}`; text is read, None means not given.
        sets: texts `name=value`, such as `train.warmup=0.1`; `null` takes a value back.
        python: values by dotted name or nested by section, or settings (what they were given counts); types are
            not converted.

    Raises:
        SettingsError: with every fault that was found (codes S101 to S111).

    Example:
        >>> resolve(sets=["train.batch=8"]).settings.train.batch
        8
    """
    attempted = attempt(file, flags, sets, python)
    if attempted.findings:
        raise SettingsError(attempted.findings)
    return attempted.resolved


def attempt(
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    python: Mapping[str, Any] | RunSettings | None = None,
) -> Attempted:
    """As `resolve`, but with the faults beside the settings that are sound; what is faulty has its default.

    Example:
        >>> found = attempt(sets=["train.batch=8", "data.eval_share=20"])
        >>> found.resolved.settings.train.batch, found.findings[0].code, sorted(found.doubtful)
        (8, 'S105', ['data.eval_share'])
    """
    sources = [
        *([_from_file(file)] if file is not None else []),
        _from_sets(sets),
        _from_flags(flags or {}),
        _from_python(python or {}),
    ]
    findings = [finding for source in sources for finding in source.findings]
    doubtful: set[str] = set()
    for source in sources:  # together by source, because foreign names of one file are told in one breath
        findings += strangers(source.unknown)
        doubtful |= {name for stranger in source.unknown for name in meant(stranger)}
    given: dict[str, Given] = {}
    for source in sources:
        if any(finding.code in ("S109", "S110") for finding in source.findings):  # nobody knows what the file says
            doubtful |= set(SETTINGS)
        else:
            doubtful |= {name for finding in source.findings for name in SETTINGS if name in finding.message.split()}
        doubtful -= set(source.given)  # what a later source says counts
        for name, item in source.given.items():
            if (whole := whole_of(name)) != name:  # --set data.map.prompt=question adds to the map that is there
                below = given[whole].value if whole in given else {}
                role, name = name.removeprefix(f"{whole}."), whole
                item = Given(
                    {**(below if isinstance(below, dict) else {}), role: item.value}, item.place, item.origin, item.via
                )
            given[name] = item
    settings, faults, wrong = _validated(given)
    origin = {name: given[name].origin if name in given and name not in wrong else "default" for name in SETTINGS}
    told = tuple(sorted(findings + faults, key=_order))
    return Attempted(Resolved(settings, origin), told, frozenset(doubtful | wrong))


def _validated(given: Mapping[str, Given]) -> tuple[RunSettings, list[Finding], set[str]]:
    """The sound settings, what is wrong with the others, and which these are.

    Wrong are values first, and contradictions among the sound ones.
    """
    try:
        return RunSettings.model_validate(_nested({name: item.value for name, item in given.items()})), [], set()
    except ValidationError as error:
        wrong = {name_of(fault): fault["type"] for fault in error.errors(include_url=False) if fault["loc"]}
    findings = [wrong_value(kind, name, given[name]) for name, kind in wrong.items()]
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    sound = {name: given[name].value if name in given else defaults[name] for name in SETTINGS if name not in wrong}
    clashes = contradictions(sound)
    out = set(wrong).union(*(clash.names for clash in clashes))
    left = RunSettings.model_validate(_nested({name: item.value for name, item in given.items() if name not in out}))
    return left, findings + [placed(clash, given) for clash in clashes], out


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return nested


def _order(finding: Finding) -> tuple[bool, int, int]:
    """Findings of the file by line and column, then the others as they came."""
    place = re.search(r":(\d+):(\d+)$", finding.place)
    return (False, int(place[1]), int(place[2])) if place else (True, 0, 0)


def _from_sets(sets: Sequence[str]) -> _Source:
    source = _Source()
    for text in sets:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            source.findings.append(Finding("S108", f"{text!r} has no name=value", "--set", _set_fix(name)))
            continue
        if not source.is_new(name, "--set"):
            continue
        _take(source, name, Given(value, "--set", "--set", "set"))
    return source


def _set_fix(name: str) -> str:
    setting = SETTINGS.get(name)
    if setting is None:
        return "--set train.warmup=0.1"
    return f"--set {name}={setting.default if setting.default not in (None, {}) else '<value>'}"


def _take(source: _Source, name: str, given: Given) -> None:
    """Files text that was given for a dotted name: as a setting, one of the pairs of a setting, or a fault."""
    if whole_of(name) != name and not name.endswith("."):
        source.given[name] = given
    elif name in SETTINGS:
        source.given[name] = Given(_read(given.value, SETTINGS[name]), given.place, given.origin, given.via)
    elif name in SECTIONS:
        source.findings.append(not_a_section(name, given))
    else:
        source.unknown.append(Stranger(name, given))


def _read(value: Any, setting: Setting) -> Any:
    if not isinstance(value, str):
        return value
    return None if setting.optional and value.strip().lower() in _NULL else read(value, setting)


def _from_flags(flags: Mapping[str, Any]) -> _Source:
    source = _Source()
    by_key = {flag.key: flag for flag in FLAGS if flag.setting}
    for key, value in flags.items():
        flag = by_key[key]  # a KeyError here is a defect of the command line
        if value is not None and flag.setting:
            # Only `--set` takes a value back, so a flag's text is never read as null.
            item = read(value, SETTINGS[flag.setting]) if isinstance(value, str) else value
            source.given[flag.setting] = Given(item, flag.label, flag.label, "flag")
    return source


def _from_python(values: Mapping[str, Any] | RunSettings) -> _Source:
    source = _Source()

    def tree(value: Any) -> _Tree:
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if not isinstance(value, Mapping):
            return _Tree("", value)
        return _Tree("", value, [(str(key), "", tree(child)) for key, child in value.items()])

    _walk(source, tree(values), "", "python")
    return source


def _walk(source: _Source, tree: _Tree, prefix: str, via: str) -> None:
    for key, place, child in tree.pairs or ():
        name = prefix + key
        origin = place if via == "file" else via
        if not source.is_new(name, place):
            continue
        if name in SETTINGS:
            value = _of_tree(source, child, SETTINGS[name]) if via == "file" else child.value
            source.given[name] = Given(value, child.place, origin, via)
        elif name in SECTIONS:
            if child.pairs is not None:
                _walk(source, child, f"{name}.", via)
            elif child.value is not None:
                source.findings.append(not_a_section(name, Given(child.value, child.place, origin, via)))
        else:
            source.unknown.append(Stranger(name, Given(child.value, place, origin, via)))
            source.unknown.extend(_inside(name, key, child, via))


def _inside(name: str, key: str, tree: _Tree, via: str) -> Iterator[Stranger]:
    """The names under an unknown section that would be strangers under the section that was probably meant."""
    meant = nearest(key, SECTIONS, most=1)
    for inner, place, child in tree.pairs or ():
        said = f"{meant[0]}.{inner}" not in SETTINGS if meant else known_elsewhere(inner) or inner in KEYS
        if said:
            yield Stranger(f"{name}.{inner}", Given(child.value, place, place or via, via))


def _of_tree(source: _Source, tree: _Tree, setting: Setting) -> Any:
    """The value of a setting in a run file; what is empty stays None, quoted or not."""
    if tree.pairs is None:
        return read(tree.value, setting) if isinstance(tree.value, str) else tree.value
    if setting.kind != "name=value pairs":
        return {}
    return {role: child.value for role, place, child in tree.pairs if source.is_new(f"{setting.name}.{role}", place)}


def _from_file(file: Path) -> _Source:
    source = _Source()
    try:
        if file.stat().st_size > _MOST_BYTES:
            message = f"has {file.stat().st_size:,} bytes; a run file has a few hundred".replace(",", " ")
            source.findings.append(Finding("S109", message, str(file), "give data as DATA, not with --config"))
            return source
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        place = f"{file}:{line}:{column}"
        source.findings.append(Finding("S110", f"byte 0x{error.object[error.start]:02x} is not UTF-8", place))
        return source
    except OSError as error:
        source.findings.append(_cannot_open(file, error))
        return source
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        source.findings.append(Finding("S110", "nested too deeply", str(file)))
        return source
    except YAMLError as error:
        source.findings.append(_not_yaml(file, text, error))
        return source
    if root is None:
        return source
    if not isinstance(root, MappingNode):
        wanted = "wanted settings, such as `train: {epochs: 3}`"
        source.findings.append(Finding("S110", f"is not a mapping; {wanted}", _place(file, root)))
        return source
    if tree := _tree(source, file, root):
        _walk(source, tree, "", "file")
    return source


def _place(file: Path, node: Node) -> str:
    return f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _tree(source: _Source, file: Path, node: Node, depth: int = 0) -> _Tree | None:
    """The nodes of a run file to the third level, with their places; nothing is constructed. None for a fault."""
    place = _place(file, node)
    tag = str(node.tag)
    if tag.rpartition(":")[2] not in _PLAIN_TAGS or not tag.startswith("tag:yaml.org,2002:"):
        word = printable(tag.removeprefix("tag:yaml.org,2002:"))
        source.findings.append(Finding("S110", f"the tag {word} is not read: settings are plain values", place))
        return None
    if isinstance(node, ScalarNode):
        return _Tree(place, None if tag.endswith(":null") else node.value)
    if isinstance(node, SequenceNode):
        return _Tree(place, [item.value if isinstance(item, ScalarNode) else None for item in node.value])
    if depth > 2:
        return _Tree(place, {})
    if id(node) in source.mappings:  # a few nested aliases could stand for billions of values
        source.findings.append(Finding("S110", "an alias of a mapping is not read: write it out", place))
        return None
    source.mappings.add(id(node))
    pairs = []
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            source.findings.append(Finding("S104", "a name must be text", _place(file, key)))
        elif child := _tree(source, file, value, depth + 1):
            key_place = _place(file, key)
            empty = isinstance(value, ScalarNode) and not value.value  # an empty value stands nowhere: at its key
            pairs.append((key.value, key_place, _Tree(key_place, child.value) if empty else child))
    return _Tree(place, {}, pairs)


def _cannot_open(file: Path, error: OSError) -> Finding:
    if not isinstance(error, FileNotFoundError):
        return Finding("S109", f"cannot be read: {error.strerror}", str(file))
    folder = file.parent
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    close = nearest(file.name, names, most=1)
    beside = [name for name in sorted(names) if name.endswith((".yaml", ".yml"))]
    detail = (f"{folder} has {', '.join(beside[:6])}",) if beside and not close else ()
    if not folder.is_dir():
        detail = (f"there is no folder {folder}",)
    return Finding("S109", f"no file {str(file)!r}", "", f"-c {folder / close[0]}" if close else "", detail)


def _not_yaml(file: Path, text: str, error: YAMLError) -> Finding:
    """The first fault of the syntax, with its line and a caret under it."""
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        context = f" ({error.context})" if error.context else ""
        message = f"{error.problem or 'not YAML'}{context}"
    else:  # a character that YAML does not allow
        position = getattr(error, "position", 0)
        line, column = text.count("\n", 0, position), position - text.rfind("\n", 0, position) - 1
        message = f"the character U+{ord(text[position]):04X} is not allowed" if position < len(text) else "not YAML"
    lines = text.splitlines()
    shown = printable(lines[line].replace("\t", " ")) if line < len(lines) else ""
    start = max(0, column - 60)  # a long line is shown around the fault
    fix = ""
    if "'\\t'" in message:
        fix = "indent with spaces"
    elif "another document" in message:
        fix = "keep one document: no line with ---"
    elif "mapping values" in message:
        fix = "put the value in quotes"
    return Finding(
        "S110",
        message,
        f"{file}:{line + 1}:{column + 1}",
        fix,
        (shown[start : start + 100], " " * (column - start) + "^"),
    )
