"""Private memory is handed out zeroed, grows with its content, and is taken back for the next sequence."""

from __future__ import annotations

import weakref
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.kv.layout import KVLayout
from alora_serve.model.tails import (
    ARENA_BYTES,
    ARENA_SLOTS,
    FIRST_TAIL_TOKENS,
    GPU_ARENA_TOKENS,
    KEPT_TOKENS,
    TailPool,
    TailSegment,
)

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture
def pool() -> TailPool:
    return TailPool(LAYOUT, CPU)


def test_tails_of_one_size_lie_side_by_side(pool: TailPool) -> None:
    first, second = pool.take(3, 10), pool.take(FIRST_TAIL_TOKENS, 20)
    assert (first.start, second.start) == (10, 20)
    assert first.arena is second.arena
    assert (first.slot, second.slot) == (0, 1)
    assert first.capacity == FIRST_TAIL_TOKENS
    first.data.fill_(1.0)
    assert not second.data.any()


def test_nothing_of_a_sequence_is_left_for_the_next(pool: TailPool) -> None:
    """A NaN would survive the zero that masked positions are multiplied with."""
    tail = pool.take(3, 0)
    tail.used = 2
    tail.data[:, :, :, :2].fill_(float("nan"))
    pool.give_back(tail)
    again = pool.take(3, 5)
    assert (again.arena, again.slot, again.start) == (tail.arena, tail.slot, 5)
    assert not again.data.any()


def test_a_long_tail_takes_memory_as_it_is_written() -> None:
    """To zero the slot of a long prompt of a plain LoRA would hold up a step of all others."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE

    before = resident_bytes()
    tail = TailPool(KVLayout(30, 3, 64, "float32"), CPU).take(8192, 0)
    assert tail.size_bytes > 300e6
    tail.used = 1
    tail.data[:, :, :, :1] = 1.0
    tail.arena.give_back(tail)
    assert resident_bytes() - before < 50e6


@pytest.mark.parametrize("tokens", [1, 512, 2048, 4096])
def test_answers_of_any_usual_length_lie_side_by_side(pool: TailPool, tokens: int) -> None:
    """As many as are attended to in one call."""
    tails = [pool.take(tokens, 0) for _ in range(ARENA_SLOTS + 1)]
    assert {tail.arena for tail in tails[:-1]} == {tails[0].arena}
    assert tails[-1].arena is not tails[0].arena


@pytest.mark.parametrize(
    ("tokens", "parted"), [(64, [[7, 8, 9]]), (2048, [[7, 9], [8]])], ids=["sooner read", "sooner called"]
)
def test_a_call_attends_to_slots_with_a_gap_where_that_is_sooner_read_than_called(
    tokens: int, parted: list[list[int]]
) -> None:
    """Of SmolLM2's shape, 34 us of a core's time or 540; holders are told in order, whatever their slots."""
    arena = TailPool(KVLayout(1, 3, 64, "float32"), CPU).take(tokens, 0).arena
    assert arena.runs({7: 1, 8: 4, 9: 0}, tokens) == parted


def test_on_a_gpu_no_call_is_parted() -> None:
    arena = TailPool(KVLayout(1, 64, 128, "float32"), torch.device("meta")).take(1, 0).arena
    assert arena.runs({1: 15, 2: 0}, 64) == [[1, 2]]


def test_an_arena_is_bounded_by_addresses_and_on_a_gpu_by_tokens() -> None:
    wide = KVLayout(layers=32, kv_heads=64, head_dim=128, dtype="float32")
    meta = torch.device("meta")  # as any device that is no processor; nothing is allocated
    for capacity in (FIRST_TAIL_TOKENS, GPU_ARENA_TOKENS // 2, 4 * GPU_ARENA_TOKENS):
        assert TailPool(wide, meta).take(capacity, 0).arena.data.shape[2] == max(1, GPU_ARENA_TOKENS // capacity)
    data = TailPool(wide, CPU).take(FIRST_TAIL_TOKENS + 1, 0).arena.data
    assert data.shape[2] < ARENA_SLOTS
    assert ARENA_BYTES // 2 < data.numel() * data.element_size() <= ARENA_BYTES


def test_a_tail_grows_with_its_content(pool: TailPool) -> None:
    tail = pool.take(1, 7)
    tail.used = 5
    tail.data[:, :, :, :5] = torch.arange(5.0).view(1, 1, 1, 5, 1)
    larger = pool.grow(tail, 3 * FIRST_TAIL_TOKENS)
    assert (larger.capacity, larger.start, larger.used) == (4 * FIRST_TAIL_TOKENS, 7, 5)
    assert torch.equal(larger.data[1, 0, 0, :5, 0], torch.arange(5.0))
    assert not larger.data[:, :, :, 5:].any()
    assert pool.take(1, 0).slot == tail.slot


@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=30))
def test_no_two_holders_share_memory(requests: list[tuple[int, bool]]) -> None:
    pool = TailPool(LAYOUT, CPU)
    held: list[tuple[float, TailSegment]] = []
    for number, (tokens, keep) in enumerate(requests, start=1):
        tail = pool.take(tokens, 0)
        assert tail.capacity >= tokens
        assert not tail.data.any()
        tail.used = tail.capacity
        tail.data.fill_(float(number))
        held.append((float(number), tail))
        if not keep:
            pool.give_back(held.pop(0)[1])
        assert all(bool((segment.data == mark).all()) for mark, segment in held)
    for _, segment in held:
        pool.give_back(segment)


def test_memory_of_a_burst_is_let_go(pool: TailPool) -> None:
    tails = [pool.take(1, 0) for _ in range(3 * ARENA_SLOTS)]
    long = pool.take(KEPT_TOKENS // ARENA_SLOTS + 1, 0)
    arenas = {weakref.ref(tail.arena) for tail in (*tails, long)}
    assert pool.used_bytes == (len(tails) * FIRST_TAIL_TOKENS + long.capacity) * LAYOUT.bytes_per_token
    for tail in (*tails, long):
        pool.give_back(tail)
    del tail, tails, long
    assert pool.used_bytes == 0
    assert sum(arena() is not None for arena in arenas) == 1
