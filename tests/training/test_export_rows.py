"""The rows that an export is proven on: those that the run held out, one for each answer where a row has several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm.training import exporting, run


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": [3]}], [[1, 2], [3]]),
        ([{"sequences": [{"input_ids": [1, 2]}, {"input_ids": [1, 4]}], "target": 0}], [[1, 2], [1, 4]]),
    ],
    ids=["one text", "pairs"],
)
def test_rows_are_sequences(items: list[Any], wanted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "held_out_of", lambda *_: SimpleNamespace(eval=items))
    assert exporting._rows(Path("a-run"), SimpleNamespace()) == wanted  # type: ignore[arg-type]
