"""Processes that die, hang, drain, are cut off or replaced, while clients read."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

from deployment import WORKER, Deployed, another_router, deployed, metric_at
from faults.conversations import new_conversations
from faults.harness import QUICK, Chaos, Load, Row, Scenario, Tally, questions
from faults.store_harness import FORGETFUL, fetched_tokens
from faulty_network import CALM, FaultyNetwork, host_and_port

KILL_EVERY_SECONDS = 2.0
HANG_SECONDS: Final = 4.0
"""Longer than a worker's silence is borne, shorter than what is left of an answer."""
MOST_HANGS: Final = 8
LEAST_RESUMED: Final = 20
"""Streams that go on elsewhere, of as many workers killed."""
LEAST_CAUGHT: Final = 10
"""Prefills under way when theirs was killed, of as many."""
LONG_PROMPT_TOKENS: Final = 1900
"""Of a prefill that a kill finds in the middle."""


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
            details = await _watched_kills(running, running.local.worker_names, tally, chaos, chaos.pick(3, 25))
        resumed = await running.metric("router", "alora_router_resumed_streams_total")
        details["resumed_streams"] = resumed
        load.tally.expect(resumed >= chaos.pick(1, LEAST_RESUMED), f"only {resumed:.0f} streams were resumed")
        return [load.tally.row("workers killed", **details)]


async def prefills_killed(chaos: Chaos) -> list[Row]:
    """Two base prefills, one of them killed every two seconds, while conversations come whole and are prefilled anew.

    Services keep nothing in memory: the worker, and the base prefill that is asked next, read what killed ones wrote.
    """
    store = f"lmdb://{chaos.place('prefills killed')}"
    async with deployed(chaos.model, store, workers=1, prefills=2, **FORGETFUL, **QUICK) as running:
        expected = await questions(running, tokens=20, by_handle=False)
        load = Load(running.local.router_address, expected, chaos.rng("load"))
        fetched = await fetched_tokens(running, WORKER)
        beginning = new_conversations(running, prompt_tokens=LONG_PROMPT_TOKENS, clients=4)
        async with beginning as fresh, load.running() as tally:
            fresh.faults = tally.faults
            details = await _watched_kills(running, running.local.prefill_names, tally, chaos, chaos.pick(3, 20))
        retries = await running.metric("router", "alora_router_retries_total", role="base_prefill")
        tally.expect(retries >= chaos.pick(1, LEAST_CAUGHT), f"kills caught only {retries:.0f} prefills under way")
        fetched = await fetched_tokens(running, WORKER) - fetched
        tally.expect(fetched > 0, "the worker read nothing of what base prefills wrote")
        details |= {"retried_prefills": retries, "fetched_tokens": fetched}
        return [tally.row("base prefills killed", **details), fresh.row("base prefills killed: new conversations")]


async def worker_hangs(chaos: Chaos) -> list[Row]:
    """SIGSTOP of a worker, and SIGCONT while the streams it had go on elsewhere: it sends on what it had of them."""
    store = f"lmdb://{chaos.place('worker hangs')}"
    async with deployed(chaos.model, store, workers=2, **QUICK) as running:
        expected = await questions(running, tokens=chaos.pick(500, 1000), conversations=1)
        load, rng = Load(running.local.router_address, expected, chaos.rng("load")), chaos.rng("hang")
        hangs: list[tuple[float, float]] = []

        def awake() -> int:
            """Streams that went on elsewhere and were still read when their worker woke up."""
            return sum(began < stop and ended > wake for began, ended in load.tally.interrupted for stop, wake in hangs)

        async with load.running() as tally:
            # Whether a hang leaves one to be read is chance: where none did, there is another.
            while len(hangs) < chaos.pick(1, 5) or (not awake() and len(hangs) < MOST_HANGS):
                await asyncio.sleep(1)
                pid = running.local.processes[rng.choice(running.local.worker_names)].pid
                tally.strike()
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(HANG_SECONDS)
                hangs.append((tally.faults[-1], time.monotonic()))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(HANG_SECONDS)
        resumed = await running.metric("router", "alora_router_resumed_streams_total")
        load.tally.expect(resumed > 0, "no stream was resumed")
        load.tally.expect(awake() > 0, "no stream that went on elsewhere was still read when its worker woke up")
        return [load.tally.row("worker hangs", resumed_streams=resumed, read_when_it_woke=awake())]


async def last_prefill_gone(chaos: Chaos) -> list[Row]:
    """SIGSTOP of the only base prefill: decode workers prefill as long as it hangs."""
    store = f"lmdb://{chaos.place('last prefill gone')}"
    async with deployed(chaos.model, store, workers=2, workers_prefill="true", **QUICK) as running:
        load = Load(running.local.router_address, await questions(running, tokens=20), chaos.rng("load"))
        async with new_conversations(running) as fresh, load.running() as tally:
            fresh.faults = tally.faults
            pid = running.local.processes["prefill"].pid
            tally.strike()
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(chaos.pick(6.0, 20.0))
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(3)
        return [load.tally.row("only base prefill hangs"), fresh.row("only base prefill hangs: new conversations")]


async def partition(chaos: Chaos) -> list[Row]:
    """The network between the router and one of two workers passes nothing on, and closes nothing."""
    store = f"lmdb://{chaos.place('partition')}"
    async with deployed(chaos.model, store, workers=2, **QUICK) as running:
        at = running.local.processes
        with ExitStack() as stack:
            near, far = (
                stack.enter_context(FaultyNetwork(*host_and_port(at[name].address)))
                for name in running.local.worker_names
            )
            workers = [near.address, far.address]
            async with another_router([at["prefill"].address], workers, emit=lambda event: None) as router:
                load = Load(router.address, await questions(running), chaos.rng("load"))
                async with load.running() as tally:
                    for _ in range(chaos.pick(1, 5)):
                        await asyncio.sleep(1)
                        tally.strike()
                        far.worsen(is_silent=True)
                        await asyncio.sleep(6)
                        far.weather = CALM
                        await asyncio.sleep(2)
                resumed = await metric_at(router.metrics_address, "alora_router_resumed_streams_total")
        load.tally.expect(resumed > 0, "no stream was resumed")
        return [load.tally.row("network partition", resumed_streams=resumed)]


SCENARIOS: Final[dict[str, Scenario]] = {
    "workers killed": workers_killed,
    "base prefills killed": prefills_killed,
    "worker hangs": worker_hangs,
    "last prefill gone": last_prefill_gone,
    "network partition": partition,
}
