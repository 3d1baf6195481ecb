"""`README.md`: the model card of a run, in Markdown with the head that model collections read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .content import (
    TASKS,
    base_id,
    commands,
    data_hashes,
    data_lines,
    data_notes,
    is_bundled,
    method_names,
    python_lines,
    trained,
)
from .folder import RunFolder, read_run
from .verdict import judge, scores
from .wording import as_text, measured

__all__ = ["write_card"]

_SEAL = re.compile(r"\n<!-- written by graftlm, ([0-9a-f]{16}) -->\n\Z")


def write_card(folder: Path) -> Path:
    """Writes the model card `README.md` into a run folder, from the folder's files alone, and returns its path.

    A README.md that was edited by hand is kept: the new card is then written beside it, as `README.new.md`. Raises
    RunError (U101, U102) when there is no readable run.json.

    Example:
        >>> write_card(Path("runs/faq-1"))                                            # doctest: +SKIP
        PosixPath('runs/faq-1/README.md')
    """
    from jinja2 import Environment, FileSystemLoader

    run = read_run(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": _plain, "yaml": _yaml, "fenced": _fenced, "measured": measured}
    verdict = judge(run)
    card = environment.get_template("card.md.jinja").render(
        run=run,
        title=run.path.resolve().name,
        base=base_id(run),
        verdict=verdict,
        scores=scores(run),
        measure=run.measure["title"] + (f" ({run.measure['unit']})" if run.measure["unit"] else ""),
        second=run.second["title"],
        tags=_tags(run),
        pipeline=_PIPELINES.get(run.text("task"), "text-generation"),
        learns=TASKS.get(run.text("task"), run.text("task")),
        trained=trained(run),
        data=data_lines(run),
        notes=data_notes(run),
        hashes=data_hashes(run),
        commands="\n".join(f"{command}  # {about}" for command, about in commands(run)),
        command=run.text("command"),
        python=python_lines(run),
        bundled=is_bundled(run),
    )
    path = run.path / "README.md"
    if path.exists() and not _untouched(path.read_bytes().decode("utf-8", errors="replace")):
        path = run.path / "README.new.md"
    path.write_text(f"{card}\n<!-- written by graftlm, {_digest(card)} -->\n", encoding="utf-8", newline="\n")
    return path


#: Task to the kind of use that model collections know, where it is not writing text.
_PIPELINES = {
    "choice": "multiple-choice",
    "classify": "text-classification",
    "mlm": "fill-mask",
    "regress": "text-classification",
    "reward": "text-classification",
    "seq2seq": "text2text-generation",
    "tag": "token-classification",
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _untouched(text: str) -> bool:
    seal = _SEAL.search(text)
    return seal is not None and _digest(text[: seal.start()]) == seal.group(1)


def _tags(run: RunFolder) -> list[str]:
    kind = {"classify": "text-classification", "sft": "instruction-tuning", "lm": "language-modeling"}
    return list(dict.fromkeys(filter(None, ["graftlm", *method_names(run), kind.get(run.text("task"), "")])))


def _plain(value: object) -> str:
    """Text on one line in which Markdown and HTML see no mark of theirs."""
    text = " ".join(as_text(value).split(" ")).replace("\r", " ").replace("\n", " ")
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _yaml(value: object) -> str:
    """A text in double quotes: JSON strings are YAML strings."""
    return json.dumps(as_text(value))


def _fenced(code: str, language: str = "") -> str:
    """A block of code whose fence is longer than any run of backticks in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"
