"""``WatchStatus``: a status told on every change and at least once a second, while whoever it is of lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from time import monotonic

from alora_serve.types import AdapterInfo, EndpointStatus

POLL_SECONDS = 0.1
"""How soon a change is told. Cheaper than waking every watcher from the engine's thread at each step."""
REPEAT_SECONDS = 1.0
"""Longest silence, so that a watcher tells a quiet endpoint from a dead one."""


async def watch_status(
    status: Callable[[], EndpointStatus], is_alive: Callable[[], bool]
) -> AsyncIterator[EndpointStatus]:
    """Yield the status now, then on every change and at least every :data:`REPEAT_SECONDS`. Never ends by itself.

    Args:
        status: asked for what to tell.
        is_alive: nothing is told while this is false. The event loop that tells goes on when the engine's thread hangs,
            and a watcher knows by nothing but silence that a call to it would wait for ever.
    """
    told, told_at = None, 0.0
    while True:
        if is_alive():
            current = status()
            if current != told or monotonic() - told_at >= REPEAT_SECONDS:
                told, told_at = current, monotonic()
                yield told
        await asyncio.sleep(POLL_SECONDS)


def adapters_by_name(adapters: Iterable[AdapterInfo]) -> dict[str, AdapterInfo]:
    """Listed adapters by name. Of two with one name the first counts: the other says that it is hidden."""
    by_name: dict[str, AdapterInfo] = {}
    for adapter in adapters:
        by_name.setdefault(adapter.name, adapter)
    return by_name


def changed_adapters(
    before: tuple[AdapterInfo, ...] | None, now: tuple[AdapterInfo, ...]
) -> tuple[AdapterInfo, ...] | None:
    """From what :func:`with_changes` makes ``now`` of ``before``.

    None when all must be told: nothing was told ``before``, or one that was is gone.
    """
    if before is None:
        return None
    if now == before:
        return ()
    old, new = adapters_by_name(before), adapters_by_name(now)
    if old.keys() - new.keys():
        return None
    return tuple(adapter for name, adapter in new.items() if adapter != old.get(name))


def with_changes(before: tuple[AdapterInfo, ...], changed: tuple[AdapterInfo, ...]) -> tuple[AdapterInfo, ...]:
    """``before`` with ``changed`` in the place of those of the same names; ``before`` itself when nothing changed."""
    if not changed:
        return before
    return tuple((adapters_by_name(before) | adapters_by_name(changed)).values())
