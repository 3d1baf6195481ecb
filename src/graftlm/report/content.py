"""What the report and the model card both say: what was trained, on what, how to use it and how to repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from .folder import RunFolder, finite
from .wording import as_text, counted, duration, measured, share, size, whole

__all__ = [
    "TASKS",
    "Row",
    "base_id",
    "commands",
    "data_hashes",
    "data_lines",
    "data_notes",
    "environment",
    "is_bundled",
    "memory",
    "method_names",
    "python_lines",
    "settings",
    "trained",
]

Row = tuple[str, str]

TASKS = {
    "choice": "the right one of several answers",
    "classify": "labels for texts",
    "dpo": "to prefer chosen to rejected answers",
    "grpo": "to write answers of high reward",
    "kto": "to write what is wanted rather than what is not",
    "lm": "continuing text",
    "mlm": "hidden words of texts",
    "ppo": "to write answers of high reward",
    "regress": "a number for texts",
    "reward": "a reward for answers",
    "rloo": "to write answers of high reward",
    "seq2seq": "texts from texts",
    "sft": "answers to prompts",
    "tag": "a tag for each word",
    "tfew": "the right one of several answers, from few rows",
}


def is_bundled(run: RunFolder) -> bool:
    """Whether the base is the small one that comes with the package."""
    return run.text("base.name") in ("", "bundled")


def base_id(run: RunFolder) -> str:
    """The base's name as others know it: a path of this machine is cut to its last part.

    Example:
        >>> base_id(RunFolder(None, {"base": {"name": "/home/me/models/qwen"}}))
        'qwen'
    """
    name = run.text("base.name") or "unknown"
    is_path = name.startswith(("/", "~", ".")) or "\\" in name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name if is_path else name


def method_names(run: RunFolder) -> list[str]:
    """The names in the method, without their settings.

    Example:
        >>> method_names(RunFolder(None, {"method": "lora(rank=16,targets=all-linear)+head"}))
        ['lora', 'head']
    """
    text = run.text("method")
    while (shorter := re.sub(r"\([^()]*\)", "", text)) != text:
        text = shorter
    return [name for part in text.split("+") if (name := part.strip())]


def trained(run: RunFolder) -> list[Row]:
    """Method, counts, share and bytes; only what is known."""
    parameters, total = run.number("trainable_parameters"), run.number("base.parameters")
    part = share(parameters, total)
    about = [run.text("base.class"), counted(total, "parameter") if total is not None else ""]
    speed = ""
    for unit in ("tokens", "rows"):
        rates = sorted(rate for row in run.metrics if (rate := finite(row.get(f"{unit}_per_s"))))
        if rates:
            median = rates[len(rates) // 2]
            speed = f", {whole(median) if median >= 10 else measured(median)}\u00a0{unit}/s"
            break
    facts = {
        "task": TASKS.get(run.text("task"), run.text("task")),
        "base model": ", ".join(filter(None, [run.text("base.name"), *about])),
        "fingerprint of the base": run.text("base.fingerprint"),
        "method": run.text("method"),
        "trained parameters": whole(parameters) + (f" ({part} of the base's count)" if part else "")
        if parameters is not None
        else "",
        "adapter on disk": size(run.number("adapter_bytes")) if run.number("adapter_bytes") is not None else "",
        "test, looked at once": run.text("results.test.line"),
        "steps": whole(run.number("steps")) if run.number("steps") is not None else "",
        "kept": run.text("kept.line"),
        "time": duration(run.number("seconds")) + speed if run.number("seconds") is not None else "",
        "peak memory": size(run.number("peak_memory_bytes")) if run.number("peak_memory_bytes") is not None else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def memory(run: RunFolder) -> list[Row]:
    """What the plan said that a step holds, by what it goes to, beside what the process held at most."""
    terms = [(name, value) for name, value in run.mapping("plan.terms").items() if finite(value)]
    total, peak = run.number("plan.total_bytes"), run.number("peak_memory_bytes")
    if total is None or not terms:
        return []
    rows = [(f"planned: {name}", f"{size(finite(value))} ({share(finite(value), total)})") for name, value in terms]
    rows.append(("planned in all", size(total)))
    if peak is not None:
        rows.append(("held at most by the process", f"{size(peak)}, with the libraries that it loaded"))
    return rows


_DATA_LINES = ("line", "loss_line", "eval_line", "stream_line")


def data_lines(run: RunFolder) -> list[str]:
    """The data lines as the run said them in a terminal, its columns parted by commas, and the counts of rows."""
    lines = [re.sub(r"\s{2,}", ", ", run.text(f"data.{key}").strip()) for key in _DATA_LINES]
    train, evaluation = run.number("data.train_rows"), run.number("data.eval_rows")
    if train is not None:
        held = f", {counted(evaluation, 'row')} kept for evaluation" if evaluation is not None else ""
        lines.append(f"{counted(train, 'row')} trained on{held}")
    return [line for line in lines if line]


def data_notes(run: RunFolder) -> list[str]:
    """What the run noted on its data."""
    notes = run.at("data.notes")
    return [as_text(note) for note in notes] if isinstance(notes, list) else []


def data_hashes(run: RunFolder) -> list[Row]:
    """The SHA-256 of each data file, under the file's name alone, without the folders of this machine."""
    hashes = run.mapping("data.sha256")
    return [(re.split(r"[/\\\\]", name)[-1], as_text(value)) for name, value in hashes.items()]


