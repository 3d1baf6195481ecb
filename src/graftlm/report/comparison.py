"""`report.html` of a comparison, and its table as Markdown, CSV and LaTeX, from `comparison.json` alone."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Finding, RunError
from . import charts
from .wording import counted, duration, measured, setting, share, size, whole

__all__ = ["write_comparison"]

_WIDTHS = (("wide", 720), ("narrow", 330))
_COSTS = (
    ("parameters", "trained parameters", whole),
    ("memory_bytes", "training memory", size),
    ("seconds", "training time", duration),
    ("adapter_bytes", "bytes on disk", size),
)


def write_comparison(folder: Path) -> Path:
    """Writes `report.html`, `table.md`, `table.csv` and `table.tex` into a comparison's folder; returns the page.

    Raises RunError (U101, U102) without a readable, finished `comparison.json`.

    Example:
        >>> write_comparison(Path("comparisons/messages-1"))                          # doctest: +SKIP
        PosixPath('comparisons/messages-1/report.html')
    """
    from jinja2 import Environment, FileSystemLoader

    folder = Path(folder)
    record = _read(folder / "comparison.json")
    rows = _table(record)
    for name, text in (("table.md", _markdown(rows)), ("table.csv", _csv(record)), ("table.tex", _latex(rows, record))):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"whole": whole, "measured": measured, "setting": setting}
    page = environment.get_template("comparison.html.jinja").render(_view(folder, record, rows))
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        message = "has no comparison.json: name a folder that graftlm compare wrote"
        raise RunError(Finding("U101", message, place=str(path.parent))) from None
    except ValueError as error:
        raise RunError(Finding("U102", f"not readable as JSON: {error}", place=str(path))) from None
    if not isinstance(found, dict) or "summary" not in found:
        fix = f"graftlm compare ... -o {shlex.quote(str(path.parent))} takes it up"
        raise RunError(Finding("U102", "the comparison has not finished", place=str(path), fix=fix))
    return found


# --- the table ---


def _table(record: Mapping[str, Any]) -> list[list[str]]:
    """Head and lines: name, score, interval, and what it took."""
    summary = record["summary"]
    labels = any("macro_f1" in row for row in summary["contestants"])
    head = ["", summary["measure"], "95 %", *(["macro-F1"] if labels else []), *(name for _, name, _ in _COSTS)]
    lines = [head]
    for row in summary["contestants"]:
        cost = row.get("cost") or {}
        lines.append(
            [
                row["title"] if row["kind"] != "trained" else row["name"],
                measured(row["score"]),
                f"{measured(row['low'])} to {measured(row['high'])}",
                *([measured(row.get("macro_f1"))] if labels else []),
                *(say(cost[key]) if key in cost else "" for key, _, say in _COSTS),
            ]
        )
    return lines


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    plain = [[cell.replace("|", "\\|").replace("\u00a0", " ") for cell in row] for row in rows]
    head, *lines = plain
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *lines))


def _csv(record: Mapping[str, Any]) -> str:
    """Numbers in full, for other programs."""
    columns = ["name", "kind", "method", "seeds", "score", "low", "high", "macro_f1", "learning_rate", "general",
               "other"]  # fmt: skip
    costs = ["parameters", "beside_head", "memory_bytes", "seconds", "adapter_bytes", "train_flops", "query_flops"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns, *costs])
    for row in record["summary"]["contestants"]:
        cost = row.get("cost") or {}
        writer.writerow([*(row.get(key, "") for key in columns), *(cost.get(key, "") for key in costs)])
    return out.getvalue()


_TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "\u00a0": "~"}  # fmt: skip


def _latex(rows: Sequence[Sequence[str]], record: Mapping[str, Any]) -> str:
    r"""A `tabular` for booktabs, with a comment that says where it comes from."""
    escaped = [["".join(_TEX.get(c, c) for c in cell) for cell in row] for row in rows]
    head, *lines = escaped
    body = "".join(f"{' & '.join(row)} \\\\\n" for row in lines)
    command = " ".join(str(record.get("command", "")).split())
    return (
        f"% {command}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{' & '.join(head)} \\\\\n"
        f"\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )


# --- the page ---


def _view(folder: Path, record: Mapping[str, Any], rows: list[list[str]]) -> dict[str, Any]:
    from markupsafe import Markup

    summary = record["summary"]
    contestants = summary["contestants"]
    drawn = [
        charts.Ranked(
            row["name"] if row["kind"] == "trained" else row["title"], row["kind"], row["score"], row["low"],
            row["high"], row.get("by_seed") or [],
        )
        for row in contestants
    ]  # fmt: skip
    better = "more is better" if summary["higher_is_better"] else "less is better"
    measure = f"{summary['measure']}, {better}"
    ranked = {name: Markup(charts.ranking_chart(drawn, measure, width=width)) for name, width in _WIDTHS}
    fronts = []
    for key, title, _ in _COSTS:
        points = [
            charts.Point(row["name"], row["cost"][key], row["score"], row["name"] in summary["fronts"].get(key, []))
            for row in contestants
            if row["kind"] == "trained" and row.get("cost", {}).get(key)
        ]
        if len(points) > 1:
            drawings = {
                name: Markup(
                    charts.front_chart(points, title, _UNITS[key], summary["measure"], summary["higher_is_better"],
                                       name=key, width=width)
                )
                for name, width in _WIDTHS
            }  # fmt: skip
            fronts.append((title, drawings, [point.name for point in points if point.on_front]))
    return {
        "title": folder.resolve().name,
        "base": _short(record["base"]["name"]),
        "general": _short(str(record["settings"].get("general"))),
        "other": _short(str(record["settings"].get("other"))),
        "record": record,
        "new_head": record.get("new_head", record["task"] == "classify"),
        "summary": summary,
        "verdict": _verdict(record),
        "table": rows,
        "ranked": ranked,
        "fronts": fronts,
        "matrix": _matrix(summary),
        "prompting": _prompting(contestants),
        "forgetting": _forgetting(contestants),
        "elsewhere": _elsewhere(contestants),
        "methods": [
            (row["name"], row["method"], share(row["cost"]["beside_head"], record["base"]["parameters"]),
             f"{row['learning_rate']:.3g}", f"{row['factor']:g}")
            for row in contestants if row["kind"] == "trained"
        ],
        "settings": [
            (key, _short(value) if isinstance(value, str) else value)
            for key, value in record["settings"].items() if value not in (None, [], {})
        ],
        "environment": list(record["environment"].items()),
        "hashes": [(name.replace("\\", "/").rsplit("/", 1)[-1], v) for name, v in record["data"]["sha256"].items()],
        "unchanged": record["base"].get("sha256_before") == record["base"].get("sha256_after"),
    }  # fmt: skip


def _short(name: str) -> str:
    """A path of this machine by its last two parts; other names as they are.

    Example:
        >>> _short("/home/me/models/minilm"), _short("bundled")
        ('models/minilm', 'bundled')
    """
    return "/".join(Path(name).parts[-2:]) if name.startswith(("/", "~")) else name


_UNITS = {"parameters": (1.0, ""), "memory_bytes": (1e6, "MB"), "seconds": (1.0, "s"), "adapter_bytes": (1e3, "kB")}


def _verdict(record: Mapping[str, Any]) -> dict[str, str]:
    """What a reader with one minute should take away."""
    summary = record["summary"]
    rivals = [row for row in summary["contestants"] if row["kind"] != "baseline"]
    best = rivals[0]
    seen = {}
    for pair in summary["pairs"]:
        if best["name"] in (pair["one"], pair["other"]):
            other = pair["other"] if pair["one"] == best["name"] else pair["one"]
            seen[other] = pair["verdict"] != "not distinguishable"
    same = [name for name, told in seen.items() if not told]
    less = [name for name, told in seen.items() if told]
    test = record["rows"]["test"]
    sentence = (
        f"{best['name']} has the best {summary['measure']}: {measured(best['score'])} "
        f"({measured(best['low'])} to {measured(best['high'])}) on {counted(test, 'test row')}, "
        f"mean of {counted(best['seeds'], 'seed')}."
    )
    if same:
        sentence += f" It cannot be told apart from {_listed(same)}."
    if less:
        sentence += f" It is better than {_listed(less)}."
    against = next((p for p in summary["against_baseline"] if p["one"] == best["name"]), None)
    caution = ""
    if against:
        title = next(row["title"] for row in summary["contestants"] if row["name"] == against["other"])
        said = {"better": "It beats", "worse": "It is worse than"}.get(
            against["verdict"], "It cannot be told apart from"
        )
        caution = f"{said} the strongest baseline, {title} (difference {against['difference']:+.3f}, "
        caution += f"p = {against['p_corrected']:.2g})."
    kind = "better" if against and against["verdict"] == "better" else "unclear"
    headline = f"{best['name']} leads" if not less or same else f"{best['name']} wins"
    if same:
        headline = f"{best['name']} leads, {len(same)} of {len(seen)} are not distinguishable from it"
    return {"kind": kind, "headline": headline, "sentence": sentence, "caution": caution}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _matrix(summary: Mapping[str, Any]) -> dict[str, Any]:
    """For each pair the difference and a sign: + the line is better, - worse, = not distinguishable."""
    names = [row["name"] for row in summary["contestants"] if row["kind"] != "baseline"]
    found: dict[tuple[str, str], tuple[str, float, float]] = {}
    nothing = ("", "", "", "")
    turned = {"better": "worse", "worse": "better"}
    for pair in summary["pairs"]:
        verdict = pair["verdict"]
        found[pair["one"], pair["other"]] = (verdict, pair["difference"], pair["p_corrected"])
        found[pair["other"], pair["one"]] = (turned.get(verdict, verdict), -pair["difference"], pair["p_corrected"])
    signs = {"better": "+", "worse": "\u2212", "not distinguishable": "="}
    lines = []
    for one in names:
        cells = []
        for other in names:
            if one == other:
                cells.append(nothing)
                continue
            verdict, difference, p = found[one, other]
            said = f"{one} minus {other}: {difference:+.4f}, corrected p = {p:.2g}, {verdict}"
            cells.append((f"{signs[verdict]} {abs(difference):.3f}", f"p {p:.2g}", verdict.replace(" ", "-"), said))
        lines.append((one, cells))
    return {"names": names, "lines": lines}


def _prompting(contestants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A block for each number of examples: what a query costs, and after how many training has paid for itself."""
    found = []
    for rival in contestants:
        if rival["kind"] != "in-context":
            continue
        told = rival["prompting"]
        lines = [
            (
                row["name"],
                f"{row['cost']['train_flops']:.2g}",
                f"{row['cost']['query_flops']:.2g}",
                *(
                    "never" if number is None else whole(max(1, number))
                    for number in (row["break_even"][rival["name"]][key] for key in ("plain", "cached"))
                ),
            )
            for row in contestants
            if row["kind"] == "trained" and rival["name"] in row.get("break_even", {})
        ]
        found.append(
            {
                "title": rival["title"],
                "query": f"{told['query_flops']:.2g}",
                "cached": f"{told['cached_query_flops']:.2g}",
                "cache": size(told["cache_bytes"]),
                "lines": lines,
            }
        )
    return found


