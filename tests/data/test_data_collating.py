"""Batches hold the same tokens on either side of the padding, and nothing is trained on padding."""

from __future__ import annotations

import pytest
import torch

from graftlm.data.collating import Collator

ITEMS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row": 4},
    {"input_ids": [8], "labels": [8], "row": 9},
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    batch = Collator(pad_id=0, side=side, position_ids=True)(ITEMS)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "labels": (2, 8),
        "position_ids": (2, 8),
        "row": (2,),
    }
    assert all(value.dtype == torch.long for value in batch.values())
    for at, item in enumerate(ITEMS):
        seen = batch["attention_mask"][at].bool()
        assert batch["input_ids"][at][seen].tolist() == item["input_ids"]
        assert batch["labels"][at][seen].tolist() == item["labels"]
        assert batch["position_ids"][at][seen].tolist() == list(range(len(item["input_ids"])))
        assert batch["input_ids"][at][~seen].unique().tolist() == [0]
        assert batch["labels"][at][~seen].unique().tolist() == [-100]
    assert batch["attention_mask"][1].tolist() == ([0] * 7 + [1] if side == "left" else [1] + [0] * 7)
    assert batch["row"].tolist() == [4, 9]


def test_the_width_is_rounded_but_never_beyond_the_model():
    assert Collator(pad_id=0, pad_to_multiple_of=1)(ITEMS)["input_ids"].shape == (2, 3)
    assert Collator(pad_id=0, max_length=5)(ITEMS)["input_ids"].shape == (2, 5)
    assert Collator(pad_id=0, max_length=2)(ITEMS)["input_ids"].shape == (2, 3)


def test_classes_and_token_types():
    items = [
        {"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 2},
        {"input_ids": [7], "token_type_ids": [1], "labels": 0},
    ]
    batch = Collator(pad_id=3, side="left", pad_to_multiple_of=1)(items)
    assert batch["labels"].tolist() == [2, 0]
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 1]]
    assert batch["input_ids"].tolist() == [[5, 6], [3, 7]]
    assert "position_ids" not in batch


def test_wrong_arguments():
    with pytest.raises(ValueError, match="side is 'middle'"):
        Collator(pad_id=0, side="middle")
    with pytest.raises(ValueError, match="no items"):
        Collator(pad_id=0)([])
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0"):
        Collator(pad_id=0, pad_to_multiple_of=0)
