"""Thousands of requests, many given up in the middle, and what every process holds before and after."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from alora_serve.client import SamplingParams, TokenChunk
from alora_serve.errors import AloraServeError
from deployment import Deployed, deployed
from faults.harness import QUICK, Chaos, Row, Scenario, Tally
from faults.load import BATCH, TURNS


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one process holds."""

    resident_bytes: float
    open_files: float
    threads: float
    tasks: float

    @classmethod
    async def of(cls, running: Deployed, name: str) -> Footprint:
        """As it is now."""
        pid = running.local.processes[name].pid
        return cls(
            await running.metric(name, "process_resident_memory_bytes"),
            await running.metric(name, "process_open_fds"),
            await asyncio.to_thread(lambda: len(list(Path(f"/proc/{pid}/task").iterdir()))),
            await running.metric(name, "alora_tasks"),
        )

    def growth_since(self, before: Footprint, name: str, *, is_warm: bool) -> list[str]:
        """What has grown by more than counting at another moment explains; memory only once pools are full."""
        grown = []
        if is_warm and self.resident_bytes > 1.1 * before.resident_bytes:
            grown.append(f"{name}: {before.resident_bytes / 1e6:.0f} to {self.resident_bytes / 1e6:.0f} MB")
        for what in ("open_files", "threads", "tasks"):
            was, now = getattr(before, what), getattr(self, what)
            if now > was + 5:
                grown.append(f"{name}: {was:.0f} to {now:.0f} {what}")
        return grown


async def many_requests(chaos: Chaos) -> list[Row]:
    """Ten thousand requests, every fifth given up in the middle: nothing is left of any."""
    total, rng = chaos.pick(300, 10_000), chaos.rng("leaving")
    store = f"lmdb://{chaos.place('many requests')}"
    # Little room for resident KV, so that it is full when memory is looked at first.
    async with deployed(chaos.model, store, max_batch_sequences=BATCH, prefix_cache_bytes="64MiB", **QUICK) as running:
        handle = (await running.client.prefill(TURNS)).handle
        adapters = ("guard", "answer", "plain", "")
        expected = {name: (await running.ask(handle, name)).token_ids for name in adapters}
        tally, left = Tally(), 0

        async def one(number: int) -> None:
            nonlocal left
            name = adapters[number % len(adapters)]
            leaves_after = rng.randrange(1, 8) if rng.random() < 0.2 else None
            given = {"handle": handle} if number % 2 else {"messages": TURNS}
            sampling = SamplingParams(max_tokens=len(expected[name]), ignore_eos=True)
            tokens: list[int] = []
            tally.requests += 1
            stream = running.client.generate(adapter=name, sampling=sampling, timeout_seconds=60, **given)
            try:
                async for event in stream:
                    if isinstance(event, TokenChunk):
                        tokens += event.token_ids
                        if leaves_after is not None and len(tokens) >= leaves_after:
                            left += 1
                            break
            except AloraServeError as error:
                tally.failures.append(f"{type(error).__name__}: {error}")
                return
            finally:
                await stream.close()
            tally.wrong += tuple(tokens) != expected[name][: len(tokens)]

        numbers = iter(range(total))

        async def some(count: int) -> None:
            async def go_on(last: int) -> None:
                for number in numbers:
                    await one(number)
                    if number >= last:
                        return

            last = tally.requests + count - 1
            await asyncio.gather(*(go_on(last - places) for places in range(16)))

        await some(total // 5)
        before = await footprints(running)
        await some(total - tally.requests)
        after = await footprints(running)
        for name, footprint in after.items():
            tally.failures += footprint.growth_since(before[name], name, is_warm=not chaos.is_short)
        details = {"left": left, **growth(before, after)}
        return [tally.row(f"{total:,} requests, every fifth given up", **details)]


async def footprints(running: Deployed) -> dict[str, Footprint]:
    """Of every process once nothing runs."""
    await running.wait_for_load(running=0)
    await asyncio.sleep(1)
    return {name: await Footprint.of(running, name) for name in running.local.processes}


def growth(before: Mapping[str, Footprint], after: Mapping[str, Footprint]) -> dict[str, float | str]:
    """Megabytes more than before."""
    return {
        f"{name}_grew_mb": round((after[name].resident_bytes - before[name].resident_bytes) / 1e6, 1) for name in before
    }


SCENARIOS: Final[dict[str, Scenario]] = {"many requests": many_requests}
