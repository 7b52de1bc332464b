"""Threads of Python's for work in independent parts, each of several of torch's calls.

Where OpenMP's threads sleep between calls (``model/threads.py``), a part of a millisecond in ten calls would wake them
ten times. A lane is woken once, runs every call on its own thread, and takes part after part until none is left.
Python's lock is free while torch computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

    Raises:
        Exception: what a part raised, after all lanes have stopped; parts that were not begun are left out.
    """
    left = deque(parts)
    others: list[Future[None]] = [_pool().submit(_drain, left) for _ in range(min(count, len(left)) - 1)]
    try:
        _drain(left)
    finally:
        wait(others)
    for other in others:
        other.result()


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
