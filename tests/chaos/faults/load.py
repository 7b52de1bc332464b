"""More requests than can be served, tenants beside each other, and clients that leave: who waits, and what is left."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Final

from alora_serve.client import AsyncClient, ChatMessage, SamplingParams, TokenChunk
from alora_serve.errors import AloraServeError, OverloadedError
from deployment import ServedModel, deployed, save_tiny_model
from faults.conversations import new_prompt, new_text
from faults.harness import ONCE, QUICK, Chaos, Row, Scenario
from tenants import key_of, write_access

TURNS: Final = [ChatMessage("user", "The harbour lies still at night, and the lamps are lit. Who lit them?")]
LONG: Final = SamplingParams(max_tokens=100, ignore_eos=True)
SHORT: Final = SamplingParams(max_tokens=16, ignore_eos=True)
TIMES_CAPACITY: Final = 5.0
MOST_TIMES_ALONE: Final = 1.5
"""How much longer a tenant's 95th percentile may be beside another, whom a quota holds to one place, than alone."""
MOST_TIMES_ALONE_BEHIND: Final = 5.0
"""The same beside one without a quota, who takes whatever a tenant may: six places of a batch of eight. The worst of
six runs on two cores had 3.7 (docs/adr/0020-tenants.md)."""
TIMES_LOOSER: Final = 3.0
"""What a short run bears besides: it has few answers, and shares its machine with other tests."""
LEAST_SAMPLES: Final = 20
"""Answers that a 95th percentile needs."""
LONG_CONTEXT_TOKENS: Final = 16_384
LONG_SECONDS: Final = 300.0
"""Deadline of a prompt that fills it, on two cores."""

BATCH: Final = "8"
QUEUE: Final = "32"


@dataclass(slots=True)
class Outcomes:
    """What one tenant saw."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All of them."""
        return len(self.seconds) + self.refused + len(self.failures)

    @property
    def p95_seconds(self) -> float:
        """Of the whole answer; without answers, infinite."""
        return quantiles(self.seconds, n=20)[-1] if len(self.seconds) > 1 else float("inf")

    def blame(self, other: Outcomes) -> None:
        """What another tenant saw go wrong counts here, too: it is noisy, and is to be served rightly all the same."""
        self.wrong += other.wrong
        self.failures += [f"the other tenant: {failure}" for failure in other.failures]


@dataclass(slots=True)
class Tenant:
    """A tenant's client and the right answers to its one question by their length."""

    client: AsyncClient
    expected: dict[int, tuple[int, ...]] = field(default_factory=dict)

    async def ask(self, sampling: SamplingParams, found: Outcomes) -> None:
        """One question; whatever comes of it."""
        began, tokens = time.monotonic(), list[int]()
        try:
            async for event in self.client.generate(TURNS, adapter="guard", sampling=sampling, timeout_seconds=60):
                if isinstance(event, TokenChunk):
                    tokens += event.token_ids
        except OverloadedError as error:
            if error.retry_after_seconds:
                found.refused += 1
            else:
                found.failures.append(f"refused without a time to come back: {error}")
        except AloraServeError as error:
            found.failures.append(f"{type(error).__name__}: {error}")
        else:
            found.seconds.append(time.monotonic() - began)
            found.wrong += tuple(tokens) != self.expected.setdefault(sampling.max_tokens, tuple(tokens))


async def one_after_the_other(tenant: Tenant, sampling: SamplingParams, until: float) -> Outcomes:
    """Short questions with a breath between them."""
    found = Outcomes()
    while time.monotonic() < until:
        await tenant.ask(sampling, found)
        await asyncio.sleep(0.05)
    return found


async def at_once(tenant: Tenant, sampling: SamplingParams, clients: int, until: float) -> Outcomes:
    """So many clients that never pause."""
    found = Outcomes()

    async def go_on() -> None:
        while time.monotonic() < until:
            await tenant.ask(sampling, found)

    await asyncio.gather(*(go_on() for _ in range(clients)))
    return found


