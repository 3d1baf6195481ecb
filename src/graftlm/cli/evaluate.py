"""`graftlm evaluate`: the scores of an adapter beside those of its untouched base, on rows that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graftlm.cli.inputs import read_mapping
from graftlm.cli.output import print_json, print_table
from graftlm.cli.place import kind_of, must_be_adapter
from graftlm.cli.placing import PLACING, placing_flags
from graftlm.cli.usage import UsageFault, Verb
from graftlm.data.wording import clip, counted
from graftlm.errors import Finding

__all__ = ["verb"]


@click.command(
    "evaluate",
    cls=Verb,
    arguments=[
        ("RUN", "folder of a run, of an adapter or of a base model"),
        ("DATA", "file with rows to score; without one, the rows that the run held out"),
    ],
    examples=[
        "graftlm evaluate runs/tickets-1",
        "graftlm evaluate runs/tickets-1 new.csv --against runs/tickets-2",
        "graftlm evaluate runs/faq-1 --generate 40 --json",
        "graftlm evaluate runs/faq-1 --harness hellaswag,tasks/capitals.yaml --max-rows 200",
    ],
)
@click.argument("run")
@click.argument("data", required=False)
@click.option("-m", "--model", "--base", "base", metavar="MODEL", help="The base model, where it is not where it was.")
@click.option("--map", "mapping", metavar="ROLE=COLUMN", help="Which column of DATA plays which role.")
@click.option("--max-rows", type=click.IntRange(1), metavar="COUNT", help="Most rows of DATA, or of each task.")
@click.option("--against", metavar="RUN", help="Another run, adapter or base, scored on the same rows and tested.")
@click.option(
    "--generate", type=click.IntRange(1), metavar="COUNT", help="Write answers to so many rows: ROUGE-L, chrF, BLEU."
)
@click.option(
    "--worst", type=click.IntRange(0), metavar="COUNT", default=3, show_default=True, help="Worst rows to show."
)
@click.option("--harness", metavar="LIST", help="Tasks of lm-evaluation-harness instead of DATA: names or files.")
@click.option("--shots", type=click.IntRange(0), metavar="COUNT", help="Examples shown before a question of --harness.")
@placing_flags
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(run: str, data: str | None, as_json: bool, **options: Any) -> None:
    """Score an adapter beside its untouched base and simple baselines.

    Classifiers get accuracy and macro-F1, writers the loss per token and perplexity, all with 95 % intervals, and the
    rows that went worst. --against says whether another run does better or worse, or whether that cannot be told.
    """
    folder = _model_of(run)
    if options["harness"] is not None:
        _harness(folder, data, as_json, options)
        return
    if options["shots"] is not None:
        raise UsageFault(Finding("L103", "--shots is for --harness", fix="--harness TASK --shots 4"))
    against = options["against"]
    roles = read_mapping(options["mapping"])
    other = _model_of(against) if against is not None else None
    from graftlm.training import evaluate

    given: dict[str, Any] = {"base": options["base"], "mapping": roles, "max_rows": options["max_rows"]}
    given |= {name: options[name] for name in PLACING if options[name] is not None}
    given |= {"against": other, "worst": options["worst"], "generate": options["generate"] or 0}
    results = evaluate(folder, data, **given)
    if as_json:
        print_json(results)
    else:
        _show(results, data or "the rows that were held out", folder)


def _harness(folder: Path | str, data: str | None, as_json: bool, options: dict[str, Any]) -> None:
    given = {"DATA": data, "--map": options["mapping"], "--against": options["against"]}
    given["--generate"] = options["generate"]
    if said := [name for name, value in given.items() if value is not None]:
        message = f"--harness asks rows of its own, and {', '.join(said)} is for others"
        raise UsageFault(Finding("L103", message, fix=f"--harness {options['harness']} alone"))
    tasks = [task.strip() for task in options["harness"].split(",") if task.strip()]
    from graftlm.training import evaluate_harness

    asked = {name: options[name] for name in ("base", "max_rows", "shots")}
    asked |= {name: options[name] for name in PLACING if options[name] is not None}
    lines = evaluate_harness(folder, tasks, **asked)
    if as_json:
        print_json(lines)
        return
    whose = ["tuned", "base"] if lines and "base" in lines[0] else ["tuned"]
    rows = [
        [
            line["task"],
            line["metric"],
            *(_more_or_less(line[who], line[f"{who}_stderr"]) for who in whose),
            *([f"{line['tuned'] - line['base']:+.3f}"] if len(whose) > 1 else []),
            str(line["rows"] or ""),
        ]
        for line in lines
    ]
    names = ["tuned", "untouched base", "change"] if len(whose) > 1 else ["score"]
    print_table(["task", "metric", *names, "rows"], rows, right=tuple(range(2, len(names) + 3)))


def _more_or_less(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def _model_of(what: str) -> Path | str:
    return what if kind_of(what) == "model" else must_be_adapter(what)


def _show(results: dict[str, Any], data: str, folder: Path | str) -> None:
    scores = results["scores"]
    click.echo(f"{folder} on {data}: {counted(results['eval_rows'], 'row')}")
    against = results.get("against")
    if against:
        scores = [*scores, against["scores"] | {"title": f"against: {against['name']}"}]
    first, second = results.get("measure", {}), results.get("second", {})
    if first and first["key"] not in ("macro_f1", "loss"):
        rows = [
            [s["title"], *_with_interval(s, first["key"]), f"{s[second['key']]:.3f}" if second["key"] in s else ""]
            for s in scores
        ]
        print_table(["", first["title"], "95 %", second["title"]], rows, right=(1, 3))
    elif "accuracy" in scores[0]:
        rows = [[s["title"], _percent(s["accuracy"]), *_with_interval(s, "macro_f1")] for s in scores]
        print_table(["", "accuracy", "macro-F1", "95 %"], rows, right=(1, 2))
    else:
        rows = [[s["title"], *_with_interval(s, "loss"), f"{s['perplexity']:.4g}"] for s in scores]
        print_table(["", "loss", "95 %", "perplexity"], rows, right=(1, 3))
    if sure := results.get("calibration"):
        click.echo(
            f"\ncalibration  off by {_percent(sure['ece'])} on average (ECE), Brier {sure['brier']:.3f}, "
            f"{sure['nats']:.3f} nats a row"
        )
    if answers := results.get("answers"):
        click.echo(f"\nwritten answers to {counted(answers['rows'], 'row')}, from 0 to 1")
        rows = [
            [who, *(f"{answers[who][name]:.3f}" for name in ("rouge_l", "chrf", "bleu", "exact"))]
            for who in ("tuned", "base")
            if who in answers
        ]
        print_table(["", "ROUGE-L", "chrF", "BLEU", "exact"], rows, right=(1, 2, 3, 4))
    if against:
        click.echo(f"\n{folder} minus {against['name']}, the same rows")
        told = against["measures"] | against.get("answers", {})
        rows = [
            [
                name,
                f"{m['difference']:+.4f}",
                f"{m['low']:+.4f} to {m['high']:+.4f}",
                f"{m['p_value']:.3g}",
                m["verdict"],
            ]
            for name, m in told.items()
        ]
        print_table(["", "difference", "95 %", "p", "verdict"], rows, right=(1, 3))
    if results.get("worst"):
        click.echo("\nworst rows")
        print_table(["row", "", ""], [_worst(row) for row in results["worst"]])


def _worst(row: dict[str, Any]) -> list[str]:
    if "reward" in row:
        said = f"{row['label']}, reward {row['reward']:+.3f}"
    elif "predicted" in row:
        sure = f" ({row['probability']:.2f})" if "probability" in row else ""
        said = f"is {clip(str(row['label']), 40)}, said {clip(str(row['predicted']), 40)}{sure}"
    else:
        said = f"loss {row['loss']:.3f}"
    return [str(row.get("row", "")), said, clip(" ".join(row["text"].split()), 80)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _with_interval(score: dict[str, Any], name: str) -> list[str]:
    """The value and its interval, `?` where none was computed."""
    low, high = score.get(f"{name}_low"), score.get(f"{name}_high")
    return [f"{score[name]:.3f}", "?" if low is None or high is None else f"{low:.3f} to {high:.3f}"]
