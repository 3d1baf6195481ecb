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

__all__ = [
    "Curve",
    "Point",
    "Ranked",
    "curve_chart",
    "front_chart",
    "length_chart",
    "ranking_chart",
    "score_chart",
    "thin",
    "tree_chart",
]

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
        left, right = 66 / width, 1 - 14 / width  # room for numbers of five letters and the axis' name beside them
        axes = figure.add_axes((left, (46 + small) / height, right - left, 1 - (74 + small) / height))
        if train.thinned:
            axes.fill_between(train.steps, train.lows, train.highs, color=_TUNED, alpha=0.22, linewidth=0)
        if train.steps:
            dot = "o" if len(train.steps) == 1 else ""  # one point makes no line
            axes.plot(train.steps, train.means, color=_TUNED, linewidth=1.8, marker=dot, markersize=5, label="training")
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
            dot = "o" if len(rate.steps) == 1 else ""
            bottom.plot(rate.steps, rate.means, color=_MUTED, linewidth=1.6, marker=dot, markersize=4)
            bottom.set_yscale("log")
            _rate_ticks(bottom, rate.means)
            bottom.set_ylabel("rate", color=_MUTED)
            _quiet(bottom, grid="y")
        bottom.set_xlabel("step", color=_MUTED)
        bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_label_coords(-52 / (width * (right - left)), 0.5)
        bottom.yaxis.set_label_coords(-52 / (width * (right - left)), 0.5)

    said = f"Training loss from {train.means[0]:.3f} to {train.means[-1]:.3f}. " if train.means else ""
    said += f"Evaluation loss from {evaluation.means[0]:.3f} to {evaluation.means[-1]:.3f}." if evaluation.means else ""
    return _svg(draw, width, height, f"curve{width}", said or "Learning rate by step")