async def at_rate(
    tenant: Tenant, sampling: SamplingParams, per_second: float, until: float, rng: random.Random
) -> Outcomes:
    """Questions that come whether or not others were answered."""
    found, asking = Outcomes(), set[asyncio.Task[None]]()
    due = time.monotonic()
    while (due := due + rng.expovariate(per_second)) < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(tenant.ask(sampling, found))
        asking.add(task)
        task.add_done_callback(asking.discard)
    await asyncio.gather(*asking)
    return found


@asynccontextmanager
async def two_tenants(
    chaos: Chaos, name: str, model: ServedModel | None = None, **noisy_quota: int
) -> AsyncIterator[tuple[Tenant, Tenant]]:
    """A quiet tenant and a noisy one on one worker; both have been answered once."""
    place = chaos.place(name)
    access_file = write_access(place / "access.yaml", {"quiet": {}, "noisy": noisy_quota})
    settings = {"access_file": str(access_file), "max_batch_sequences": BATCH, "max_queue": QUEUE}
    store = f"lmdb://{place}/kv"
    async with deployed(model or chaos.model, store, api_key=key_of("quiet"), **settings, **QUICK) as running:
        address = running.local.router_address
        async with (
            AsyncClient(address, retry=ONCE, api_key=key_of("quiet")) as quiet,
            AsyncClient(address, retry=ONCE, api_key=key_of("noisy")) as noisy,
        ):
            pair = Tenant(quiet), Tenant(noisy)
            for tenant in pair:
                for sampling in (SHORT, LONG):
                    await tenant.ask(sampling, Outcomes())
                    if sampling.max_tokens not in tenant.expected:
                        raise RuntimeError("the deployment does not answer")
            yield pair


async def overload(chaos: Chaos) -> list[Row]:
    """Five times as many questions as can be answered: what is refused says when to come back, the rest is right."""
    async with two_tenants(chaos, "overload") as (_, noisy):
        seconds = chaos.pick(2.0, 10.0)
        alone = await at_once(noisy, LONG, int(BATCH), time.monotonic() + seconds)
        capacity = len(alone.seconds) / seconds
        until = time.monotonic() + chaos.pick(3.0, 60.0)
        found = await at_rate(noisy, LONG, TIMES_CAPACITY * capacity, until, chaos.rng("arrivals"))
        found.blame(alone)
        if not chaos.is_short and not found.refused:
            found.failures.append("nothing was refused: it was no overload")
        return [
            row(
                f"overload, {TIMES_CAPACITY:g} times capacity",
                found,
                answered=len(found.seconds),
                refused=found.refused,
                capacity_per_second=round(capacity, 1),
                p95_seconds=round(found.p95_seconds, 2),
            )
        ]


async def beside_a_noisy_tenant(chaos: Chaos) -> list[Row]:
    """A tenant's short questions beside five times as many long ones of another, whom a quota holds to one at once."""
    async with two_tenants(chaos, "noisy tenant", max_sequences=1) as (quiet, noisy):
        seconds = chaos.pick(3.0, 30.0)
        alone = await one_after_the_other(quiet, SHORT, time.monotonic() + seconds)
        capacity = await at_once(noisy, LONG, 1, time.monotonic() + seconds / 3)
        rate = TIMES_CAPACITY * len(capacity.seconds) / (seconds / 3)
        until = time.monotonic() + seconds
        found, others = await asyncio.gather(
            one_after_the_other(quiet, SHORT, until),
            at_rate(noisy, LONG, rate, until, chaos.rng("arrivals")),
        )
        found.blame(capacity)
        found.blame(others)
        times_alone = compared(chaos, found, alone, MOST_TIMES_ALONE)
        return [
            row(
                "beside a noisy tenant",
                found,
                p95_alone_seconds=round(alone.p95_seconds, 3),
                p95_seconds=round(found.p95_seconds, 3),
                times_alone=round(times_alone, 2),
                other_answered=len(others.seconds),
                other_refused=others.refused,
            )
        ]


