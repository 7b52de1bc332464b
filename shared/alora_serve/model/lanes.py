"""Threads of Python's for work in independent parts, each of several of torch's calls.

Where OpenMP's threads sleep between calls (``model/threads.py``), a part of a millisecond in ten calls would wake them
ten times. A lane is woken once, runs every call on its own thread, and takes part after part until none is left.
Python's lock is free while torch computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Final

import torch

from alora_serve.model.threads import ThreadsFor, threads_sleep, usual_threads

MOST_LANES: Final = 4
"""More would wait for Python's lock in turn; OpenMP spreads better then. Measured with two."""


def lanes() -> int:
    """How many there are for the calling thread's work; 0: leave it to OpenMP."""
    usual = usual_threads()
    return usual if usual <= MOST_LANES and (usual == 1 or threads_sleep()) else 0


def run_in_lanes(parts: Iterable[Callable[[], None]], count: int) -> None:
    """Run all parts, in any order, in ``count`` lanes, of which the calling thread is one.

    Where the system has no thread for a lane, the others do its share.

    Raises:
        Exception: what a part raised, after all lanes have stopped; parts that were not begun are left out.
    """
    left = deque(parts)
    others = [Future[None]() for _ in range(min(count, len(left)) - 1)]
    with suppress(RuntimeError):  # of a thread that cannot be started
        for other in others:
            _pool().submit(_run_lane, other, left)
    try:
        _drain(left)
    finally:
        # A pool keeps what it had no thread for, and a lane that is there may have taken it, or take it much later.
        others = [other for other in others if not other.cancel()]
        wait(others)
    for other in others:
        other.result()


def _run_lane(lane: Future[None], left: deque[Callable[[], None]]) -> None:
    if not lane.set_running_or_notify_cancel():
        return
    try:
        _drain(left)
    except BaseException as error:  # noqa: BLE001  # told once all lanes have stopped
        lane.set_exception(error)
    else:
        lane.set_result(None)


def _drain(left: deque[Callable[[], None]]) -> None:
    # Here, and not once a thread: what a thread sets for itself, those that begin later take for theirs.
    with torch.inference_mode(), ThreadsFor(0, 0):
        while True:
            try:
                part = left.popleft()
            except IndexError:  # none is left
                return
            try:
                part()
            except BaseException:
                left.clear()
                raise


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_LANES - 1, "alora-lane")