def _forgetting(contestants: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Perplexity on general text of the base and of every contestant, the worst first, with its change."""
    base = _untouched(contestants, "general")
    if base is None:
        return []
    found: list[tuple[str, ...]] = [("untouched base", measured(math.exp(base)), "", "", measured(base))]
    for row in sorted(contestants, key=lambda row: -row.get("general", 0.0)):
        if row["kind"] == "trained" and "general" in row:
            own = row["general"]
            said = (
                f"{100 * math.expm1(own - base):+.1f} %",
                _within(row, "general", lambda by: 100 * math.expm1(by), 1),
            )
            found.append((row["name"], measured(math.exp(own)), *said, measured(own)))
    return found


def _elsewhere(contestants: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Score on the rows of another task of the base and of every contestant, in the order of the table."""
    base = _untouched(contestants, "other")
    if base is None:
        return []
    trained = [row for row in contestants if row["kind"] == "trained" and "other" in row]
    return [
        ("untouched base", measured(base), "", ""),
        *(
            (row["name"], measured(row["other"]), f"{row['other'] - base:+.3f}", _within(row, "other", float, 3))
            for row in trained
        ),
    ]


def _untouched(contestants: Sequence[Mapping[str, Any]], kept: str) -> float | None:
    """What the base says of the rows that are asked beside."""
    return next((row[kept] for row in contestants if row["kind"] == "baseline" and kept in row), None)


def _within(row: Mapping[str, Any], kept: str, turned: Callable[[float], float], decimals: int) -> str:
    """The interval of a change."""
    change = row.get(f"{kept}_change")
    if change is None:
        return ""
    low, high = (f"{turned(change[end]):+.{decimals}f}" for end in ("low", "high"))
    return f"{low} to {high}"
