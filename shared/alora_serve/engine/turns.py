"""Threads for work of tenants' own making, of which each tenant has a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Final, TypeVar
from weakref import WeakValueDictionary

TURNS: Final = 2
"""A form within all bounds may still take a minute to compile, and a long prompt a second to tokenize. A second turn
keeps such work from holding up all other of its tenant's."""

THREADS: Final = 8
"""More tenants than a quarter of these have to wait for each other."""

_T = TypeVar("_T")


class Turns:
    """Runs work in threads; one event loop's.

    Who leaves before having had a turn costs none. Work that has begun cannot be cancelled and keeps its turn, so that
    asking and leaving, over and over, gets nobody more threads than waiting does.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="turns")
        self._of = WeakValueDictionary[bytes, asyncio.Semaphore]()

    async def run(self, tenant_salt: bytes, work: Callable[[], _T]) -> _T:
        """What work returns or raises, once it is the tenant's turn."""
        turns = self._of.setdefault(tenant_salt, asyncio.Semaphore(TURNS))
        await turns.acquire()
        try:
            running = asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, work)
        except RuntimeError:  # a thread that cannot be started, at the system's limit
            turns.release()
            raise

        def end(done: asyncio.Future[_T]) -> None:
            turns.release()
            done.exception()  # looked at, whether or not anybody still waits

        running.add_done_callback(end)
        return await asyncio.shield(running)
