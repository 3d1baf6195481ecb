"""`report.html`: one file that opens by a double click and tells a reader with one minute what the run achieved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import charts
from .content import (
    commands,
    data_hashes,
    data_lines,
    data_notes,
    environment,
    is_bundled,
    memory,
    python_lines,
    settings,
    trained,
)
from .examples import commonest_confusions, mistakes, right_ones
from .folder import RunFolder, finite, read_run
from .verdict import judge, scores
from .wording import as_text, clip, counted, measured, setting, whole

__all__ = ["write_report"]

_WIDTHS = (("wide", 720), ("narrow", 330))  # a desktop's column, a phone's
_SAMPLES = 12
_SAMPLE_SHOWN = 1500
_MISTAKES = 10
_CONFUSION_MOST = 20  # labels; a wider table cannot be read
_REJECTED = 20
#: Task to what its loss is told in, where that is not nats per token.
_LOSS_UNITS = {
    "choice": "nats per row", "classify": "nats per row", "dpo": "loss per row", "kto": "loss per row",
    "grpo": "policy loss per token", "ppo": "policy and value loss per token",
    "regress": "squared deviations per row", "reward": "nats per row",
    "rloo": "policy loss per answer", "tfew": "nats per row",
}  # fmt: skip


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder, from the folder's files alone, and returns its path.

    Parts that the folder does not have are left out. The same files give the same page. Raises RunError (U101, U102)
    when there is no readable run.json.

    Example:
        >>> write_report(Path("runs/faq-1"))                                          # doctest: +SKIP
        PosixPath('runs/faq-1/report.html')
    """
    from jinja2 import Environment, FileSystemLoader

    run = read_run(folder)
    environment_ = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment_.filters |= {"whole": whole, "measured": measured, "setting": setting}
    page = environment_.get_template("page.html.jinja").render(_view(run))
    path = run.path / "report.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _view(run: RunFolder) -> dict[str, Any]:
    found = scores(run)
    steps, notes = _curves(run)
    every = settings(run)
    rejected = [(as_text(row.get("place")), as_text(row.get("reason"))) for row in run.rejected]
    right_count, right = right_ones(run)
    wrong = mistakes(run)
    return {
        "run": run,
        "title": run.path.resolve().name,
        "verdict": judge(run),
        "scores": found,
        "score_charts": _score_charts(run, found),
        "second": run.second["title"],
        "measure": run.measure["title"],
        "samples": [_sample(row) for row in run.samples[:_SAMPLES]],
        "sample_count": len(run.samples),
        "right": right,
        "right_count": right_count,
        "wrong": wrong[:_MISTAKES],
        "more_wrong": wrong[_MISTAKES:],
        "wrong_count": len(run.predictions) - right_count,
        "curves": steps,
        "confusion": _confusion(run),
        "per_label": _per_label(run),
        "trained": trained(run),
        "trained_at": _trained_at(run),
        "memory": memory(run),
        "data": data_lines(run),
        "notes": [*data_notes(run), *run.unread],
        "curve_notes": notes,
        "rejected": rejected[:_REJECTED],
        "rejected_count": len(rejected),
        "hashes": data_hashes(run),
        "lengths": _lengths(run),
        "changed": [row for row in every if row[2] not in ("default", "")],
        "settings": every,
        "environment": environment(run),
        "commands": commands(run),
        "python": python_lines(run),
        "bundled": is_bundled(run),
    }


def _markup(drawings: dict[str, str]) -> dict[str, Any]:
    from markupsafe import Markup

    # Drawn by matplotlib, which escapes the texts that it is given.
    return {name: Markup(drawing) for name, drawing in drawings.items()}


def _score_charts(run: RunFolder, found: list[Any]) -> dict[str, Any]:
    if not found:
        return {}
    told = run.measure
    unit = f" in {told['unit']}" if told["unit"] else ""
    measure = f"{told['title']}{unit}, {'more' if told['more_is_better'] else 'less'} is better"
    most = 1.0 if told["more_is_better"] else None
    return _markup({name: charts.score_chart(found, measure, most=most, width=width) for name, width in _WIDTHS})


