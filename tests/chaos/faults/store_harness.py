"""What a fault of the store does to clients, and how long it takes until the store is in use again.

Services here keep nothing in memory that is not in use, so that every request asks the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final

from deployment import Deployed
from faults.conversations import new_conversations
from faults.harness import Chaos, Load, Row
from questions import Question, Read

FORGETFUL: Final = {"prefix_cache_bytes": "1"}
PATIENCE_SECONDS: Final = 60.0
USED_AGAIN_SECONDS: Final = 10.0
"""How soon after a fault's end a store must be in use again."""
PEACE_SECONDS: Final = 1.0
"""How long clients go on in peace before a fault."""


Met = Callable[[Deployed], Awaitable[float]]
"""A figure that rises when services meet a fault."""


def counted(name: str, **labels: str) -> Met:
    """A metric, of all services that use the store."""

    async def count(running: Deployed) -> float:
        names = (*running.local.prefill_names, *running.local.worker_names)
        return sum([await running.metric(process, name, **labels) for process in names])

    return count


async def fetched_tokens(running: Deployed, name: str) -> float:
    """Tokens whose KV a worker had from the store."""
    return await running.metric(name, "alora_tokens_total", source="fetched")


async def seconds_until_used(running: Deployed) -> float:
    """Until every worker fetches again and no breaker refuses calls; infinite when that takes too long."""
    began, names = time.monotonic(), running.local.worker_names
    before = {name: await fetched_tokens(running, name) for name in names}
    while time.monotonic() - began < PATIENCE_SECONDS:
        fetching = [await fetched_tokens(running, name) > before[name] for name in names]
        # Workers may have nothing left to write by which an open breaker would find that its time is over.
        refusing = [await running.metric(name, "alora_store_breaker_retry_seconds") for name in names]
        refusing += [
            await running.metric(name, "alora_store_breaker_state", state="open")
            for name in running.local.prefill_names
        ]
        if all(fetching) and not any(refusing):
            return round(time.monotonic() - began, 2)
        await asyncio.sleep(0.1)
    return float("inf")


async def under(
    chaos: Chaos,
    running: Deployed,
    name: str,
    fault: AbstractAsyncContextManager[None],
    seconds: float,
    expected: Mapping[Question, Read],
    met: Met,
) -> Row:
    """What clients see of one fault that lasts ``seconds``, and when the store is in use again after it.

    ``met`` must rise meanwhile: else the fault did nothing.
    """
    load = Load(running.local.router_address, expected, chaos.rng(f"load {name}"))
    async with new_conversations(running, expected) as fresh, load.running() as tally:
        fresh.faults = tally.faults
        await asyncio.sleep(PEACE_SECONDS)
        before = await met(running)
        tally.strike()
        async with fault:
            await asyncio.sleep(seconds)
            times_met = await met(running) - before
        used_again = await seconds_until_used(running)
    tally.add(fresh)
    # A short run shares its machine with other tests.
    most_seconds = chaos.pick(PATIENCE_SECONDS, USED_AGAIN_SECONDS)
    tally.expect(used_again <= most_seconds, f"the store was not used again for {used_again:g} s")
    tally.expect(times_met > 0, "no service met the fault")
    return tally.row(name, store_used_again_seconds=used_again, met=times_met)
