"""What is said of a faulty setting: the codes, and the words for an unknown name, a wrong value, a contradiction."""

from __future__ import annotations

import contextlib
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from graftlm.errors import Finding, SettingsError, nearest

from .foreign import NO_COUNTERPART, known_elsewhere
from .schema import FLAGS, SECTIONS, SETTINGS, Setting, number, whole_of

__all__ = [
    "CODES",
    "Clash",
    "Given",
    "Stranger",
    "as_settings_error",
    "contradictions",
    "meant",
    "name_of",
    "not_a_section",
    "placed",
    "printable",
    "read",
    "settings_error",
    "strangers",
    "wrong_value",
]

CODES: dict[str, str] = {
    "S101": "a setting that does not exist",
    "S102": "a setting that stands in the wrong section",
    "S103": "a name from another tool",
    "S104": "a value of the wrong type",
    "S105": "a value outside the range that can work",
    "S106": "a value that is not one of the choices",
    "S107": "settings that contradict each other",
    "S108": "--set without a name and a value",
    "S109": "a run file that cannot be opened",
    "S110": "a run file that is not valid YAML",
    "S111": "a setting that is given twice",
}
"""Every code that the settings can give, with its meaning in one line."""

_SAID_ONE_BY_ONE = 4  # foreign names; more of them share one finding, so that all fit into an error's twelve lines
_ONLINE = ("grpo", "ppo", "rloo")
_LISTED = 10  # lines of that list, so that the whole error has twelve
_FIRST = {"data": "path", "model": "name"}  # what someone means who gives a section one value
_YES_NO = {"yes": True, "on": True, "y": True, "1": True, "no": False, "off": False, "n": False, "0": False}


@dataclass(frozen=True)
class Given:
    """A value as it was given: `place` for a finding about it, `origin` as it is kept, `via` the face it came by."""

    value: Any
    place: str = ""
    origin: str = "python"
    via: str = "python"  # file | set | flag | python


@dataclass(frozen=True)
class Stranger:
    """A name that is no setting, with its value; the name is as it can be shown."""

    name: str
    given: Given

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))


@dataclass(frozen=True)
class Clash:
    """A contradiction among `names`; `mend` is the setting and the value that would end it, if one can be told."""

    names: tuple[str, ...]
    message: str
    mend: tuple[str, Any] | None = None
    fix: str = ""


def printable(text: str) -> str:
    """`text` without characters that would steer a terminal or break its line; the length stays.

    Example:
        >>> printable("a\\nb")
        'a\ufffdb'
    """
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def read(text: str, setting: Setting) -> Any:
    """The value that `text` is for `setting`; the text itself where it is none (the schema then refuses it).

    Example:
        >>> read("2e-4", SETTINGS["train.learning_rate"]), read("1e3", SETTINGS["train.steps"])
        (0.0002, 1000)
    """
    word = text.strip()
    if setting.kind == "true or false":
        return {"true": True, "false": False}.get(word.lower(), text)
    if setting.kind == "name=value pairs":
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        whole = all(separator and role.strip() and column.strip() for role, separator, column in pairs)
        return {role.strip(): column.strip() for role, _, column in pairs} if whole else text
    if setting.kind not in ("a number", "a whole number"):
        return text
    try:
        if setting.kind == "a whole number" and re.fullmatch(r"[+-]?\d[\d_]{0,30}", word):
            return int(word)
        value = float(word)
    except ValueError:
        return text
    return int(value) if setting.kind == "a whole number" and value.is_integer() else value


