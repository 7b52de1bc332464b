"""One thread for what is done sooner than another thread wakes up.

With ``OMP_WAIT_POLICY=passive``, which the launcher sets so that processes on few cores do not spin against each other,
OpenMP's threads sleep between calls, and each call that uses them wakes them first. A decode step makes a hundred calls
that are over by then: they run on the calling thread alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final

import torch

WAKE_SECONDS: Final = 100e-6
"""From a call to its threads at work, as measured: 50-130 us on two cores (docs/performance.md)."""

BYTES_PER_SECOND: Final = 12e9
MULTIPLICATIONS_PER_SECOND: Final = 30e9
"""What one core reads from memory and multiplies, roughly; where it matters little, it decides either way."""

_threads_sleep = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


class _Usual(threading.local):
    """How many threads the calling thread's calls had before the outermost block; None outside of one."""

    threads: int | None = None


_usual = _Usual()


def threads_sleep() -> bool:
    """Whether OpenMP's threads sleep between calls."""
    return _threads_sleep


def usual_threads() -> int:
    """How many the calling thread's calls have where a block does not say otherwise."""
    return _usual.threads or torch.get_num_threads()


def carry_thread_count(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` for a new thread, where its calls have as many threads as the calling thread's usually have.

    By itself a thread's first call takes, for good, the number that any thread has set last: while another thread is in
    a block of small calls, one.
    """
    threads = usual_threads()

    def run() -> None:
        torch.get_num_threads()  # is the first call, which would undo what is set before it
        torch.set_num_threads(threads)
        work()

    return run


class ThreadsFor:
    """As many threads as a call is worth while the ``with`` block runs: torch's own number, or one.

    Blocks nest: a call inside one that runs on one thread has all of them where it is worth them.

    Args:
        size_bytes: what the call reads; for a block of many calls, what the largest of the others in it reads.
        multiplications: what it computes.
    """

    __slots__ = ("_before", "_is_outermost", "_wanted")

    def __init__(self, size_bytes: float, multiplications: float) -> None:
        self._before = torch.get_num_threads()
        self._is_outermost = _usual.threads is None
        usual = usual_threads()
        alone_seconds = size_bytes / BYTES_PER_SECOND + multiplications / MULTIPLICATIONS_PER_SECOND
        few = _threads_sleep and usual > 1 and alone_seconds * (1 - 1 / usual) < WAKE_SECONDS
        self._wanted = 1 if few else usual

    def __enter__(self) -> None:
        if self._is_outermost:
            _usual.threads = self._before
        if self._wanted != self._before:
            torch.set_num_threads(self._wanted)

    def __exit__(self, *error: object) -> None:
        if self._is_outermost:
            _usual.threads = None
        if self._wanted != self._before:
            torch.set_num_threads(self._before)
