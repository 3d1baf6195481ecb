"""`graftlm runs`: the runs in a folder: list, show, diff, repeat, resume, remove."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import click

from graftlm.cli.output import print_json, print_table
from graftlm.cli.usage import UsageFault, Verb
from graftlm.errors import Finding, nearest

__all__ = ["verb"]

_ACTIONS = ("list", "show", "diff", "repeat", "resume", "remove")


@click.command(
    "runs",
    cls=Verb,
    arguments=[
        ("ACTION", "list (by itself), show, diff (two runs), repeat, resume, remove"),
        ("RUN", "folders of runs, or their names in --folder"),
    ],
    examples=["graftlm runs", "graftlm runs diff tickets-1 tickets-2", "graftlm runs repeat tickets-1 -o again"],
)
@click.argument("action", required=False, default="list")
@click.argument("run", nargs=-1)
@click.option("--folder", default="runs", metavar="FOLDER", help="Where runs are (runs).")
@click.option("-o", "--out", metavar="FOLDER", help="Of repeat: the folder of the new run.")
@click.option("--yes", is_flag=True, help="Of remove: do it; without it, only say what would go.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
@click.pass_obj
def verb(
    command: str, /, action: str, run: tuple[str, ...], folder: str, out: str | None, yes: bool, as_json: bool
) -> None:
    """List runs, show one, tell two apart, repeat one, go on with a stopped one, or remove one.

    On a processor a repeated run gives the same adapter, number for number, with the same versions and threads.
    """
    if action not in _ACTIONS:
        close = nearest(action, _ACTIONS, most=1)
        hint = f". Did you mean {close[0]}?" if close else ""
        fix = f"graftlm runs {close[0] if close else 'list'}"
        raise UsageFault(Finding("L103", f"runs cannot {action!r}: {', '.join(_ACTIONS)}{hint}", fix=fix))
    wanted = {"list": 0, "diff": 2}.get(action, 1)
    if len(run) != wanted:
        raise UsageFault(
            Finding(
                "L103", f"runs {action} wants {wanted} run{'s' * (wanted != 1)}, got {len(run)}", fix="graftlm runs"
            )
        )
    places = [_place(name, Path(folder)) for name in run]
    if action == "list":
        _list(Path(folder), as_json)
    elif action == "show":
        _show(places[0], as_json)
    elif action == "diff":
        _diff(places[0], places[1], as_json)
    elif action == "remove":
        _remove(places[0], yes)
    else:
        _again(action, places[0], out, command)


def _record(place: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((place / "run.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise UsageFault(
            Finding("U102", f"{place / 'run.json'} cannot be read: {error}", fix="graftlm runs")
        ) from error


def _place(name: str, folder: Path) -> Path:
    for place in (Path(name), folder / name):
        if (place / "run.json").is_file():
            return place
    names = [path.parent.name for path in folder.glob("*/run.json")]
    close = nearest(name, names, most=1)
    hint = f". Did you mean {close[0]}?" if close else ""
    raise UsageFault(
        Finding("U101", f"no run {name!r}{hint}", fix=f"graftlm runs show {close[0]}" if close else "graftlm runs")
    )


def _score(record: dict[str, Any]) -> str:
    scores = record.get("results", {}).get("scores", [])
    best = next((s for s in scores if s.get("name") in ("tuned", "adapter")), scores[0] if scores else {})
    if "macro_f1" in best:
        return f"macro-F1 {best['macro_f1']:.3f}"
    return f"loss {best['loss']:.3f}" if "loss" in best else ""


def _list(folder: Path, as_json: bool) -> None:
    places = sorted(path.parent for path in folder.glob("*/run.json"))
    rows = []
    for place in places:
        try:
            record = _record(place)
        except UsageFault:
            rows.append({"run": place.name, "status": "unreadable"})
            continue
        rows.append(
            {
                "run": place.name,
                "status": record.get("status", ""),
                "started": str(record.get("started", ""))[:16].replace("T", " "),
                "task": record.get("task", ""),
                "base": record.get("settings", {}).get("model", {}).get("name", ""),
                "method": record.get("method", record.get("settings", {}).get("method", "")),
                "steps": record.get("steps", ""),
                "score": _score(record),
            }
        )
    if as_json:
        print_json(rows)
    elif rows:
        heads = ("run", "status", "started", "task", "base", "method", "steps", "score")
        print_table(heads, [[row.get(head, "") for head in heads] for row in rows])
    else:
        click.echo(f"no runs in {folder}    next: graftlm train tickets.csv")


def _show(place: Path, as_json: bool) -> None:
    record = _record(place)
    if as_json:
        print_json(record)
        return
    lines = {
        "run": str(place),
        "status": record.get("status", ""),
        "command": record.get("command", ""),
        "started": record.get("started", ""),
        "data": record.get("data", {}).get("line", ""),
        "base": f"{record.get('base', {}).get('name', '')}  {record.get('base', {}).get('fingerprint', '')}",
        "method": record.get("method", ""),
        "trainable": f"{record.get('trainable_parameters', 0):,}",
        "steps": f"{record.get('steps', 0)} in {record.get('seconds', 0)} s",
        "score": _score(record),
        "report": str(place / "report.html"),
    }
    print_table(["", ""], [(name, value) for name, value in lines.items() if value])
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    click.echo(f"{size / 1e6:.1f} MB on disk")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _diff(first: Path, second: Path, as_json: bool) -> None:
    left, right = _record(first), _record(second)
    parts = ("settings", "data", "base", "environment", "decided")
    a = _flat({part: left.get(part, {}) for part in parts} | {"score": _score(left)})
    b = _flat({part: right.get(part, {}) for part in parts} | {"score": _score(right)})
    rows = [(n, a.get(n), b.get(n)) for n in dict.fromkeys((*a, *b)) if a.get(n) != b.get(n) and n != "settings.output"]
    if as_json:
        print_json({name: [one, other] for name, one, other in rows})
    elif rows:
        print_table(["", str(first), str(second)], rows)
    else:
        click.echo("no difference")


def _remove(place: Path, yes: bool) -> None:
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    if not yes:
        fix = f"graftlm runs remove {shlex.quote(str(place))} --yes"
        raise UsageFault(Finding("L108", f"{place} ({size / 1e6:.1f} MB) would be removed for good", fix=fix))
    shutil.rmtree(place)
    click.echo(f"removed {place} ({size / 1e6:.1f} MB)")


def _again(action: str, place: Path, out: str | None, command: str) -> None:
    from dataclasses import replace

    from graftlm.settings import resolve
    from graftlm.training import train_resolved
    from graftlm.training.folder import free_folder, resolved_of

    here = shlex.quote(str(place))
    if action == "resume":
        run = train_resolved(resolve(python={"output": str(place)}), resume=True, command=command)
        stopped = run.record.get("status") == "stopped"
        click.echo(f"next     graftlm runs {'resume' if stopped else 'show'} {here}")
        return
    asked = resolved_of(_record(place))
    fresh = out or str(free_folder(place.name, parent=place.parent))
    asked = replace(asked, settings=asked.settings.model_copy(update={"output": fresh}))
    run = train_resolved(asked, command=command)
    click.echo(f"next     graftlm runs diff {here} {shlex.quote(str(run.folder))}")