def _written(value: Any) -> str:
    """A value as it is typed into a run file or after a flag."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return number(value).replace(" ", "")
    if isinstance(value, Mapping):
        return printable(",".join(f"{role}={column}" for role, column in value.items()))
    return printable(str(value))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(textwrap.shorten(value, 60, placeholder="...") if len(value) > 60 else value)
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    if value is None:
        return "empty"
    return _written(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _paste(name: str, value: Any, via: str, *, whole: bool = False) -> str:
    """The text that gives `name` that `value` by the same face; `whole` names the section too."""
    written = _written(value)
    if via == "set":
        return f"--set {shlex.quote(f'{name}={written}')}"
    if via == "flag":
        label = next((flag.label for flag in FLAGS if flag.setting == name), None)
        flagged = written if label == "DATA" else f"{label} {shlex.quote(written)}"
        return flagged if label else f"--set {shlex.quote(f'{name}={written}')}"
    if via == "file":
        if isinstance(value, Mapping):
            written = printable("{" + ", ".join(f"{role}: {column}" for role, column in value.items()) + "}")
        section, _, key = name.rpartition(".")
        return f"{section}: {{{key}: {written}}}" if whole and section else f"{key}: {written}"
    return f"{name if whole else name.rpartition('.')[2]}={value!r}"


def _guess(setting: Setting, value: Any) -> Any:
    """A value that would do instead of `value`; None where none can be told."""
    if setting.kind == "true or false":
        return _YES_NO.get(_written(value).lower(), setting.default)
    low, high = (0.0, 0.0) if isinstance(setting.usual, str) else setting.usual
    if high and isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < float("inf"):
        guess = abs(float(value))
        while guess > high:
            guess = float(f"{guess / 10:.3g}")
        while guess < low:
            guess = float(f"{guess * 10:.3g}")
        if low <= guess <= high:
            return round(guess) if setting.kind == "a whole number" else guess
    if setting.default is None and high:
        return int(low) if setting.kind == "a whole number" else low
    return setting.default


def _out_of_range(setting: Setting, value: Any) -> tuple[str, Any]:
    """The message and the value that would do."""
    subject = "learning rate" if setting.key == "learning_rate" else setting.name
    guess = _guess(setting, value)
    if not isinstance(setting.usual, str) and isinstance(value, int | float) and 0 < value < float("inf"):
        low, high = setting.usual
        for ratio, word in ((value / high, "above"), (low / value, "below")):
            if ratio >= 10:
                times = number(float(f"{ratio:.2g}"))
                asked = f" Meant {_written(guess)}?" if guess is not None else ""
                usual = setting.usual_text
                return f"{subject} {number(value)} is {times} times {word} the usual range ({usual}).{asked}", guess
    usual = f" (usually {setting.usual_text})" if setting.usual else ""
    shown = number(value) if isinstance(value, int | float) and abs(value) < float("inf") else _shown(value)
    return f"{subject} is {shown}; wanted {setting.limits or 'a finite number'}{usual}", guess


def wrong_value(kind: str, name: str, given: Given) -> Finding:
    """What is wrong with the value of the setting `name`; `kind` is the schema's word for it."""
    setting = SETTINGS[name]
    value = given.value
    if kind == "string_too_short":
        return Finding("S105", f"{name} is empty; wanted {setting.kind}", given.place)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        message, guess = _out_of_range(setting, value)
        return Finding("S105", message, given.place, "" if guess is None else _paste(name, guess, given.via))
    if setting.choices:
        close = [choice for choice in setting.choices if choice == value]
        close = close or (nearest(value, setting.choices, most=1) if isinstance(value, str) else [])
        guess = close[0] if close else setting.default or setting.choices[0]
        message = f"{name} {_shown(value)} is not one of {', '.join(setting.choices)}"
        return Finding("S106", message, given.place, _paste(name, guess, given.via))
    pair = str(setting.usual).partition(",")[0]
    wanted = f"pairs such as {pair}" if setting.kind == "name=value pairs" else setting.kind
    message = f"{name} is {_shown(value)}; wanted {wanted}"
    if setting.kind == "text":
        guess = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else setting.default
    elif setting.kind == "name=value pairs":
        guess = dict([pair.split("=")])
    else:
        retried = read(value, setting) if isinstance(value, str) else value
        near = setting.kind == "a whole number" and isinstance(retried, float) and 1 <= retried < 1e9
        guess = round(retried) if near else _guess(setting, retried)
    return Finding("S104", message, given.place, "" if guess is None else _paste(name, guess, given.via))


def not_a_section(section: str, given: Given) -> Finding:
    """A section was given one value; `data: faq.jsonl` is the common case."""
    key = _FIRST.get(section)
    if key and isinstance(given.value, str):
        name = f"{section}.{key}"
        message = f"{section} is a section; {_shown(given.value)} goes under {name}"
        return Finding("S104", message, given.place, _paste(name, given.value, given.via, whole=True))
    detail = textwrap.wrap(f"{section} has {', '.join(_keys(section))}", 110)
    return Finding("S104", f"{section} is {_shown(given.value)}; wanted a section", given.place, detail=tuple(detail))


