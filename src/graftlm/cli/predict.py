"""`graftlm predict`: labels with their probabilities for texts, by a trained classifier."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from graftlm.cli.inputs import read_mapping, texts_of
from graftlm.cli.output import json_line, print_table
from graftlm.cli.place import must_be_adapter
from graftlm.cli.placing import placing_flags
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding

__all__ = ["verb"]

_SHOWN = 60  # characters of a text in the table


@click.command(
    "predict",
    cls=Verb,
    arguments=[
        ("RUN", "folder of a run or of an adapter that was trained on labels"),
        ("TEXT", "texts, or one file (of a text file every line is a text); without any, the lines of standard input"),
    ],
    examples=[
        'graftlm predict runs/tickets-1 "Where is my parcel?"',
        "graftlm predict runs/tickets-1 new.csv -o labelled.jsonl",
        "cat mails.txt | graftlm predict runs/tickets-1 | head",
    ],
)
@click.argument("run")
@click.argument("words", metavar="[FILE|TEXT]...", nargs=-1)
@click.option("-o", "--out", metavar="FILE", help="Write JSON lines to this file.")
@click.option("-m", "--model", "--base", "base", metavar="MODEL", help="The base model, where it is not where it was.")
@click.option("--map", "mapping", metavar="text=COLUMN", help="Which column of the file has the texts.")
@placing_flags
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines; this is so by itself off a terminal.")
def verb(
    run: str,
    words: tuple[str, ...],
    out: str | None,
    base: str | None,
    mapping: str | None,
    as_json: bool,
    **placing: Any,
) -> None:
    """Label texts with a trained classifier, with the probability of every label.

    Adapters that tell numbers give a score, those that tag words a tag for each word (words are parted by spaces).
    Pairs of texts are read from a file with both columns.
    """
    folder = must_be_adapter(run)
    _must_be_writable(out, words)
    texts = texts_of(words, mapping=read_mapping(mapping), asked=f'graftlm predict {run} "a text"')
    from graftlm.training import open_adapter

    opened = open_adapter(folder, base=base, **placing)
    _must_be_as_learnt(run, opened, texts)
    head, told = _told(run, opened, texts)
    lines = [json_line(one) for one in told]
    if out is not None:
        Path(out).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    elif as_json or not sys.stdout.isatty():
        click.echo("\n".join(lines))
    else:
        from graftlm.data.wording import clip

        rows = [(clip(_one(one["text"]), _SHOWN), *(_said(one[name]) for name in head)) for one in told]
        print_table(["text", *head], rows, right=(len(head),))


def _told(run: str, opened: Any, texts: Sequence[Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """What the adapter says of each text, and which of it a table shows. Raises UsageFault for one that writes."""
    longest = {"max_length": opened.max_length}
    shown = texts
    if opened.prompt is not None:
        texts = [_asked(run, opened.prompt, text) for text in texts]
    if opened.prompt is not None and opened.prompt.words and opened.task in ("choice", "tfew"):
        from graftlm.evaluation.answers import choose_answers
        from graftlm.training.tasks import learnt_of

        words = list(opened.prompt.words.values())
        objective: Any = learnt_of(opened).objective()
        ranked = choose_answers(opened.model, opened.tokenizer, opened.template, objective, texts, words, **longest)
        return ["label", "probability"], [
            {
                "text": text,
                "label": words[int(chances.argmax())],
                "probability": round(float(chances.max()), 6),
                "probabilities": {word: round(float(p), 6) for word, p in zip(words, chances, strict=True)},
            }
            for text, chances in zip(shown, ranked, strict=True)
        ]
    if opened.task == "classify" and opened.labels is not None:
        from graftlm.evaluation import classify_texts

        found = classify_texts(opened.model, opened.tokenizer, opened.labels, texts, **longest)
        told = [
            {
                "text": text,
                "label": one.label,
                "probability": round(one.probability, 6),
                "probabilities": {label: round(p, 6) for label, p in one.probabilities.items()},
            }
            for text, one in zip(shown, found, strict=True)
        ]
        return ["label", "probability"], told
    if opened.task == "regress" and opened.scale is not None:
        from graftlm.evaluation import tell_numbers

        numbers = tell_numbers(opened.model, opened.tokenizer, opened.scale, texts, **longest)
        return ["score"], [{"text": text, "score": round(n, 6)} for text, n in zip(shown, numbers, strict=True)]
    if opened.task == "tag" and opened.labels is not None:
        from graftlm.evaluation import tag_words

        rows = [_one(text).split() for text in texts]
        tags = tag_words(opened.model, opened.tokenizer, opened.labels, rows, **longest)
        # Of a row that was cut, the words that the model read.
        return ["tags"], [
            {"text": text, "tokens": words[: len(found)], "tags": found}
            for text, words, found in zip(texts, rows, tags, strict=True)
        ]
    from graftlm.report.content import next_verb

    message = f"{run} was trained for {opened.task}, not to label texts"
    raise UsageFault(Finding("L105", message, fix=f"graftlm {next_verb(opened.task, shlex.quote(run))}"))


def _must_be_as_learnt(run: str, opened: Any, texts: Sequence[Any]) -> None:
    """Raise UsageFault for single texts where pairs were learnt, or the other way round: it would tell something."""
    learnt = opened.facts.get("texts")
    if learnt is None or opened.prompt is not None:
        return
    if other := {1 if isinstance(text, str) else 2 for text in texts} - {learnt}:
        words = {1: "single texts", 2: "pairs of texts"}
        message = f"{run} has learnt from {words[learnt]}, found {words[other.pop()]}"
        fix = "a file with both columns, such as premise and hypothesis" if learnt == 2 else "--map text=COLUMN"
        raise UsageFault(Finding("L105", message, fix=fix))


def _asked(run: str, prompt: Any, text: str | tuple[str, str]) -> str:
    """The text, or pair of texts, put into words as the adapter has learnt them."""
    values = (text,) if isinstance(text, str) else text
    if len(values) != len(prompt.fields):
        named = ", ".join(prompt.fields)
        message = f"{run} wants {len(prompt.fields)} texts a row ({named}), found {len(values)}"
        raise UsageFault(Finding("L105", message, fix=f"graftlm evaluate {run} rows.csv"))
    return str(prompt.written(dict(zip(prompt.fields, values, strict=True))))


def _one(text: str | tuple[str, str]) -> str:
    return text if isinstance(text, str) else " | ".join(text)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _must_be_writable(out: str | None, words: tuple[str, ...]) -> None:
    """Said before the model is loaded, not after."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UsageFault(Finding("L107", f"cannot write {out}: {why}", fix="-o predictions.jsonl"))
    if any(Path(word).absolute() == path.absolute() for word in words if len(word) < 1000):
        raise UsageFault(Finding("L107", f"{out} is the file to be read as well", fix="-o predictions.jsonl"))
