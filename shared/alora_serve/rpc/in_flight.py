"""The calls that a drain waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from alora_serve.errors import UnavailableError


class InFlightCalls:
    """Counts running calls and, once draining, admits no more. Belongs to one event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call runs inside.

        Raises:
            UnavailableError: the server is draining; another one can take the call.
        """
        if self._draining:
            raise UnavailableError("this server is shutting down; call again to reach another one")
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    async def drain(self, timeout_seconds: float) -> int:
        """Admit no more calls and wait for the running ones; returns how many still run when the time is over."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self._count
