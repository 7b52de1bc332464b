"""The calls that run: as many as there may be, and those that a drain waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from alora_serve.errors import OverloadedError, UnavailableError

_RETRY_AFTER_SECONDS: Final = 1.0


class InFlightCalls:
    """Counts running calls, admits no more than ``limit`` and, once draining, none. Belongs to one event loop."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call runs inside.

        Raises:
            UnavailableError: the server is draining; another one can take the call.
            OverloadedError: as many run as may.
        """
        if self._draining:
            raise UnavailableError("this server is shutting down; call again to reach another one")
        if self._limit is not None and self._count >= self._limit:
            raise OverloadedError(
                f"{self._count} requests run here, as many as may; retry later",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
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