def _keys(section: str) -> list[str]:
    return [setting.key for setting in SETTINGS.values() if setting.section == section]


def _near(name: str) -> str:
    """The setting or section that was probably meant, one of its own section first; empty where none is near."""
    section, _, key = name.rpartition(".")
    inside = {own: f"{section}.{own}" if section else own for own in _keys(section)}
    anywhere = {setting.key: setting.name for setting in SETTINGS.values()} | {part: part for part in SECTIONS}
    for choices in (inside, anywhere):
        if close := nearest(key, choices, most=1):
            return choices[close[0]]
    return ""


def meant(stranger: Stranger) -> set[str]:
    """The settings that a name which is none may have been meant for."""
    known = known_elsewhere(stranger.name)
    key = stranger.name.rpartition(".")[2]
    homes = {setting.name for setting in SETTINGS.values() if setting.key == key}
    name = "method" if known and known.option else known.setting if known else _near(stranger.name)
    return homes | {setting for setting in SETTINGS if name and f"{setting}.".startswith(f"{name}.")}


def _unknown(stranger: Stranger) -> Finding:
    """A name that no tool has: the nearest settings, those of its own section first."""
    name, given = stranger.name, stranger.given
    if near := _near(name):
        return Finding("S101", f"unknown setting {name}", given.place, _renamed(near, given))
    section = name.rpartition(".")[0]
    own = _keys(section) if section in SECTIONS else [*SECTIONS, *_keys("")]
    detail = textwrap.wrap(f"{section or 'a run'} has {', '.join(own)}", 110)
    return Finding("S101", f"unknown setting {name}", given.place, detail=tuple(detail))


def _renamed(name: str, given: Given) -> str:
    return _paste(name, _fitting(name, given.value), "set") if given.via == "set" and name in SETTINGS else name


def _fitting(name: str, value: Any) -> Any:
    """`value` where the setting takes it, else what would be offered instead: a fix must not be a fault itself."""
    from .reading import resolve  # reads this module

    try:
        resolve(sets=[f"{name}={value}"])
    except SettingsError as error:
        return error.findings[0].fix.partition(f"{name}=")[2] or value
    return value


def _method_text(group: Sequence[Stranger]) -> str:
    """The method's text that says what the foreign options of `group` say; lists of targets are left to the reader."""
    options: dict[str, str] = {}
    for stranger in group:
        known, value = known_elsewhere(stranger.name), stranger.given.value
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if known and known.option and isinstance(value, str | int | float) and not isinstance(value, bool):
            options.setdefault(known.option, _written(value))
    return (
        "lora(" + ",".join(f"{option}={value}" for option, value in options.items()) + ")"
        if options
        else "lora(rank=16)"
    )


def strangers(group: Sequence[Stranger]) -> list[Finding]:
    """What is said of names that are no settings: misplaced, from another tool, or unknown."""
    findings: list[Finding] = []
    renamed: list[tuple[Finding, Stranger, str]] = []  # with what to write instead
    text = _method_text(group)
    for stranger in group:
        name, given = stranger.name, stranger.given
        key = name.rpartition(".")[2]
        home = next((setting.name for setting in SETTINGS.values() if setting.key == key), None)
        known = known_elsewhere(name)
        code, fix, instead = "S103", "", known.setting if known else ""
        if home and not known:
            code, fix, instead = "S102", _renamed(home, given), home
            message = f"belongs under {home.rpartition('.')[0]}" if "." in home else "belongs at the top"
        elif known and known.option:
            message = f"is said in the method's text here, as {known.option}"
            fix = _paste("method", text, given.via)
        elif known and known.note:
            message = f"is called {known.setting} here ({known.note})"
            instead += "" if known.setting == "method" else f" ({known.note})"
            written = re.fullmatch(r"(\w+): (\S+)", known.note)
            if written and known.setting.rpartition(".")[2] == written[1]:
                fix = _paste(known.setting, written[2], given.via, whole=True)
        elif known:
            message = f"is called {known.setting} here"
            simple = isinstance(given.value, str | int | float)
            value = _fitting(known.setting, given.value) if simple and given.via == "set" else given.value
            fix = _paste(known.setting, value, given.via, whole=True) if simple else known.setting
        elif key.lower().replace("-", "_") in NO_COUNTERPART:
            message = "has no counterpart here: leave it out"
        else:
            findings.append(_unknown(stranger))
            continue
        renamed.append((Finding(code, f"{name} {message}", given.place, fix), stranger, instead))
    if len(renamed) <= _SAID_ONE_BY_ONE:
        return [finding for finding, _, _ in renamed] + findings
    return [_all_at_once([(stranger, instead) for _, stranger, instead in renamed], text), *findings]


