"""Runs every benchmark of this folder, one after the other, with its defaults: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    scripts = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("__"))
    failed = []
    for script in scripts:
        print(f"--- {script.name}", flush=True)
        if subprocess.run([sys.executable, str(script)], check=False).returncode:
            failed.append(script.name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