def environment(run: RunFolder) -> list[Row]:
    """Versions, device and times of the run."""
    facts = {
        "graftlm": run.text("graftlm"),
        **{key: as_text(value) for key, value in run.mapping("environment").items()},
        "started": run.text("started"),
        "finished": run.text("finished"),
        "status": run.text("status"),
    }
    return [(name, value) for name, value in facts.items() if value]


def settings(run: RunFolder) -> list[tuple[str, Any, str]]:
    """Every setting as (dotted name, value, origin); origin is `default`, `decided`, a flag or a place in a file."""
    origin = run.mapping("origin")
    # What a setting that was left open came to is kept beside the settings, by its short name.
    decided = {key: value for key, value in run.mapping("decided").items() if value is not None}

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, str]]:
        for key, value in tree.items():
            name = prefix + key
            # A section of settings holds several; a setting that is itself a mapping has an origin of its own.
            if isinstance(value, dict) and name not in origin:
                yield from walk(value, f"{name}.")
            elif value is None and key in decided:
                yield name, decided[key], "decided"
            else:
                yield name, value, as_text(origin.get(name, ""))

    return list(walk(run.mapping("settings"), ""))


def next_verb(task: str, folder: str, *, pairs: bool = False) -> str:
    """The verb, with its arguments, that shows what an adapter of this task does; `folder` is quoted.

    `pairs`: it reads two texts at once.

    Example:
        >>> next_verb("tag", "runs/news-1"), next_verb("sft", "runs/faq-1")
        ('predict runs/news-1 "a text to label"', 'chat runs/faq-1 --vs base')
    """
    if task in ("classify", "regress", "tag"):
        return f"predict {folder} pairs.csv" if pairs else f'predict {folder} "a text to label"'
    if task in ("choice", "tfew", "mlm", "reward"):
        return f"evaluate {folder} more.jsonl"
    return f'generate {folder} "a prompt" --vs base' if task in ("lm", "seq2seq") else f"chat {folder} --vs base"


_SHOWS = {"predict": "what it says of a text", "chat": "talk to it, and to the base", "generate": "one answer of each"}


def commands(run: RunFolder) -> list[Row]:
    """What can be typed next, with what it does."""
    name = shlex.quote(run.name)
    first = next_verb(run.text("task"), name, pairs="text2" in run.mapping("data.columns"))
    shown = [(f"graftlm {first}", _SHOWS[verb])] if (verb := first.partition(" ")[0]) in _SHOWS else []
    if verb == "chat":
        shown.append((f'graftlm generate {name} "a prompt"', "one answer"))
    return [*shown, (f"graftlm evaluate {name} more.jsonl", "score it on rows of your own")]


def python_lines(run: RunFolder) -> str:
    """Three lines of Python that load the base with the adapter acting."""
    return (
        "from graftlm.training import open_adapter\n"
        f"opened = open_adapter({run.name!r})\n"
        "model, tokenizer = opened.model, opened.tokenizer"
    )
