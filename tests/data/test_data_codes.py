"""The table of codes and the code agree."""

from __future__ import annotations

import re
from pathlib import Path

import graftlm.data
from graftlm.data.codes import CODES

FOLDER = Path(graftlm.data.__file__).parent


def test_every_code_is_used_and_every_used_code_is_told():
    sources = [path.read_text() for path in FOLDER.glob("*.py") if path.name != "codes.py"]
    used = {code for source in sources for code in re.findall(r'"([DE]\d{3})"', source)}
    assert used == set(CODES)