def length_chart(edges: Sequence[float], counts: Sequence[int], limit: float | None, *, width: int) -> str:
    """How many rows have how many tokens, and the line at which longer ones are cut; what is cut away is hatched."""
    height = 220

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_axes((66 / width, 46 / height, 1 - 84 / width, 1 - 74 / height))
        for count, (low, high) in zip(counts, itertools.pairwise(edges), strict=True):
            over = limit is not None and low >= limit
            axes.bar(
                low, count, high - low, align="edge", color=_EVAL if over else _TUNED, edgecolor=_INK,
                linewidth=0.5, hatch="////" if over else "",
            )  # fmt: skip
        end = max(edges[-1], 1.05 * limit if limit is not None and limit < 1.5 * edges[-1] else 0)
        axes.set_xlim(0, end)
        if limit is not None and limit <= end:
            axes.axvline(limit, color=_INK, linewidth=1.6, linestyle=(0, (4, 3)))
            side = "right" if limit > 0.5 * end else "left"
            axes.text(limit, 1.03, f"cut at {limit:.0f}", color=_INK, ha=side, transform=axes.get_xaxis_transform())
        axes.set_xlabel("tokens of a row, before cutting", color=_MUTED)
        axes.set_ylabel("rows", color=_MUTED)
        axes.yaxis.set_label_coords(-52 / (width - 84), 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _quiet(axes, grid="y")

    over = sum(count for count, low in zip(counts, edges, strict=False) if limit is not None and low >= limit)
    said = f"Lengths of {sum(counts)} rows, up to {edges[-1]:.0f} tokens"
    said += f"; {over} in the bars beyond the cut at {limit:.0f}" if limit is not None else ""
    return _svg(draw, width, height, f"lengths{width}", said)


@dataclass(frozen=True)
class Ranked:
    """One line of a ranking: a mean with its interval and the seeds that it is the mean of."""

    title: str
    kind: str
    score: float
    low: float
    high: float
    by_seed: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One method in a chart of score against cost."""

    name: str
    cost: float
    score: float
    on_front: bool


#: A mark and a colour for each kind of contestant: told apart in grey as well.
_MARKS = {"trained": ("o", _TUNED), "in-context": ("s", _EVAL), "baseline": ("D", _OTHER)}


def ranking_chart(found: Sequence[Ranked], measure: str, *, width: int) -> str:
    """A line for each contestant: its mean, its interval, and a dot for each seed."""
    row, letter = 38, 8
    height = row * len(found) + 48

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((14 / width, 42 / height, 1 - 28 / width, 1 - 44 / height))
        edges = [value for line in found for value in (line.low, line.high, *line.by_seed)]
        pad = 0.04 * (max(edges) - min(edges) or 1.0)
        axes.set_xlim(min(edges) - pad, max(edges) + pad)
        axes.set_ylim(row * len(found), 0)
        for index, line in enumerate(found):
            mark, colour = _MARKS.get(line.kind, _MARKS["baseline"])
            top = row * index + 27
            said = measured(line.score)
            axes.text(
                min(edges) - pad, top - 14, clip(line.title, (width - 40 - letter * len(said)) // letter), color=_INK
            )
            axes.text(max(edges) + pad, top - 14, said, color=_INK, ha="right")
            axes.plot([line.low, line.high], [top] * 2, color=colour, linewidth=2.2)
            axes.plot(line.by_seed, [top] * len(line.by_seed), ".", color=_INK, markersize=4, alpha=0.6)
            axes.plot([line.score], [top], mark, color=colour, markersize=8, markeredgecolor=_INK, markeredgewidth=0.8)
        axes.set_yticks([])
        axes.set_xlabel(measure, color=_MUTED)
        _quiet(axes, grid="x")

    said = "; ".join(f"{line.title}: {measured(line.score)}" for line in found)
    return _svg(draw, width, height, f"ranking{width}", f"{measure}. {said}")


def front_chart(
    points: Sequence[Point], cost: str, unit: tuple[float, str], measure: str, higher_is_better: bool, *, name: str,
    width: int,
) -> str:  # fmt: skip
    """Score against cost on a logarithmic scale, better above; methods on the Pareto front are filled and joined."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    height = 300
    divisor, unit_name = unit
    left, right, bottom, top = 58, 16, 46, 14

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
        costs, scores = [point.cost / divisor for point in points], [point.score for point in points]
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
        pad = 0.1 * (max(scores) - min(scores) or 1.0)
        axes.set_ylim(min(scores) - pad, max(scores) + pad)
        if not higher_is_better:
            axes.invert_yaxis()
        front = sorted((p.cost / divisor, p.score) for p in points if p.on_front)
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color=_TUNED, linewidth=1.2, alpha=0.7)
        for point in points:
            axes.plot(
                [point.cost / divisor], [point.score], "o", color=_TUNED if point.on_front else _GRID, markersize=8,
                markeredgecolor=_INK, markeredgewidth=1,
            )  # fmt: skip
        for point, (x, y, align) in zip(points, _places(axes, points, divisor, width), strict=True):
            axes.annotate(
                point.name, (x, y), xycoords="figure pixels", ha=align, va="center", color=_INK, fontsize=12,
                weight="bold" if point.on_front else "normal",
            )  # fmt: skip
        # Marks of 1, 2 and 5 where the range is small, so that every scale has at least two.
        steps = (1, 2, 5) if max(costs) / min(costs) < 100 else (1,)
        lowest, highest = axes.get_xlim()
        ticks = [s * 10.0**e for e in range(-9, 15) for s in steps if lowest <= s * 10.0**e <= highest]
        while len(ticks) > width / 70:
            ticks = ticks[::2]
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace(",", " ")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(f"{cost}{f', {unit_name}' if unit_name else ''}", color=_MUTED)
        axes.set_ylabel(measure, color=_MUTED)
        _quiet(axes, grid="both")

    said = "; ".join(f"{p.name}: {measured(p.score)} at {p.cost / divisor:.4g} {unit_name}" for p in points)
    return _svg(draw, width, height, f"front-{name}-{width}", f"{measure} against {cost}. {said}")


