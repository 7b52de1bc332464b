"""``WatchStatus``: a status told on every change and at least once a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from time import monotonic

from alora_serve.types import EndpointStatus

POLL_SECONDS = 0.1
"""How soon a change is told. Cheaper than waking every watcher from the engine's thread at each step."""
REPEAT_SECONDS = 1.0
"""Longest silence, so that a watcher tells a quiet endpoint from a dead one."""


async def watch_status(status: Callable[[], EndpointStatus]) -> AsyncIterator[EndpointStatus]:
    """Yield the status now, then on every change and at least every :data:`REPEAT_SECONDS`. Never ends by itself."""
    told = status()
    told_at = monotonic()
    yield told
    while True:
        await asyncio.sleep(POLL_SECONDS)
        current = status()
        if current != told or monotonic() - told_at >= REPEAT_SECONDS:
            told, told_at = current, monotonic()
            yield told
