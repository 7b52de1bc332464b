"""Rows in slots become a rectangle and come back, whatever their order and number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.model.padding import pad_rows

CPU = torch.device("cpu")


@st.composite
def slots_of_rows(draw: st.DrawFn) -> tuple[int, list[tuple[int, list[int]]]]:
    total = draw(st.integers(1, 12))
    order = draw(st.permutations(range(total)))
    rows = order[: draw(st.integers(1, total))]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(rows) - 1)), max_size=4)) | {0})
    parts = [rows[start:end] for start, end in zip(cuts, [*cuts[1:], len(rows)], strict=True)]
    slots = draw(st.lists(st.integers(0, 20), min_size=len(parts), max_size=len(parts), unique=True))
    return total, [(slot, part) for slot, part in zip(slots, parts, strict=True) if part]


@given(slots_of_rows())
def test_every_row_stands_in_its_slot_and_comes_back(given_slots: tuple[int, list[tuple[int, list[int]]]]) -> None:
    total, slots = given_slots
    padded = pad_rows(slots, CPU)
    packed = torch.arange(total * 2).view(total, 2)
    places = padded.take(packed)
    assert places.shape == (padded.last - padded.first, padded.width, 2)
    for slot, rows in slots:
        assert torch.equal(places[slot - padded.first, : len(rows)], packed[rows])
    listed = [row for _, rows in slots for row in rows]
    assert torch.equal(padded.give(places), packed[listed])
    assert torch.equal(packed[padded.rows], packed[listed])


def test_a_full_rectangle_in_order_is_a_view() -> None:
    padded = pad_rows([(4, [2, 3]), (5, [4, 5])], CPU)
    packed = torch.randn(8, 3)
    assert padded.gather is None
    assert padded.scatter is None
    assert padded.take(packed).data_ptr() == packed[2].data_ptr()


def test_a_slot_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        pad_rows([(1, [0]), (1, [1])], CPU)
