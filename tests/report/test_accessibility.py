"""Accessibility: axe-core finds nothing serious on the pages of runs and comparisons, in a browser without a screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from graftlm.report import write_comparison, write_report

from .conftest import answers, classification
from .test_comparison import written

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_ASK = """
axe.run().then(found => {
  document.body.innerHTML = "<pre id=told></pre>";
  document.getElementById("told").textContent = JSON.stringify({
    passed: found.passes.length,
    wrong: found.violations.map(each => [each.id, each.impact, each.nodes.map(node => node.html.slice(0, 200))]),
  });
});
"""


def judged(page: Path, width: int) -> dict[str, object]:
    """What axe-core says of a page at a width in pixels; the page forbids all scripts, so a copy is asked."""
    text, policies = _POLICY.subn("", page.read_text(encoding="utf-8"))
    assert policies == 1
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    copy = page.with_name("asked.html")
    copy.write_text(text.replace("</body>", f"<script>{axe}</script><script>{_ASK}</script></body>"), encoding="utf-8")
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    words += [f"--window-size={width},2000", copy.as_uri()]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="told">(.*?)</pre>', said, flags=re.DOTALL)
    assert found, said[-500:]
    told: dict[str, object] = json.loads(html.unescape(found[1]))
    return told


PAGES: dict[str, Callable[[Path], Path]] = {
    "classifier": lambda folder: write_report(classification(folder)),
    "answers": lambda folder: write_report(answers(folder)),
    "comparison": lambda folder: write_comparison(written(folder)),
}


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize(("kind", "width"), [("classifier", 390), ("answers", 1280), ("comparison", 1280)])
def test_nothing_serious_is_found(kind: str, width: int, tmp_path: Path) -> None:
    pytest.importorskip("axe_core_python")
    told = judged(PAGES[kind](tmp_path / "made"), width)
    assert told["wrong"] == []
    assert int(str(told["passed"])) >= 15


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_fault_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("axe_core_python")
    page = PAGES["answers"](tmp_path / "made")
    page.write_text(page.read_text().replace("</main>", '<img src="data:,"><p style="color:#eee">pale</p></main>'))
    wrong = judged(page, 1280)["wrong"]
    assert isinstance(wrong, list)
    assert {"image-alt", "color-contrast"} <= {each[0] for each in wrong}