def _all_at_once(renamed: Sequence[tuple[Stranger, str]], text: str) -> Finding:
    """One finding for many names with what to write instead; those without a counterpart come last."""
    lines = _listed(renamed)
    if len(lines) > _LISTED:  # the remarks in brackets go first, the names stay
        lines = _listed([(stranger, instead.partition(" ")[0]) for stranger, instead in renamed])
    first = renamed[0][0].given
    fix = _paste("method", text, first.via) if any(instead == "method" for _, instead in renamed) else ""
    message = f"{len(renamed)} names are of another tool or place; here they are"
    return Finding("S103", message, first.place, fix, tuple(lines))


def _listed(renamed: Sequence[tuple[Stranger, str]]) -> list[str]:
    names: dict[str, list[str]] = {}
    for stranger, instead in renamed:
        names.setdefault(instead, []).append(stranger.name)
    dropped = names.pop("", [])
    pairs = [f"{', '.join(olds)} -> {instead}".replace(" ", "\0") for instead, olds in names.items()]
    lines = [line.replace("\0", " ") for line in textwrap.wrap("; ".join(pairs), 115)]
    return lines + (textwrap.wrap("no counterpart, leave out: " + ", ".join(dropped), 115) if dropped else [])


def contradictions(values: Mapping[str, Any]) -> list[Clash]:
    """The contradictions among settings by dotted name; those that need a name which `values` lacks are left out.

    Example:
        >>> contradictions({"train.epochs": 1.0, "train.steps": 9})[0].names
        ('train.epochs', 'train.steps')
    """
    found: list[Clash] = []
    have = values.keys()

    def both(first: str, second: str, why: str) -> None:
        if {first, second} <= have and values[first] is not None and values[second] is not None:
            fix = f"leave out {first} or {second}"
            found.append(Clash((first, second), f"{first} and {second} are both set: {why}", (first, None), fix))

    both("train.epochs", "train.steps", "each says how long to train")
    both("data.eval_share", "data.eval_path", "the rows to evaluate on come from one of them")
    if values.get("data.mixture") and values.get("data.path") is not None:
        fix = f"leave out data.path, or write {values['data.path']}=1 into data.mixture"
        message = "data.path and data.mixture are both set: rows come from one of them"
        found.append(Clash(("data.path", "data.mixture"), message, None, fix))
    if {"train.batch", "train.accumulate"} <= have and values["train.batch"] % values["train.accumulate"]:
        batch, parts = values["train.batch"], values["train.accumulate"]
        message = f"train.batch {batch} cannot be split into train.accumulate {parts} equal parts"
        found.append(Clash(("train.batch", "train.accumulate"), message, ("train.batch", -(-batch // parts) * parts)))
    if {"model.quantize", "method"} <= have and values["model.quantize"] is not None:
        methods = re.findall(r"(?:^|\+)\s*(\w+)", re.sub(r"\([^()]*\)", "", values["method"]))
        if "full" in methods:
            message = f"full fine-tuning cannot train quantized weights (model.quantize {values['model.quantize']})"
            mend = ("method", "lora(rank=16,targets=all-linear)")
            found.append(Clash(("method", "model.quantize"), message, mend))
    starts_there = re.search(r"\bstart\s*=\s*['\"]?loftq\b", values.get("method", ""))
    if starts_there and values.get("model.quantize", "unknown") is None:
        message = "start=loftq makes up for what packing lost, and the base is not packed (model.quantize)"
        found.append(Clash(("method", "model.quantize"), message, ("model.quantize", "nf4")))
    if values.get("train.group_by_length") and values.get("task") in _ONLINE:
        message = f"train.group_by_length does nothing for {values['task']}: the order of prompts is its own"
        found.append(Clash(("train.group_by_length", "task"), message, ("train.group_by_length", False)))
    if values.get("data.stream"):
        found += _streamed(values)
    greedy = values.get("generate.temperature") == 0
    if greedy and values.get("generate.top_p", 1) < 1:
        top_p = number(values["generate.top_p"])
        message = f"generate.top_p {top_p} does nothing at generate.temperature 0 (greedy)"
        found.append(Clash(("generate.top_p", "generate.temperature"), message, ("generate.temperature", 0.7)))
    return found


def _streamed(values: Mapping[str, Any]) -> list[Clash]:
    """What a stream of rows cannot be, since its rows are not there at once."""
    found: list[Clash] = []

    def unless(name: str, wanted: Any, why: str) -> None:
        if name in values and values[name] != wanted and not (wanted is None and not values[name]):
            message = f"data.stream and {name} are both set: {why}"
            found.append(Clash((name, "data.stream"), message, (name, wanted), f"leave out {name} or --stream"))

    unless("train.epochs", None, "how many rows a pass has is not known; say train.steps")
    if values.keys() >= {"train.steps", "train.epochs"} and values["train.steps"] is values["train.epochs"] is None:
        message = "data.stream needs train.steps: how many rows a pass has is not known"
        found.append(Clash(("data.stream", "train.steps"), message, ("train.steps", 1000)))
    every = "which rows these are is known only when all are read"
    unless("data.eval_share", None, f"{every}; name a file, data.eval_path")
    unless("data.group", None, every)
    unless("data.mixture", {}, every)
    unless("data.merge_labels", False, "labels are known before rows are read")
    unless("train.packing", False, "texts are packed when all are there")
    unless("train.group_by_length", False, "rows are put in order of length when all are there")
    with contextlib.suppress(TypeError, ValueError):
        if float(values.get("data.test") or 0) > 0:
            unless("data.test", None, f"{every}; name a file")
    if values.get("task") in _ONLINE:
        unless("task", "sft", "prompts are asked again and again, and are few")
    return found


def settings_error(clashes: Iterable[Clash]) -> SettingsError:
    """The error for settings that were made in Python and contradict each other."""
    return SettingsError(
        Finding(
            "S107", clash.message, fix=clash.fix or (_paste(*clash.mend, "python", whole=True) if clash.mend else "")
        )
        for clash in clashes
    )


def placed(clash: Clash, given: Mapping[str, Given]) -> Finding:
    """A contradiction with the places that its settings come from."""
    here = [(name, given[name]) for name in clash.names if name in given]
    via = here[0][1].via if here else "python"
    apart = len({item.via for _, item in here}) > 1
    if clash.mend and clash.mend[1] is None:  # one of two must go: by default the one that was said with less force
        fix = f"--set {here[0][0]}=null" if apart else clash.fix
    else:
        fix = _paste(*clash.mend, via, whole=True) if clash.mend else clash.fix
    detail = tuple([", ".join(f"{name} from {item.origin}" for name, item in here)] if len(here) > 1 else ())
    return Finding("S107", clash.message, here[0][1].place if here else "", fix, detail)


def name_of(error: ErrorDetails, section: str = "") -> str:
    """The dotted name that a schema error is about; a role of `data.map` counts as the map, and so on."""
    name = ".".join(str(part) for part in ((section,) if section else ()) + error["loc"])
    return whole_of(name)


def as_settings_error(error: ValidationError, section: str) -> SettingsError:
    """The error for settings that were made in Python, out of what the schema says."""
    findings: list[Finding] = []
    unknown: list[Stranger] = []
    for fault in error.errors(include_url=False):
        cause = fault.get("ctx", {}).get("error")
        name, given = name_of(fault, section), Given(fault["input"])
        if isinstance(cause, SettingsError):
            findings += cause.findings
        elif fault["type"] == "extra_forbidden":
            unknown.append(Stranger(name, given))
        elif name in SETTINGS:
            findings.append(wrong_value(fault["type"], name, given))
        else:
            findings.append(not_a_section(name, given))
    return SettingsError([*strangers(unknown), *findings])
