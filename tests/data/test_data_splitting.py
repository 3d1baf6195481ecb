"""A split is the same each time, keeps every label on both sides and equal texts together."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.data.labels import Labels
from graftlm.data.splitting import default_share, split, split_document


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from([None, "x", "y"])), max_size=40),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_every_row_is_on_one_side_and_copies_stay_together(pairs, share, seed):
    rows = [row for row, _ in pairs]
    labels = [label for _, label in pairs]
    train, held = split(rows, labels, share=share, seed=seed)
    assert sorted(train + held) == list(range(len(rows)))
    assert not {rows[at] for at in train} & {rows[at] for at in held}
    assert not rows or train
    assert (train, held) == split(rows, labels, share=share, seed=seed)


def test_sizes_and_strata():
    rows = [f"row {i}" for i in range(200)]
    labels = ["rare" if i % 20 == 0 else "often" for i in range(200)]
    train, held = split(rows, labels, share=0.2, seed=1)
    assert Counter(labels[at] for at in held) == {"often": 38, "rare": 2}
    assert len(train) == 160
    assert split(rows, labels, share=0.2, seed=2)[1] != held


def test_a_label_is_never_taken_out_of_train():
    rows, labels = ["a", "b", "c", "d"], ["x", "y", "y", "y"]
    train, _ = split(rows, labels, share=0.5, seed=0)
    assert {labels[at] for at in train} == {"x", "y"}


def test_no_share_no_rows():
    assert split(["a", "b"], share=0, seed=0) == ([0, 1], [])
    assert len(split([str(i) for i in range(10)], share=0.01, seed=0)[1]) == 1
    assert split(["same"] * 5, share=0.5, seed=0) == ([0, 1, 2, 3, 4], [])
    with pytest.raises(ValueError, match="share is 1"):
        split(["a"], share=1, seed=0)


def test_a_row_keeps_its_side_when_others_come():
    rows = [f"row {i}" for i in range(300)]
    _, before = split(rows, share=0.2, seed=0)
    _, after = split(rows + [f"new {i}" for i in range(30)], share=0.2, seed=0)
    assert len(set(before) & set(after)) > 50


def test_default_share():
    assert [default_share(rows) for rows in (10, 2000, 2001)] == [0.2, 0.2, 0.05]


def test_a_document_is_cut_between_paragraphs():
    text = "\n\n".join(f"Paragraph {i} of the story." for i in range(20))
    head, tail = split_document(text, 0.2)
    assert head + tail == text
    assert tail.startswith("Paragraph")
    assert 0.1 < len(tail) / len(text) < 0.3
    assert split_document("word", 0.5) == ("word", "")


def test_labels_have_ids_in_a_sensible_order():
    assert Labels.of(["b", "a", "b"]).names == ("a", "b")
    assert Labels.of([10, 9, 2]).names == ("2", "9", "10")
    assert Labels.of(["10", "9"]).names == ("9", "10")
    assert Labels.of([True, False]).names == ("false", "true")
    labels = Labels.of(["yes", "no"])
    assert [labels.id(name) for name in ("no", "yes")] == [0, 1]
    assert labels.name(1) == "yes"
    assert Labels.from_dict(labels.to_dict()) == labels
    assert "maybe" not in labels
    with pytest.raises(ValueError, match="maybe"):
        labels.id("maybe")


@given(
    st.lists(
        st.tuples(st.text("abcdefgh", min_size=1, max_size=2), st.sampled_from("xy"), st.sampled_from("pqrstu")),
        max_size=40,
    ),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_groups_and_copies_stay_on_one_side(triples, share, seed):
    rows, labels, groups = ([triple[at] for triple in triples] for at in range(3))
    train, held = split(rows, labels, share=share, seed=seed, groups=groups)
    assert sorted(train + held) == list(range(len(rows)))
    for told in (rows, groups):
        assert not {told[at] for at in train} & {told[at] for at in held}
    assert not rows or train
    assert (train, held) == split(rows, labels, share=share, seed=seed, groups=groups)


def test_groups_are_held_out_with_every_label_in_its_share():
    rows = [f"row {at}" for at in range(200)]
    labels = ["x" if at % 4 else "y" for at in range(200)]
    groups = [at // 4 for at in range(200)]
    _, held = split(rows, labels, share=0.2, seed=0, groups=groups)
    assert Counter(labels[at] for at in held) == {"x": 30, "y": 10}
    # One that is larger than the share is held out whole, the smallest of such.
    _, held = split(rows[:50], share=0.1, seed=0, groups=["a"] * 20 + ["b"] * 30)
    assert held == list(range(20))
    assert split(rows[:9], share=0.3, seed=0, groups=["a"] * 9) == (list(range(9)), [])
