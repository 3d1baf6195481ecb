"""What can be told of a run in a second: settings, rows, base folder and run folder, without torch.

Each is looked at wherever it does not hang on a setting that is at fault, so that one look tells all of them. What
needs more (a method's text, tokens, memory) is looked at afterwards, where it can be.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graftlm
from graftlm.data import PromptTemplate, look
from graftlm.data.codes import WAIVABLE
from graftlm.data.fetching import fetched
from graftlm.data.prepare import ONLINE
from graftlm.data.reading import Table, read_rows
from graftlm.data.streaming import Source
from graftlm.errors import DataError, EnvironmentFault, Finding, GraftError, SettingsError
from graftlm.models.places import resolve_base
from graftlm.settings import SETTINGS, Attempted, DataSettings, Resolved, RunSettings
from graftlm.training.folder import RunFolder, free_folder
from graftlm.training.named_rewards import look_at_reward

__all__ = [
    "BUNDLED_DATA",
    "context_of",
    "data_of",
    "early_findings",
    "folder_of",
    "length_faults",
    "refuse_early",
    "sources_of",
    "start_folder",
    "test_of",
    "waived",
]

BUNDLED_DATA = {"bundled:messages": "messages.csv", "bundled:answers": "answers.jsonl"}
"""Names of the data sets that come with graftlm, each with its file."""

_READING = {"data.format", "data.max_rows"}  # what reading a file hangs on
_ROWS = {name for name in SETTINGS if name.startswith("data.")} | {"task"}
_PROMPT = "--set data.prompt='{text}'"
_UNBOUNDED = 1 << 30  # bases with relative positions or none
_MOST_BYTES = 50_000_000  # a larger file is read once only, where its tokens are counted


def data_of(path: str | None) -> Path:
    """The data file or folder that `path` means; None is the bundled messages, `hub:owner/name` a set from a hub."""
    name = path or "bundled:messages"
    if name.startswith("hub:"):
        return fetched(name)
    if name in BUNDLED_DATA:
        return Path(graftlm.__file__).parent / "bundled" / "data" / BUNDLED_DATA[name]
    if name.startswith("bundled:"):
        raise SettingsError(
            Finding("U130", f"no bundled data {name!r}: there are {', '.join(BUNDLED_DATA)}", fix="bundled:messages")
        )
    return Path(name).expanduser()


def sources_of(data: DataSettings) -> Path | dict[str | Path, float] | Source:
    """Where the training rows come from, with weights where there are several; a `Source` where they are streamed."""
    if data.stream:
        name = data.path or ""
        return Source(name if name.startswith("hub:") else str(data_of(data.path)), data.format, data.max_rows)
    if data.mixture:
        return {data_of(path): weight for path, weight in data.mixture.items()}
    return data_of(data.path)


def test_of(data: DataSettings) -> Path | float | None:
    """The file of test rows, or their share of the training rows."""
    if data.test is None:
        return None
    try:
        return float(data.test)
    except ValueError:
        return data_of(data.test)


def context_of(config: Any) -> int:
    """The most tokens that the base can read at once."""
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or _UNBOUNDED
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        context -= 2  # their positions start behind the padding token's
    return int(context)


def length_faults(asked: int | None, context: int, taken: int, method: str) -> list[Finding]:
    """What is wrong with rows of `asked` tokens for a base of `context`, of which `method` takes some.

    Example:
        >>> length_faults(512, 128, 8, "prompt(length=8)")[0].fix
        '--max-length 120'
    """
    if context <= taken:
        return [Finding("U135", f"{method} takes {taken} positions, the base has {context}", fix="length=20")]
    if not asked or asked <= context - taken:
        return []
    less = f" without the {taken} virtual tokens" if taken else ""
    fix = f"--max-length {context - taken}"
    return [Finding("U132", f"--max-length {asked} is beyond the base's context{less}", fix=fix)]


def prompt_of(settings: RunSettings) -> PromptTemplate | None:
    """How rows are put into words, if they are. Raises DataError where the prompt cannot be read."""
    data = settings.data
    if data.label_words and not data.prompt:
        raise DataError(Finding("D166", "data.label_words does nothing without data.prompt", fix=_PROMPT))
    return PromptTemplate(data.prompt, data.label_words) if data.prompt else None


def folder_of(settings: RunSettings) -> RunFolder:
    """The folder that a run of `settings` would have; the next free one where none is named."""
    if settings.output:
        return RunFolder(Path(settings.output).expanduser())
    several = "+".join(Path(path).stem for path in settings.data.mixture)
    return RunFolder(free_folder(settings.data.path or several or "bundled:messages"))


def start_folder(path: str) -> Path:
    """The adapter's folder that `--from` means. Raises SettingsError (U144) where there is none."""
    folder = Path(path).expanduser()
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            return place
    raise SettingsError(Finding("U144", f"{path} holds no run with an adapter and no adapter", fix="--from runs/NAME"))