async def behind_five_hundred(chaos: Chaos) -> list[Row]:
    """Short questions of one tenant while another, without a quota, sends 500 at once and prompts of 16k tokens."""
    prompt_tokens = chaos.pick(LONG_CONTEXT_TOKENS // 4, LONG_CONTEXT_TOKENS)
    model = save_tiny_model(chaos.place("long context"), context_tokens=prompt_tokens + LONG.max_tokens)
    async with two_tenants(chaos, "five hundred", model) as (quiet, noisy):
        alone = await one_after_the_other(quiet, SHORT, time.monotonic() + chaos.pick(1.0, 10.0))
        found, others, stop = Outcomes(), Outcomes(), asyncio.Event()
        prompts = asyncio.create_task(long_prompts(noisy, prompt_tokens, stop))
        burst = asyncio.create_task(burst_and_go_on(noisy, chaos.pick(60, 500), others, stop))
        enough, until = chaos.pick(5, 3 * LEAST_SAMPLES), time.monotonic() + 120
        while len(found.seconds) < enough and time.monotonic() < until:
            await quiet.ask(SHORT, found)
            await asyncio.sleep(0.05)
        stop.set()
        long, _ = await asyncio.gather(prompts, burst)
        found.blame(long)
        found.blame(others)
        if not long.seconds:
            found.failures.append("none of the other's long prompts was computed meanwhile")
        times_alone = compared(chaos, found, alone, MOST_TIMES_ALONE_BEHIND)
        return [
            row(
                "behind 500 requests of another tenant",
                found,
                answered=len(found.seconds),
                p95_alone_seconds=round(alone.p95_seconds, 3),
                p95_seconds=round(found.p95_seconds, 3),
                times_alone=round(times_alone, 2),
                longest_of_others=round(max(others.seconds, default=0.0), 2),
                other_answered=len(others.seconds),
                other_refused=others.refused,
                other_long_prompts=len(long.seconds),
            )
        ]


async def burst_and_go_on(tenant: Tenant, at_once: int, found: Outcomes, stop: asyncio.Event) -> None:
    """So many long answers asked for at once; then more than the tenant may hold, by clients who wait when refused."""

    async def go_on() -> None:
        while not stop.is_set():
            refused = found.refused
            await tenant.ask(LONG, found)
            await asyncio.sleep(1.0 if found.refused > refused else 0.0)

    await asyncio.gather(*(tenant.ask(LONG, found) for _ in range(at_once)))
    await asyncio.gather(*(go_on() for _ in range(int(BATCH) + int(QUEUE))))


async def long_prompts(tenant: Tenant, tokens: int, stop: asyncio.Event) -> Outcomes:
    """One prompt after the other that nobody has stored, as tokens and as text; who is told to come back does."""
    found = Outcomes()
    for number in itertools.count():
        if stop.is_set():
            break
        began, pause = time.monotonic(), 0.0
        try:
            if number % 2:
                await tenant.client.prefill(text=new_text(number, tokens), timeout_seconds=LONG_SECONDS)
            else:
                await tenant.client.prefill(token_ids=new_prompt(number, tokens), timeout_seconds=LONG_SECONDS)
        except OverloadedError as error:
            found.refused += 1
            pause = error.retry_after_seconds or 1.0
        except AloraServeError as error:
            found.failures.append(f"long prompt: {type(error).__name__}: {error}")
            pause = 1.0
        else:
            found.seconds.append(time.monotonic() - began)
        await asyncio.sleep(pause)
    return found


def compared(chaos: Chaos, found: Outcomes, alone: Outcomes, most_times: float) -> float:
    """How many times as long a tenant's 95th percentile was as alone; a failure where it is more than it may be."""
    times_alone = found.p95_seconds / alone.p95_seconds
    fewest = min(len(found.seconds), len(alone.seconds))
    if not chaos.is_short and fewest < LEAST_SAMPLES:
        found.failures.append(f"{fewest} answers are too few to tell a 95th percentile")
    if not times_alone <= most_times * chaos.pick(TIMES_LOOSER, 1.0):
        found.failures.append(f"its p95 was {times_alone:.2f} times that of running alone")
    return times_alone


def row(fault: str, found: Outcomes, **details: float | str) -> Row:
    """The figures of one tenant's requests; refusals that say when to come back are not failures."""
    if found.failures:
        details["first_failure"] = found.failures[0]
    return Row(fault, found.requests, len(found.failures), found.wrong, None, details)


SCENARIOS: Final[dict[str, Scenario]] = {
    "overload": overload,
    "noisy tenant": beside_a_noisy_tenant,
    "five hundred": behind_five_hundred,
}
