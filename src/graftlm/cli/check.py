"""`graftlm check`: everything that is wrong with a run, told at once, in seconds, without training."""

from __future__ import annotations

import time
from typing import Any

import click

from graftlm.cli.output import harmless, print_json
from graftlm.cli.run_flags import attempted_from, run_flags
from graftlm.cli.usage import Verb
from graftlm.errors import Finding

__all__ = ["verb"]


@click.command(
    "check",
    cls=Verb,
    arguments=[("DATA", "file with the rows, as for train")],
    examples=["graftlm check tickets.csv", "graftlm check -c run.yaml --json"],
)
@run_flags
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def verb(as_json: bool, config: str | None, set: tuple[str, ...], **flags: str | None) -> int:
    """Tell everything that is wrong with a run: settings, data, base, method, memory and disk. Nothing is trained.

    The flags are those of train, which begins with the same check. The exit code is 2 where anything must be mended;
    notes alone give 0.
    """
    began_s = time.monotonic()
    attempted = attempted_from(config, set, flags)
    from graftlm.training.early import early_findings

    notes, faults = early_findings(attempted)
    whole = not faults
    if whole:  # the rest takes torch, and could not be told beside what is to be mended first
        from graftlm.training.ready import check_resolved

        notes, faults = check_resolved(attempted.resolved)
    if as_json:
        print_json([_plain(f, "error") for f in faults] + [_plain(f, "note") for f in notes])
        return 2 if faults else 0
    for finding in (*faults, *notes):
        click.echo(harmless(str(finding)))
    counted = f"{len(faults)} to mend, {len(notes)} to know of, in {time.monotonic() - began_s:.1f} s"
    after = "" if faults else "    next: graftlm train with the same flags"
    click.echo(counted + (after if whole else "    then: tokens and memory, which need these mended"))
    return 2 if faults else 0


def _plain(finding: Finding, kind: str) -> dict[str, Any]:
    return {
        "code": finding.code,
        "kind": kind,
        "place": finding.place,
        "message": finding.message,
        "detail": list(finding.detail),
        "fix": finding.fix,
    }