def _places(axes: Any, points: Sequence[Point], divisor: float, width: int) -> list[tuple[float, float, str]]:
    """Where the names go, in pixels: beside their marks, moved up or down until none lies on another or on a mark."""
    centres = [axes.transData.transform((point.cost / divisor, point.score)) for point in points]
    taken: list[tuple[float, float, float, float]] = [(x - 6, x + 6, y - 6, y + 6) for x, y in centres]
    found = []
    for point, (x, y) in zip(points, centres, strict=True):
        length = 7.2 * len(point.name)
        choices = []
        for shift in (0, 13, -13, 26, -26, 39, -39):
            for side in (1, -1):
                start = x + 9 if side > 0 else x - 9 - length
                if start >= 2 and start + length <= width - 2:
                    choices.append((start, y + shift, "left" if side > 0 else "right", side))
        best = None
        for start, height, align, side in choices:
            box = (start, start + length, height - 6, height + 6)
            if all(box[1] < b[0] or b[1] < box[0] or box[3] < b[2] or b[3] < box[2] for b in taken):
                best = (start if side > 0 else start + length, height, align, box)
                break
        if best is None:
            start, height, align, side = choices[0] if choices else (x, y, "left", 1)
            best = (start if side > 0 else start + length, height, align, (start, start + length, height, height))
        taken.append(best[3])
        found.append((best[0], best[1], best[2]))
    return found


def tree_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, width: int) -> str:
    """A treemap: an area for each group, divided into its parts; an area is as large as its number.

    Laid out in rows of near squares (Bruls, Huizing and van Wijk 2000, "Squarified Treemaps").
    """
    height = 300 if width > 500 else 340
    sizes = [sum(size for _, size in parts) for _, parts in groups]
    total = sum(sizes) or 1.0

    def draw(figure: Figure) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        for (group, parts), box in zip(groups, _squares(sizes, (1.0, 1.0, width - 2.0, height - 2.0)), strict=True):
            x, y, w, h = box
            head = 18 if h > 44 and w > 40 else 0
            inside = _squares([size for _, size in parts], (x + 2, y + 2 + head, w - 4, h - 4 - head))
            for at, ((name, size), (px, py, pw, ph)) in enumerate(zip(parts, inside, strict=True)):
                if pw <= 0 or ph <= 0:
                    continue
                shade = 0.55 if at % 2 == 0 else 0.3
                axes.add_patch(Rectangle((px, py), pw, ph, facecolor=_TUNED, alpha=shade, linewidth=0))
                axes.add_patch(Rectangle((px, py), pw, ph, fill=False, edgecolor=_GRID, linewidth=1))
                share = f"{100 * size / total:.0f} %"
                if ph > 16 and pw > 8 * len(name) + 8:
                    axes.text(px + 5, py + min(ph / 2, 14), name, color=_INK, va="center", fontsize=12)
                    if ph > 34 and pw > 40:
                        axes.text(px + 5, py + 30, share, color=_INK, va="center", fontsize=11)
            axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=_INK, linewidth=1))
            if head and w > 8 * len(group):
                axes.text(x + 6, y + 11, group, color=_INK, va="center", fontsize=12, weight="bold")

    said = "; ".join(f"{group}: {100 * size / total:.1f} %" for (group, _), size in zip(groups, sizes, strict=True))
    return _svg(draw, width, height, f"tree{width}", f"Trained parameters by place. {said}")


Box = tuple[float, float, float, float]


def _squares(sizes: Sequence[float], box: Box) -> list[Box]:
    """A rectangle (x, y, width, height) for each size, in their order, together filling `box`."""
    x, y, w, h = box
    rest, area = sum(sizes), max(w, 0.0) * max(h, 0.0)
    if rest <= 0 or area <= 0:
        return [(x, y, 0.0, 0.0) for _ in sizes]
    found: list[Box] = []
    left = list(sizes)
    while left:
        scale = w * h / sum(left) if sum(left) > 0 else 0.0
        side = min(w, h)
        row = [left[0]]
        while len(row) < len(left) and _worst(row, scale, side) >= _worst([*row, left[len(row)]], scale, side):
            row.append(left[len(row)])
        thick = sum(row) * scale / side if side > 0 else 0.0
        along = x if w < h else y
        for size in row:
            length = size * scale / thick if thick > 0 else 0.0
            found.append((along, y, length, thick) if w < h else (x, along, thick, length))
            along += length
        if w < h:
            y, h = y + thick, h - thick
        else:
            x, w = x + thick, w - thick
        del left[: len(row)]
    return found


def _worst(row: Sequence[float], scale: float, side: float) -> float:
    """The longest side by the shortest of the row's flattest rectangle; 1 is a square."""
    total = sum(row) * scale
    least, most = min(row) * scale, max(row) * scale
    if least <= 0 or side <= 0:
        return float("inf")
    return max(side**2 * most / total**2, total**2 / (side**2 * least))


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
