"""Processes that die, hang, drain, are cut off or replaced, while clients read."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from harness import Chaos, Load, Row, Scenario, Tally, questions

from alora_serve.cli.local.process import RestartPolicy
from alora_serve.errors import UnavailableError
from deployment import BLOCK_TOKENS, Deployed, deployed

KILL_EVERY_SECONDS = 2.0
QUICK: dict[str, Any] = {
    "block_tokens": str(BLOCK_TOKENS),
    "emit": lambda event: None,
    "policy": RestartPolicy(longest_seconds=0.2, forget_after_seconds=0.0),
}
"""Small blocks, and processes that are started again at once however often they die."""


async def _watched_kills(
    running: Deployed, names: Sequence[str], tally: Tally, chaos: Chaos, kills: int
) -> dict[str, float | str]:
    """SIGKILL a random one of ``names`` every two seconds, never the last that is ready."""
    rng, done, ready_seconds, last = chaos.rng("kills"), 0, 0.0, time.monotonic()
    while done < kills:
        await asyncio.sleep(0.1)
        ready = [name for name in names if name in running.local.processes]
        now = time.monotonic()
        ready_seconds += len(ready) * (now - last)
        last = now
        if len(ready) < 2 or (tally.faults and now - tally.faults[-1] < KILL_EVERY_SECONDS):
            continue
        tally.strike()
        await running.local.kill(rng.choice(ready))
        done += 1
    return {"kills": done, "ready_seconds": round(ready_seconds, 1)}


async def workers_killed(chaos: Chaos) -> list[Row]:
    """Three workers, one of them killed every two seconds."""
    store = f"lmdb://{chaos.place('workers killed')}"
    async with deployed(chaos.model, store, workers=3, **QUICK) as running:
        load = Load(running.local.router_address, await questions(running), chaos.rng("load"))
        async with load.running() as tally:
            details = await _watched_kills(running, running.local.worker_names, tally, chaos, int(chaos.pick(3, 25)))
        details["resumed_streams"] = await running.metric("router", "alora_router_resumed_streams_total")
        return [load.tally.row("workers killed", **details)]


async def prefills_killed(chaos: Chaos) -> list[Row]:
    """Two base prefills, one of them killed every two seconds, while new conversations come."""
    store = f"lmdb://{chaos.place('prefills killed')}"
    async with deployed(chaos.model, store, workers=1, prefills=2, **QUICK) as running:
        load = Load(running.local.router_address, await questions(running, tokens=20), chaos.rng("load"))
        fresh, stop = Tally(), asyncio.Event()

        async def new_conversations() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                fresh.requests += 1
                began = time.monotonic()
                try:
                    await running.client.prefill(token_ids=[5 + number % 200, *range(10, 90)], timeout_seconds=30)
                except UnavailableError as error:
                    fresh.failures.append(str(error))
                else:
                    fresh.answered.append((began, time.monotonic()))

        prefilling = asyncio.create_task(new_conversations())
        async with load.running() as tally:
            fresh.faults = tally.faults
            details = await _watched_kills(running, running.local.prefill_names, tally, chaos, int(chaos.pick(2, 20)))
        stop.set()
        await prefilling
        return [load.tally.row("base prefills killed", **details), fresh.row("base prefills killed: new conversations")]


async def worker_hangs(chaos: Chaos) -> list[Row]:
    """SIGSTOP of a worker, and SIGCONT when its streams have long gone on elsewhere."""
    store = f"lmdb://{chaos.place('worker hangs')}"
    async with deployed(chaos.model, store, workers=2, **QUICK) as running:
        load, rng = Load(running.local.router_address, await questions(running), chaos.rng("load")), chaos.rng("hang")
        async with load.running() as tally:
            for _ in range(int(chaos.pick(1, 5))):
                await asyncio.sleep(1)
                pid = running.local.processes[rng.choice(running.local.worker_names)].pid
                tally.strike()
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(6)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(2)
        resumed = await running.metric("router", "alora_router_resumed_streams_total")
        return [load.tally.row("worker hangs", resumed_streams=resumed)]


async def rolling_update(chaos: Chaos) -> list[Row]:
    """Every process replaced, one after the other; the router last, whose clients find the next one themselves."""
    store = f"lmdb://{chaos.place('rolling update')}"
    async with deployed(chaos.model, store, workers=2, prefills=2, drain_seconds=2, **QUICK) as running:
        load = Load(running.local.router_address, await questions(running), chaos.rng("load"))
        async with load.running() as tally:
            for name in (*running.local.prefill_names, *running.local.worker_names, "router"):
                await asyncio.sleep(1)
                tally.strike()
                await running.local.restart(name)
            await asyncio.sleep(2)
        return [load.tally.row("rolling update", replaced=5)]


SCENARIOS: Final[dict[str, Scenario]] = {
    "workers killed": workers_killed,
    "base prefills killed": prefills_killed,
    "worker hangs": worker_hangs,
    "rolling update": rolling_update,
}
