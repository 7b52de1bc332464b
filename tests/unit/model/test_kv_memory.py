"""Prefixes are chains of slices in order and without gaps, whatever is taken from them or appended to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import KVSegment, KVSlice, Prefix

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=1, dtype="float32")
CPU = torch.device("cpu")


def _segment(start: int, capacity: int) -> KVSegment:
    """A segment whose value at each position is the position."""
    segment = KVSegment.allocate(LAYOUT, capacity, start, CPU)
    segment.data.copy_(torch.arange(start, start + capacity, dtype=torch.float32).view(1, 1, 1, capacity, 1))
    return segment


def _prefix(lengths: list[int]) -> Prefix:
    prefix = Prefix()
    for length in lengths:
        prefix = prefix.append(KVSlice(_segment(prefix.tokens, length + 3), 0, length))
    return prefix


def _positions(prefix: Prefix) -> list[float]:
    return [value for part in prefix.slices for value in part.layer(1)[0][0, :, 0].tolist()]


lengths = st.lists(st.integers(1, 5), max_size=5)


@given(lengths, st.integers(0, 30))
def test_taking_keeps_the_first_positions_and_their_memory(parts: list[int], count: int) -> None:
    prefix = _prefix(parts)
    taken = prefix.take(count)
    assert taken.tokens == min(count, prefix.tokens)
    assert _positions(taken) == list(range(taken.tokens))
    assert all(part.tokens > 0 for part in taken.slices)
    assert [part.segment for part in taken.slices] == [part.segment for part in prefix.slices[: len(taken.slices)]]


@given(lengths, st.integers(0, 30), st.integers(0, 30))
def test_pieces_hold_just_the_positions_asked_for(parts: list[int], start: int, end: int) -> None:
    prefix = _prefix(parts)
    seen: dict[int, float] = {}
    for part, distance in prefix.pieces(start, end):
        for index, value in enumerate(part.layer(0)[1][0, :, 0].tolist()):
            seen[start + distance + index] = value
    assert seen == {position: position for position in range(start, min(end, prefix.tokens))}


def test_what_follows_in_the_same_memory_becomes_one_slice() -> None:
    segment = _segment(0, 8)
    prefix = Prefix().append(KVSlice(segment, 0, 3)).append(KVSlice(segment, 3, 2))
    assert prefix.slices == (KVSlice(segment, 0, 5),)
    elsewhere = prefix.append(KVSlice(_segment(5, 4), 0, 2))
    assert len(elsewhere.slices) == 2
    assert _positions(elsewhere) == list(range(7))


@pytest.mark.parametrize("start", [2, 4])
def test_a_gap_or_an_overlap_is_refused(start: int) -> None:
    prefix = Prefix().append(KVSlice(_segment(0, 8), 0, 3))
    with pytest.raises(ValueError, match=f"starts at {start}, prefix ends at 3"):
        prefix.append(KVSlice(_segment(start, 4), 0, 2))


def test_slices_are_equal_only_when_they_are_the_same_memory() -> None:
    """Attention reads a slice once for all who hold it, so equality must never join two of equal shape."""
    one, other = _segment(0, 4), _segment(0, 4)
    assert KVSlice(one, 0, 3) == KVSlice(one, 0, 3)
    assert KVSlice(one, 0, 3) != KVSlice(other, 0, 3)
    assert len({KVSlice(one, 0, 3), KVSlice(one, 0, 2), KVSlice(one, 1, 2), KVSlice(other, 0, 3)}) == 4


def test_a_layer_is_a_view_of_its_keys_and_values() -> None:
    segment = KVSegment.allocate(LAYOUT, 4, 10, CPU)
    segment.data.zero_()
    part = KVSlice(segment, 1, 2)
    keys, values = part.layer(1)
    keys.fill_(1.0)
    values.fill_(2.0)
    assert segment.data[1, 0, 0, :, 0].tolist() == [0, 1, 1, 0]
    assert segment.data[1, 1, 0, :, 0].tolist() == [0, 2, 2, 0]
    assert not segment.data[0].any()
    assert (part.start, part.end, segment.capacity) == (11, 13, 4)
    assert segment.size_bytes == 4 * LAYOUT.bytes_per_token