def waived(text: str | None) -> set[str]:
    """The codes in `data.waive`. Raises SettingsError for codes that no one can waive."""
    codes = {code.strip() for code in (text or "").split(",") if code.strip()}
    if dead := codes - WAIVABLE:
        message = f"data.waive: {', '.join(sorted(dead))} cannot be waived; {', '.join(sorted(WAIVABLE))} can"
        raise SettingsError(Finding("U134", message, fix="--set data.waive=null"))
    return codes


def early_findings(attempted: Attempted) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """What is worth knowing and what must be mended, as far as no torch is needed; nothing is written.

    A method that was asked for by name is read, which takes torch, only where there is something to mend already: else
    the whole check does it.
    """
    settings, open_ = attempted.resolved.settings, attempted.doubtful
    data = settings.data
    notes: list[Finding] = []
    faults = list(attempted.findings)
    if settings.start is not None and attempted.resolved.origin.get("model.name", "default") == "default":
        open_ = open_ | {"model.name"}  # the adapter remembers its base

    def step(look_at: Callable[[], object]) -> None:
        with _collecting(faults):
            look_at()

    def rows() -> None:
        path: Path | dict[str | Path, float] | Source | Table = sources_of(data)
        partial = isinstance(path, Source)
        if isinstance(path, Source):
            if open_ & _READING:
                return
            path = path.head()
        if isinstance(path, Path) and path.is_file() and (open_ & _READING or path.stat().st_size > _MOST_BYTES):
            return
        if open_ & _ROWS or prompt_of(settings) is not None:  # how a prompt writes rows hangs on the base
            for source in path if isinstance(path, dict) else (path,):
                if isinstance(source, (str, Path)):
                    read_rows(source, data.format, data.max_rows, drop_bad_rows=data.drop_bad_rows)
            return
        codes = {code.strip() for code in (data.waive or "").split(",")}
        notes.extend(
            look(
                path, data.eval_path, data.format, data.map, data.eval_share, data.max_rows, data.drop_bad_rows,
                settings.task, seed=settings.train.seed, merge_labels=data.merge_labels, waived=codes,
                group=data.group, test=test_of(data), partial=partial,
            )
        )  # fmt: skip

    step(lambda: waived(data.waive))
    if settings.start is not None and "start" not in open_:
        step(lambda: start_folder(str(settings.start)))
    rewarded = settings.reinforcement.reward is not None or settings.task in ONLINE
    if rewarded and not open_ & {"task", "reinforcement.reward"}:
        step(lambda: look_at_reward(settings.reinforcement.reward))
    if "data.path" not in open_:
        step(rows)
    if "model.name" not in open_:
        step(lambda: resolve_base(settings.model.name))
    if not open_ & {"output"}:
        # What the settings are compared with is the run that is there: with faults among them, that it is there.
        step(lambda: folder_of(settings).check(settings, resume=False))
        step(lambda: _can_be_written(folder_of(settings)))
    taken = 0
    if faults and attempted.resolved.origin.get("method", "default") != "default" and "method" not in open_:
        from graftlm.methods import read_method

        with _collecting(faults):
            taken = sum(part.context_taken for part in read_method(settings.method).parts)
    if not open_ & {"model.name", "method", "train.max_length"}:
        faults += length_faults(settings.train.max_length, _context_at(settings.model.name), taken, settings.method)
    return tuple(notes), tuple(faults)


@contextlib.contextmanager
def _collecting(faults: list[Finding]) -> Iterator[None]:
    try:
        yield
    except GraftError as error:
        faults.extend(error.findings)


def _context_at(name: str) -> int:
    """The context of the base in a folder; boundless where there is none, or nothing of it can be told."""
    try:
        found = json.loads((Path(resolve_base(name)) / "config.json").read_text(encoding="utf-8"))
        return context_of(SimpleNamespace(**found))
    except (GraftError, OSError, ValueError, TypeError):
        return _UNBOUNDED


def refuse_early(resolved: Resolved) -> None:
    """Raise the error for everything that is wrong with a run, if that can be told without torch."""
    faults = early_findings(Attempted(resolved, (), frozenset()))[1]
    if faults:
        kinds = {"D": DataError, "E": EnvironmentFault}
        raise kinds.get(faults[0].code[0], SettingsError)(faults)


def _can_be_written(folder: RunFolder) -> None:
    """Raise EnvironmentFault where the run's folder could not be made, before anything is."""
    place = next(parent for parent in (folder.path.absolute(), *folder.path.absolute().parents) if parent.exists())
    if not place.is_dir() and place != folder.path.absolute():
        raise EnvironmentFault(Finding("E102", f"cannot write to {folder.path}: {place} is a file", fix="-o FOLDER"))
    if not os.access(place, os.W_OK):
        raise EnvironmentFault(Finding("E102", f"cannot write to {folder.path}", fix="-o FOLDER"))
    folder.need_room(shutil.disk_usage(place).free)
