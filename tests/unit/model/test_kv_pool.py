"""No two live segments share memory, whatever was let go of in between, and what comes next is touched beforehand."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.errors import ConfigError
from alora_serve.kv.layout import KVLayout
from alora_serve.model import kv_pool
from alora_serve.model.kv_memory import KVSegment
from alora_serve.model.kv_pool import KVPool, Ranges

torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")
PAGE = 4096
TOKENS = PAGE // LAYOUT.bytes_per_token
"""Tokens whose KV is a page."""


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "FIRST_PAUSE_SECONDS", 0.0)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _is_pooled(pool: KVPool, segment: KVSegment) -> bool:
    return segment.data.untyped_storage().data_ptr() == pool._memory.untyped_storage().data_ptr()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_what_is_taken_is_disjoint_and_comes_back_whole(steps: list[tuple[bool, int]]) -> None:
    ranges, held = Ranges(32), list[tuple[int, int]]()
    for give, size in steps:
        if give and held:
            ranges.give_back(*held.pop(size % len(held)))
        elif (start := ranges.take(size)) is not None:
            held.append((start, start + size))
        else:
            assert all(end - low < size for low, end in ranges.free)
        everything = sorted([*held, *ranges.free])
        assert [low for low, _ in everything] == [0, *(end for _, end in everything)][:-1]
        assert everything[-1][1] == 32
        assert all(earlier[1] < later[0] for earlier, later in zip(ranges.free, ranges.free[1:], strict=False))
    for start, end in held:
        ranges.give_back(start, end)
    assert ranges.free == ((0, 32),)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * TOKENS)), max_size=40))
def test_live_segments_keep_what_was_written(steps: list[tuple[bool, int]]) -> None:
    pool = KVPool(LAYOUT, 8 * PAGE, CPU)
    held: list[tuple[float, KVSegment]] = []
    for number, (drop, capacity) in enumerate(steps):
        if drop and held:
            held.pop(capacity % len(held))
        else:
            segment = pool.segment(capacity, start=number)
            assert (segment.capacity, segment.start) == (capacity, number)
            segment.data.fill_(float(number))
            held.append((float(number), segment))
        assert all(bool((segment.data == value).all()) for value, segment in held)


def test_memory_is_used_again_when_nobody_holds_the_segment() -> None:
    pool = KVPool(LAYOUT, 4 * PAGE, CPU)
    first = pool.segment(TOKENS, 0)
    address = first.data.data_ptr()
    alias = first
    del first
    gc.collect()
    assert pool.segment(TOKENS, 0).data.data_ptr() != address, "somebody still holds it"
    del alias
    gc.collect()
    assert pool.segment(TOKENS, 0).data.data_ptr() == address


def test_what_does_not_fit_is_allocated_apart() -> None:
    pool = KVPool(LAYOUT, 2 * PAGE, CPU)
    inside, outside = pool.segment(2 * TOKENS, 0), pool.segment(1, 0)
    assert _is_pooled(pool, inside)
    assert not _is_pooled(pool, outside)
    assert not _is_pooled(KVPool(LAYOUT, 0, CPU), inside)


def test_a_segment_may_be_written_outside_inference_mode() -> None:
    """The engine allocates inside it; a fetch that goes on in the same segment writes from another thread."""
    with torch.inference_mode():
        segment = KVPool(LAYOUT, 2 * PAGE, CPU).segment(TOKENS, 0)
    segment.data.fill_(1.0)
    assert not segment.data.is_inference()


def test_what_comes_next_is_touched_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "_TOUCH_BYTES", 3 * PAGE)
    touched: list[tuple[int, int]] = []
    zero = kv_pool._zero
    pool = KVPool(LAYOUT, 100 * PAGE, CPU)

    def watch(memory: torch.Tensor, start: int, end: int) -> None:
        if memory is pool._memory:  # another test's pool may still be at it
            touched.append((start, end))
        zero(memory, start, end)

    monkeypatch.setattr(kv_pool, "_zero", watch)
    held = [pool.segment(4 * TOKENS, 0)]
    _wait(lambda: not pool._touching)
    assert touched == [(4 * PAGE, 7 * PAGE), (7 * PAGE, 10 * PAGE), (10 * PAGE, 13 * PAGE)]
    held.append(pool.segment(TOKENS, 0))
    _wait(lambda: not pool._touching)
    assert len(touched) == 3, "two of the largest are still ready"
    held.append(pool.segment(4 * TOKENS, 0))
    _wait(lambda: not pool._touching)
    assert touched[3:] == [(13 * PAGE, 16 * PAGE), (16 * PAGE, 19 * PAGE)]


def test_touching_never_writes_what_was_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "_TOUCH_BYTES", PAGE)
    pool = KVPool(LAYOUT, 400 * PAGE, CPU)
    held = []
    for number in range(100):
        segment = pool.segment(3 * TOKENS, 0)
        segment.data.fill_(float(number))
        held.append(segment)
    _wait(lambda: not pool._touching)
    assert all(bool((segment.data == number).all()) for number, segment in enumerate(held))


def test_more_than_the_system_gives_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="prefix_cache_bytes"):
        KVPool(LAYOUT, 1 << 60, CPU)


def test_nothing_is_touched_after_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is in torch while the interpreter ends would abort the process."""
    monkeypatch.setattr(kv_pool, "FIRST_PAUSE_SECONDS", 60.0)
    pool = KVPool(LAYOUT, 100 * PAGE, CPU)
    segment = pool.segment(TOKENS, 0)
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread is pool._toucher]
    assert pool._touched_end == PAGE
    del segment
    pool.segment(4 * TOKENS, 0)
    assert not pool._touching


def test_a_thread_that_could_not_start_is_tried_again_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a container's limit of threads."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pools = [KVPool(LAYOUT, 100 * PAGE, CPU) for _ in range(2)]
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        for pool in pools:
            assert _is_pooled(pool, pool.segment(TOKENS, 0)), "whoever needs memory has it"
    pools[0].close()
    held = pools[1].segment(TOKENS, 0)
    _wait(lambda: not pools[1]._touching)
    assert pools[1]._touched_end > held.size_bytes * 2, "what comes next is touched"
