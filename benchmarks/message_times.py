"""How long a mistake takes to be told: every wrong setting and file of the tests, each by a `graftlm train` of its own.

    taskset -c 1 python -m benchmarks.message_times

Processor time of the whole process, from its start to its message; and of `--help` of every verb. The commands are
those of tests/mistakes. Results go to benchmarks/results/message_times.json.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "message_times.json"


def seconds_of(words: Sequence[str], folder: Path, code: int) -> float:
    """Processor time of one command, which must end with `code`."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    done = subprocess.run(
        [sys.executable, "-m", "graftlm", *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    if done.returncode != code:
        raise SystemExit(f"graftlm {shlex.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return spent() - before


def told(seconds: dict[str, float]) -> dict[str, Any]:
    ordered = sorted(seconds.values())
    slowest = max(seconds, key=lambda name: seconds[name])
    return {
        "commands": len(ordered), "median_s": round(statistics.median(ordered), 2),
        "nine_tenths_within_s": round(ordered[int(0.9 * (len(ordered) - 1))], 2),
        "slowest_s": round(ordered[-1], 2), "slowest": slowest,
    }  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from graftlm.cli.program import VERBS
    from mistakes.test_settings_mistakes import MISTAKES as SETTINGS
    from mistakes.test_settings_mistakes import words_of
    from mistakes.test_wrong_files import METHODS, lay
    from mistakes.test_wrong_files import MISTAKES as FILES

    mistakes: dict[str, float] = {}
    for text in SETTINGS:
        mistakes[text] = seconds_of(["train", *words_of(text)], ROOT, 2)
    for name, mistake in FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            lay(mistake, Path(folder))
            mistakes[name] = seconds_of(["train", *shlex.split(mistake.words)], Path(folder), 2)
    for text in METHODS:
        mistakes[text] = seconds_of(["train", "bundled:messages", "--method", text], ROOT, 2)
    helps = {verb: seconds_of([verb, "--help"], ROOT, 0) for verb in VERBS}
    found = {"mistakes": told(mistakes), "help": told(helps)}
    for what, row in found.items():
        print(what, row)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