def _curves(run: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """The drawn curves, and what has to be said of steps that cannot be drawn."""

    def points(key: str, least: float = float("-inf")) -> tuple[list[float], list[float]]:
        pairs = [(finite(row.get("step")), finite(row.get(key))) for row in run.metrics]
        kept = sorted(
            (step, value) for step, value in pairs if step is not None and value is not None and value > least
        )
        return [step for step, _ in kept], [value for _, value in kept]

    broken = sum(1 for row in run.metrics if "loss" in row and finite(row["loss"]) is None)
    notes = [f"In {counted(broken, 'step')} the training loss was not a finite number."] if broken else []
    train, evaluation = charts.thin(*points("loss")), charts.thin(*points("eval_loss"), most=60)
    rate = charts.thin(*points("learning_rate", least=0.0))
    if not train.steps and not evaluation.steps:
        return {}, notes
    if train.thinned:
        notes.append(
            "The training line is the mean over neighbouring steps; "
            "the band reaches from the smallest to the largest of them."
        )
    unit = _LOSS_UNITS.get(run.text("task"), "nats per token")
    drawn = {name: charts.curve_chart(train, evaluation, rate, unit, width=width) for name, width in _WIDTHS}
    return _markup(drawn), notes


def _trained_at(run: RunFolder) -> dict[str, Any]:
    """A treemap of the trained parameters by layer and what they act on; nothing where there is one place only."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in run.rows("trained_at"):
        layer, count = finite(row.get("layer")), finite(row.get("parameters"))
        if count:
            name = "whole model" if layer is None else f"layer {layer:.0f}"
            groups.setdefault(name, []).append((as_text(row.get("role")), count))
    if sum(map(len, groups.values())) < 2:
        return {}
    ordered = sorted(groups.items(), key=lambda item: -sum(count for _, count in item[1]))
    parts = [(name, sorted(found, key=lambda part: -part[1])) for name, found in ordered]
    return _markup({name: charts.tree_chart(parts, width=width) for name, width in _WIDTHS})


def _lengths(run: RunFolder) -> dict[str, Any]:
    """Histograms of the rows' lengths in tokens; nothing where the run did not keep them."""
    edges, counts = run.at("data.lengths.edges"), run.at("data.lengths.counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1 or not counts:
        return {}
    lines, heights = [finite(edge) for edge in edges], [finite(count) for count in counts]
    known = [edge for edge in lines if edge is not None]
    whole_numbers = [int(count) for count in heights if count is not None]
    if len(known) != len(lines) or len(whole_numbers) != len(heights) or known != sorted(set(known)):
        return {}
    limit = run.number("data.lengths.limit")
    return _markup({name: charts.length_chart(known, whole_numbers, limit, width=width) for name, width in _WIDTHS})


def _sample(row: dict[str, Any]) -> dict[str, str]:
    return {key: clip(as_text(row.get(key)), _SAMPLE_SHOWN) for key in ("prompt", "base", "tuned", "reference")}


def _confusion(run: RunFolder) -> dict[str, Any] | None:
    labels, table = run.at("results.labels"), run.at("results.confusion")
    if not isinstance(labels, list) or not isinstance(table, list):
        return None
    counts = [[int(finite(cell) or 0) for cell in row] for row in table if isinstance(row, list)]
    if not labels or len(counts) != len(labels) or any(len(row) != len(labels) for row in counts):
        return None
    names = [as_text(label) for label in labels]
    if len(names) > _CONFUSION_MOST:
        return {"commonest": commonest_confusions(names, counts), "labels": names}
    rows = [
        (name, [(count, round(100 * count / max(1, sum(row))), here == there) for there, count in enumerate(row)])
        for here, (name, row) in enumerate(zip(names, counts, strict=True))
    ]
    return {"labels": names, "rows": rows}


def _per_label(run: RunFolder) -> list[tuple[str, list[float | None], float | None]]:
    """Label, (precision, recall, F1), rows; the weakest label first."""
    found = [
        (
            as_text(row.get("label")),
            [finite(row.get(key)) for key in ("precision", "recall", "f1")],
            finite(row.get("rows")),
        )
        for row in run.rows("results.per_label")
    ]
    return sorted(found, key=lambda item: (item[1][2] if item[1][2] is not None else 2.0, item[0]))
