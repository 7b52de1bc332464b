"""Calls that are over before another thread wakes run on one; what comes after them has all threads again."""

from __future__ import annotations

import threading

import pytest
import torch

from alora_serve.model import threads as threads_module
from alora_serve.model.threads import (
    BYTES_PER_SECOND,
    MULTIPLICATIONS_PER_SECOND,
    WAKE_SECONDS,
    ThreadsFor,
    carry_thread_count,
)

SMALL_BYTES = WAKE_SECONDS * BYTES_PER_SECOND
"""One of two threads would save half of that time: half a wake."""


pytestmark = pytest.mark.usefixtures("two_sleeping_threads")


@pytest.mark.parametrize(
    ("size_bytes", "multiplications", "expected"),
    [
        (SMALL_BYTES, 0.0, 1),
        (0.0, WAKE_SECONDS * MULTIPLICATIONS_PER_SECOND, 1),
        (SMALL_BYTES, 2 * WAKE_SECONDS * MULTIPLICATIONS_PER_SECOND, 2),
        (3 * SMALL_BYTES, 0.0, 2),
    ],
)
def test_a_call_has_another_thread_where_that_saves_more_than_a_wake(
    size_bytes: float, multiplications: float, expected: int
) -> None:
    with ThreadsFor(size_bytes, multiplications):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2


def test_the_more_threads_the_sooner_they_pay() -> None:
    work = 1.5 * SMALL_BYTES
    with ThreadsFor(work, 0.0):
        assert torch.get_num_threads() == 1
    torch.set_num_threads(8)
    with ThreadsFor(work, 0.0):
        assert torch.get_num_threads() == 8


def test_a_call_that_fails_gives_the_threads_back() -> None:
    with pytest.raises(ZeroDivisionError), ThreadsFor(0.0, 0.0):
        _ = 1 / 0
    assert torch.get_num_threads() == 2


def test_threads_that_do_not_sleep_are_used_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "_threads_sleep", False)
    with ThreadsFor(0.0, 0.0):
        assert torch.get_num_threads() == 2


def test_a_large_call_inside_a_block_of_small_ones_has_all_threads() -> None:
    with ThreadsFor(0.0, 0.0):
        with ThreadsFor(3 * SMALL_BYTES, 0.0):
            assert torch.get_num_threads() == 2
            with ThreadsFor(0.0, 0.0):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_what_one_thread_does_changes_no_other() -> None:
    """A store's thread copies while the engine computes."""
    seen: list[int] = []

    def other() -> None:
        with ThreadsFor(3 * SMALL_BYTES, 0.0):
            seen.append(torch.get_num_threads())

    with ThreadsFor(0.0, 0.0):
        thread = threading.Thread(target=carry_thread_count(other))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 1
    assert seen == [2]


def test_a_new_thread_has_as_many_as_its_maker_whatever_another_is_at_when_its_first_call_comes() -> None:
    begun, meanwhile = threading.Event(), threading.Event()
    seen: list[int] = []

    def work() -> None:
        begun.set()
        assert meanwhile.wait(30)
        seen.append(torch.get_num_threads())

    with ThreadsFor(0.0, 0.0):
        thread = threading.Thread(target=carry_thread_count(work))
        thread.start()
        assert begun.wait(30)
        torch.set_num_threads(1)
        meanwhile.set()
        thread.join()
    assert seen == [2]
