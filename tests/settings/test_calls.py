"""Calls as text: what is written, pasted, is the same call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlm.methods import LoRA
from graftlm.settings.calls import call_as_text


def test_the_text_is_the_call() -> None:
    seen: dict[str, Any] = {}

    def train(**given: Any) -> None:
        seen.update(given)

    given = {
        "data": Path("a b.csv"), "base": None, "method": LoRA(rank=4), "epochs": 3, "methods": ("lora", "ia3"),
        "data.map": {"text": "t"}, "budget": "0.3%",
    }  # fmt: skip
    eval(call_as_text("train", given), {"train": train})
    plain = {key: value for key, value in given.items() if value is not None}
    assert seen == plain | {"data": "a b.csv", "method": "lora(rank=4)"}


def test_what_has_no_text_is_left_to_the_reader() -> None:
    assert call_as_text("train", {"data": iter([]), "reward": len}) == "train(data=..., reward=...)"
    for rows in ([{"text": "a"}], ({"text": "a"},)):
        assert call_as_text("train", {"data": rows, "epochs": 3}) == "train(data=..., epochs=3)"
