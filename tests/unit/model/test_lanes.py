"""Parts run once each, in lanes of one torch thread, and a part that fails ends the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from alora_serve.model import threads as threads_module
from alora_serve.model.lanes import MOST_LANES, _pool, lanes, run_in_lanes
from alora_serve.model.threads import ThreadsFor

pytestmark = pytest.mark.usefixtures("two_sleeping_threads")


@pytest.fixture
def new_lanes() -> Iterator[None]:
    """Lanes whose threads have yet to begin."""
    _pool.cache_clear()
    yield
    _pool.cache_clear()


def _refuse(_: threading.Thread) -> None:
    """As at a container's limit of threads."""
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("count", [1, 2, MOST_LANES])
def test_every_part_runs_once_on_one_torch_thread(count: int) -> None:
    ran: list[tuple[int, int, bool]] = []

    def part(number: int) -> None:
        ran.append((number, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    run_in_lanes([partial(part, number) for number in range(50)], count)
    assert sorted(ran) == [(number, 1, True) for number in range(50)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("new_lanes")
def test_a_lane_computes_on_one_torch_thread_whatever_its_own_began_with() -> None:
    all_there = threading.Barrier(MOST_LANES - 1, timeout=30)

    def begin(_: int) -> int:
        all_there.wait()
        return torch.get_num_threads()

    assert set(_pool().map(begin, range(MOST_LANES - 1))) == {2}
    meeting = threading.Barrier(2, timeout=30)
    ran: list[int] = []

    def part() -> None:
        meeting.wait()
        ran.append(torch.get_num_threads())

    run_in_lanes([part, part], 2)
    assert ran == [1, 1]


@pytest.mark.usefixtures("new_lanes")
def test_a_lane_that_begins_late_leaves_other_threads_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread sets is what threads that begin later have: here it sets nothing before its caller is done."""
    caller, caller_is_done, lane_has_begun = threading.current_thread(), threading.Event(), threading.Event()
    set_num_threads = torch.set_num_threads

    def set_late(count: int) -> None:
        if threading.current_thread() is not caller:
            lane_has_begun.set()
            assert caller_is_done.wait(30)
        set_num_threads(count)
        if threading.current_thread() is caller and count == 2:
            caller_is_done.set()

    monkeypatch.setattr(torch, "set_num_threads", set_late)
    run_in_lanes([partial(lane_has_begun.wait, 30)] * 2, 2)
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def test_lanes_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)
    run_in_lanes([meeting.wait, meeting.wait], 2)


@pytest.mark.usefixtures("new_lanes")
def test_the_calling_thread_does_the_share_of_lanes_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", _refuse)
        run_in_lanes([partial(ran.append, "first")] * 10, 3)
    assert ran == ["first"] * 10
    meeting = threading.Barrier(2, timeout=30)
    run_in_lanes([meeting.wait, meeting.wait], 2)
    assert ran == ["first"] * 10


@pytest.mark.usefixtures("new_lanes")
def test_a_lane_that_is_there_and_helps_where_none_can_be_started_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has done the last of another call and not yet said so: the pool counts it as busy."""
    is_free, has_begun = threading.Event(), threading.Event()
    _pool().submit(is_free.wait, 30)
    finished: list[bool] = []

    def of_the_caller() -> None:
        is_free.set()
        assert has_begun.wait(30)

    def of_the_lane() -> None:
        has_begun.set()
        time.sleep(0.1)
        finished.append(True)

    monkeypatch.setattr(threading.Thread, "start", _refuse)
    run_in_lanes([of_the_caller, of_the_lane], 2)
    assert finished == [True]


def test_a_part_that_fails_ends_the_work_and_is_told_after_all_lanes_have_stopped() -> None:
    meeting = threading.Barrier(2, timeout=30)
    finished: list[bool] = []
    waited: list[None] = []

    def fails() -> None:
        meeting.wait()
        raise ZeroDivisionError

    def works() -> None:
        meeting.wait()
        torch.randn(300, 300) @ torch.randn(300, 300)
        finished.append(True)

    def waits() -> None:
        waited.append(time.sleep(0.01))

    with pytest.raises(ZeroDivisionError):
        run_in_lanes([fails, works, *[waits] * 1_000], 2)
    assert finished == [True]
    assert len(waited) < 1_000
    assert torch.get_num_threads() == 2


def test_there_are_as_many_lanes_as_threads_that_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lanes() == 2
    with ThreadsFor(0, 0):
        assert torch.get_num_threads() == 1
        assert lanes() == 2
    torch.set_num_threads(MOST_LANES + 1)
    assert lanes() == 0
    torch.set_num_threads(2)
    monkeypatch.setattr(threads_module, "_threads_sleep", False)
    assert lanes() == 0
    torch.set_num_threads(1)
    assert lanes() == 1
