"""The charts of the report: inline SVG drawn by matplotlib, coloured by the page's own colour scheme.

Each chart is drawn for one width in CSS pixels (one unit of the drawing is one pixel), so that its letters keep their
size on a phone. Colours are written as CSS variables and letters as text in the page's font; nothing outside the page
is referred to.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .verdict import Score
from .wording import clip, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "curve_chart", "score_chart", "thin"]

# Stand-ins that matplotlib accepts as colours; in the drawing each becomes a CSS variable of the page.
_INK, _MUTED, _GRID, _TUNED, _OTHER, _EVAL = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _TUNED: "var(--tuned)",
    _OTHER: "var(--other)",
    _EVAL: "var(--eval)",
}
_POINTS = 120  # few enough that the mean of each stretch shows the trend
_LETTER = 13


@dataclass(frozen=True)
class Curve:
    """Points of a curve after thinning: the mean of each stretch of steps with its smallest and largest value."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    thinned: bool


def thin(steps: Sequence[float], values: Sequence[float], most: int = _POINTS) -> Curve:
    """At most `most` points; each stands for a stretch of equally many neighbours.

    Example:
        >>> thin([1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0], most=2).means
        [3.0, 2.0]
    """
    count = len(steps)
    points = min(count, most)
    cuts = [count * index // points for index in range(points + 1)] if points else [0]
    curve = Curve([], [], [], [], count > most)
    for start, end in itertools.pairwise(cuts):
        part = values[start:end]
        curve.steps.append(sum(steps[start:end]) / len(part))
        curve.means.append(sum(part) / len(part))
        curve.lows.append(min(part))
        curve.highs.append(max(part))
    return curve


def score_chart(found: Sequence[Score], measure: str, *, most: float | None, width: int) -> str:
    """A bar for each score, with its interval as a line across the bar's end; `most` is the end of the scale."""
    row = 46
    height = row * len(found) + 44

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((12 / width, 40 / height, 1 - 26 / width, 1 - 42 / height))
        end = most or 1.04 * max(max(score.value, score.high or 0.0) for score in found) or 1.0
        axes.set_xlim(0, end)
        axes.set_ylim(row * len(found), 0)
        for index, score in enumerate(found):
            colour = _TUNED if score.name == "tuned" else _OTHER
            top = row * index
            weight = "bold" if score.name == "tuned" else "normal"
            said = score.text if width > 500 else measured(score.value)  # a phone has no room; the table has it
            axes.text(0, top + 15, clip(score.title, (width - 8 * len(said)) // 8), color=_INK, weight=weight)
            axes.text(end, top + 15, said, color=_INK, ha="right", weight=weight)
            axes.barh(top + 30, score.value, height=15, color=colour)
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [top + 30] * 2, color=_INK, linewidth=1.6, clip_on=False)
                for edge in (score.low, score.high):
                    axes.plot([edge] * 2, [top + 25, top + 35], color=_INK, linewidth=1.6, clip_on=False)
        axes.set_yticks([])
        axes.set_xlabel(measure, color=_MUTED)
        _quiet(axes, grid="x")

    said = "; ".join(f"{score.title}: {score.text}" for score in found)
    return _svg(draw, width, height, f"scores{width}", f"{measure}. {said}")


def curve_chart(train: Curve, evaluation: Curve, rate: Curve, unit: str, *, width: int) -> str:
    """The loss in training and in evaluation by step, and below it the learning rate on a logarithmic scale."""
    from matplotlib.ticker import MaxNLocator

    small = 90 if rate.steps else 0
    height = 300 + small

    def draw(figure: Figure) -> None:
        left, right = 52 / width, 1 - 14 / width
        axes = figure.add_axes((left, (46 + small) / height, right - left, 1 - (74 + small) / height))
        if train.thinned:
            axes.fill_between(train.steps, train.lows, train.highs, color=_TUNED, alpha=0.22, linewidth=0)
        if train.steps:
            axes.plot(train.steps, train.means, color=_TUNED, linewidth=1.8, label="training")
        if evaluation.steps:
            axes.plot(
                evaluation.steps,
                evaluation.means,
                color=_EVAL,
                linewidth=1.8,
                marker="o",
                markersize=5,
                label="evaluation",
            )
        lowest, highest = axes.get_ylim()
        axes.set_ylim(max(0.0, lowest), highest)
        axes.set_ylabel(f"loss, {unit}", color=_MUTED)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            frameon=False,
            borderpad=0.2,
            labelcolor=_INK,
            handlelength=1.6,
        )
        _quiet(axes, grid="y")
        bottom = axes
        if rate.steps:
            axes.tick_params(labelbottom=False)
            bottom = figure.add_axes((left, 46 / height, right - left, (small - 14) / height), sharex=axes)
            bottom.plot(rate.steps, rate.means, color=_MUTED, linewidth=1.6)
            bottom.set_yscale("log")
            _rate_ticks(bottom, rate.means)
            bottom.set_ylabel("rate", color=_MUTED)
            _quiet(bottom, grid="y")
        bottom.set_xlabel("step", color=_MUTED)
        bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_label_coords(-40 / (width * (right - left)), 0.5)
        bottom.yaxis.set_label_coords(-40 / (width * (right - left)), 0.5)

    said = f"Training loss from {train.means[0]:.3f} to {train.means[-1]:.3f}. " if train.means else ""
    said += f"Evaluation loss from {evaluation.means[0]:.3f} to {evaluation.means[-1]:.3f}." if evaluation.means else ""
    return _svg(draw, width, height, f"curve{width}", said or "Learning rate by step")


def _rate_ticks(axes: Axes, rates: Sequence[float]) -> None:
    """Powers of ten, at most three of them; the range is at least one power, so that a constant rate has a scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    high = max(rates)
    low = max(min(rates), high / 1000)  # the last steps of a decay may come near to 0
    if high < 10 * low:
        low, high = low / 4, high * 4
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_major_locator(LogLocator(numticks=3))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )


def _quiet(axes: Axes, grid: Any) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=_GRID, linewidth=1)
    axes.tick_params(length=0, labelcolor=_MUTED, pad=5)
    axes.patch.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)


@contextmanager
def _looks() -> Iterator[None]:
    import matplotlib
    import matplotlib.style

    own = {
        "font.size": _LETTER,
        "axes.labelsize": _LETTER,
        "xtick.labelsize": _LETTER,
        "ytick.labelsize": _LETTER,
        "legend.fontsize": _LETTER,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a dollar sign in a label is a dollar sign
        "path.simplify": False,
    }
    # A matplotlibrc of the user must not change the report; the salt makes the drawing's ids the same each time.
    with (
        matplotlib.style.context(["default", own]),
        matplotlib.rc_context({"svg.hashsalt": "graftlm"}),
        warnings.catch_warnings(),
    ):
        # The browser, not matplotlib, has the letters: that one is missing here says nothing.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _svg(draw: Callable[[Figure], None], width: int, height: int, prefix: str, said: str) -> str:
    with _looks():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _for_page(out.getvalue(), width, height, prefix, said)


def _for_page(drawing: str, width: int, height: int, prefix: str, said: str) -> str:
    """The drawing without what only a file of its own needs, its ids made the page's own."""
    from markupsafe import escape

    body = drawing[drawing.index("<svg") : drawing.rindex("</svg>")]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)

    def tag(match: re.Match[str]) -> str:
        found = match.group()
        if found.startswith("<g"):
            found = re.sub(r' id="[^"]*"', "", found)
        found = found.replace("xlink:href", "href")
        found = re.sub(r'\bid="|href="#|url\(#', lambda part: f"{part.group()}{prefix}-", found)
        # The page's font, in the two ways that versions of matplotlib write it; size and weight stay.
        found = re.sub(r"font-family: [^;\"]*;? ?", "", found)
        found = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--font)", found)
        found = re.sub(r"(\d\.\d\d)\d+", r"\1", found)  # a hundredth of a pixel is enough
        for stand_in, variable in _VARIABLES.items():
            found = found.replace(stand_in, variable)
        return found

    body = re.sub(r"<[^>]+>", tag, body)
    body = re.sub(r">\s+<", "><", body)
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" aria-label="{escape(said)}">'
        f"{body}</svg>"
    )
