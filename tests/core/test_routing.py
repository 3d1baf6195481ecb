"""Routing: what `use` reads, how rows map to entries, and which batches are admitted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.routing import Batch, Routing, entries, read_spec
from graftlm.errors import RoutingError

NAMES = st.sampled_from(["a", "b", "c"])
CHOICES = st.none() | NAMES | st.lists(NAMES, unique=True, max_size=3).map(tuple)


@pytest.mark.parametrize(
    ("spec", "routing", "text"),
    [
        (None, Routing(), "base"),
        ("a", Routing(whole=("a",)), "a"),
        (("a", "b"), Routing(whole=("a", "b")), "a + b"),
        ((), Routing(), "base"),
        (["a", None, ("a", "b")], Routing(rows=(("a",), (), ("a", "b"))), "a, base, a + b"),
        ([None], Routing(rows=((),)), "base"),
    ],
)
def test_specs(spec, routing, text):
    assert read_spec(spec) == routing
    assert str(read_spec(spec)) == text


@pytest.mark.parametrize(
    ("spec", "code"),
    [([], "R101"), (("a", "a"), "R102"), ([("b", "b")], "R102"), (3, "R103"), ([3], "R103"), ([["a"]], "R103"),
     (("a", None), "R103"), ({"a": 1}, "R103"), (b"a", "R103")],
)  # fmt: skip
def test_bad_specs(spec, code):
    with pytest.raises(RoutingError) as caught:
        read_spec(spec)
    assert caught.value.findings[0].code == code


@given(st.lists(CHOICES, min_size=1, max_size=8))
def test_groups_hold_every_row_once_with_its_choice(spec):
    routing = read_spec(spec)
    seen = {row: choice for choice, rows in routing.groups for row in rows}
    assert sum(len(rows) for _, rows in routing.groups) == len(spec)
    for row, entry in enumerate(spec):
        wanted = () if entry is None else (entry,) if isinstance(entry, str) else entry
        assert seen[row] == wanted
    assert routing.names == {name for choice in routing.rows for name in choice}
    assert len({choice for choice, _ in routing.groups}) == len(routing.groups)


@given(
    st.integers(1, 6).flatmap(
        lambda total: st.tuples(st.just(total), st.integers(1, 5), st.sets(st.integers(0, total - 1), min_size=1))
    )
)
def test_entries_are_those_that_repeating_the_rows_would_mark(drawn):
    total, each, rows = drawn
    marks = torch.zeros(total, dtype=torch.bool)
    marks[sorted(rows)] = True
    wanted = marks.repeat_interleave(each).nonzero().flatten()
    found = entries(tuple(sorted(rows)), total * each, total, torch.device("cpu"))
    assert torch.equal(found, wanted)


@given(st.permutations(range(4)).map(tuple), st.integers(1, 3))
def test_entries_of_all_rows_cover_everything_once(rows, each):
    found = entries(rows, 4 * each, 4, torch.device("cpu"))
    assert sorted(found.tolist()) == list(range(4 * each))


def ids(rows, tokens, start=0):
    return torch.arange(start, start + rows * tokens).reshape(rows, tokens)


def test_one_choice_for_all_admits_any_batch():
    batch = Batch()
    for rows in (1, 7, 4):
        batch.admit(Routing(whole=("a",)), ids(rows, 3))
        assert batch.rows == rows


def test_rows_are_admitted_one_to_one():
    batch = Batch()
    batch.admit(read_spec(["a", None]), ids(2, 3))
    assert (batch.rows, batch.copies) == (2, 1)


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_different_rows_in_another_number_are_refused(rows):
    with pytest.raises(RoutingError) as caught:
        Batch().admit(read_spec(["a", None]), ids(rows, 3))
    assert caught.value.findings[0].code == "R104"


def test_consecutive_copies_are_admitted_and_may_then_differ():
    batch, routing = Batch(), read_spec(["a", None])
    batch.admit(routing, ids(2, 3).repeat_interleave(2, 0))
    assert (batch.rows, batch.copies) == (4, 2)
    batch.admit(routing, ids(4, 1), cached=True)  # the next tokens of four beams
    longer = torch.cat([ids(2, 3).repeat_interleave(2, 0), ids(4, 1, 90)], 1)
    batch.admit(routing, longer)  # the same without a cache
    with pytest.raises(RoutingError):
        batch.admit(routing, ids(4, 4))  # four other rows
    with pytest.raises(RoutingError):
        batch.admit(routing, ids(4, 1))  # four other rows of one token


def test_copies_that_do_not_stand_together_are_refused():
    with pytest.raises(RoutingError):
        Batch().admit(read_spec(["a", None]), ids(2, 3).repeat(2, 1))
    with pytest.raises(RoutingError):
        Batch().admit(read_spec(["a", None]), ids(4, 1))


def test_nothing_to_see_is_nothing_to_refuse():
    batch = Batch()
    batch.admit(read_spec(["a", None]), None)
    assert batch.rows is None
