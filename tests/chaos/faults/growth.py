"""Thousands of requests, many given up in the middle, and what every process holds before and after."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Final

import pytest

from alora_serve.client import SamplingParams, TokenChunk
from alora_serve.errors import AloraServeError
from deployment import Deployed, deployed
from faults.harness import QUICK, Chaos, Row, Scenario, Tally
from faults.load import BATCH, TURNS

LOOKS: Final = 5
"""How often footprints are taken, at equal distances; the first is when all has run a fifth of the requests."""

MOST_BYTES_A_REQUEST: Final = 1000.0
"""By which a process may grow. Two looks at one that does not grow differ by up to 5 MB, for what waits to be collected
and what the allocator keeps: over 6,000 requests, three quarters of a kilobyte each."""

KERNELS_KEPT: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "32"}
"""How many shapes of products oneDNN and torch keep code for. By default a thousand each: a worker meets new ones for
thousands of requests and grows by up to 150 MB meanwhile, in which a leak would be lost."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one process holds.

    Attributes:
        requests: made before.
    """

    requests: int
    resident_bytes: float
    open_files: float
    threads: float
    tasks: float

    @classmethod
    async def of(cls, running: Deployed, name: str, requests: int) -> Footprint:
        """As it is now."""
        pid = running.local.processes[name].pid
        return cls(
            requests,
            await running.metric(name, "process_resident_memory_bytes"),
            await running.metric(name, "process_open_fds"),
            await asyncio.to_thread(lambda: len(list(Path(f"/proc/{pid}/task").iterdir()))),
            await running.metric(name, "alora_tasks"),
        )


def bytes_a_request(looks: Sequence[Footprint]) -> float:
    """By which a process has grown since the second of these looks; the first is before everything is in use."""
    return linear_regression([look.requests for look in looks[1:]], [look.resident_bytes for look in looks[1:]]).slope


def growth(name: str, looks: Sequence[Footprint], *, is_warm: bool) -> list[str]:
    """What a process holds more of than counting at another moment explains; memory only once all is in use."""
    grown = []
    slope = bytes_a_request(looks)
    if is_warm and slope > MOST_BYTES_A_REQUEST:
        sizes = " to ".join(f"{look.resident_bytes / 1e6:.0f}" for look in looks)
        grown.append(f"{name}: {slope:.0f} bytes a request, from {sizes} MB")
    for what in ("open_files", "threads", "tasks"):
        was, now = getattr(looks[0], what), getattr(looks[-1], what)
        if now > was + 5:
            grown.append(f"{name}: {was:.0f} to {now:.0f} {what}")
    return grown


async def many_requests(chaos: Chaos) -> list[Row]:
    """Ten thousand requests, every fifth given up in the middle: nothing is left of any."""
    store = f"lmdb://{chaos.place('many requests')}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in KERNELS_KEPT.items():
            environment.setenv(name, value)
        # Little room for resident KV, so that it is full when memory is looked at first.
        async with deployed(
            chaos.model, store, max_batch_sequences=BATCH, prefix_cache_bytes="64MiB", **QUICK
        ) as running:
            return [await watched(chaos, running)]


async def watched(chaos: Chaos, running: Deployed) -> Row:
    """The requests, and what every process holds between them."""
    total, rng = chaos.pick(300, 10_000), chaos.rng("leaving")
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
        tokens, wanted = list[int](), expected[name]
        tally.requests += 1
        stream = running.client.generate(adapter=name, sampling=sampling, timeout_seconds=60, **given)
        try:
            async for event in stream:
                if isinstance(event, TokenChunk):
                    tokens += event.token_ids
                    if leaves_after is not None and len(tokens) >= leaves_after:
                        left += 1
                        wanted = wanted[: len(tokens)]
                        break
        except AloraServeError as error:
            tally.failures.append(f"{type(error).__name__}: {error}")
            return
        finally:
            await stream.close()
        tally.wrong += tuple(tokens) != wanted

    numbers = iter(range(total))

    async def some(count: int) -> None:
        async def go_on(last: int) -> None:
            for number in numbers:
                await one(number)
                if number >= last:
                    return

        last = tally.requests + count - 1
        await asyncio.gather(*(go_on(last - places) for places in range(16)))

    looks: dict[str, list[Footprint]] = {name: [] for name in running.local.processes}
    for _ in range(LOOKS):
        await some(total // LOOKS)
        await running.wait_for_load(running=0)
        await asyncio.sleep(1)
        for name, seen in looks.items():
            seen.append(await Footprint.of(running, name, tally.requests))
    details: dict[str, float | str] = {"left": left}
    for name, seen in looks.items():
        tally.failures += growth(name, seen, is_warm=not chaos.is_short)
        details[f"{name}_mb"] = " ".join(f"{look.resident_bytes / 1e6:.1f}" for look in seen)
        details[f"{name}_bytes_a_request"] = round(bytes_a_request(seen))
    return tally.row(f"{total:,} requests, every fifth given up", **details)


SCENARIOS: Final[dict[str, Scenario]] = {"many requests": many_requests}
