"""Processes die, hang and drain under running streams; clients read every token once, and the same as without."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import pytest_asyncio

from alora_serve.client import AsyncClient, ChatMessage, Regex, SamplingParams, TokenChunk
from deployment import BLOCK_TOKENS, PATIENCE_SECONDS, Deployed, ServedModel, another_router, deployed
from questions import Question, Read, read

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

WORKERS = ("worker-1", "worker-2")
LONG = 400
"""Tokens of an answer that takes seconds, so that a fault finds it in the middle."""
TURNS = [ChatMessage("user", "The river is wide and slow, and boats go down it. Is it wide?")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tiny_model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployed]:
    """Two decode workers on one store."""
    store = tmp_path_factory.mktemp("store")
    async with deployed(
        tiny_model, f"lmdb://{store}", workers=2, drain_seconds=1, block_tokens=str(BLOCK_TOKENS)
    ) as running:
        yield running


ASKED = {
    "greedy": ("guard", SamplingParams(max_tokens=LONG, ignore_eos=True, logprobs=True)),
    "sampled": (
        "answer",
        SamplingParams(max_tokens=LONG, ignore_eos=True, temperature=1.0, top_p=0.9, seed=11, logprobs=True),
    ),
    "bound": (
        "answer",
        SamplingParams(
            max_tokens=LONG, temperature=1.0, seed=4, logprobs=True, structured_output=Regex("([a-z]{1,5} ){300}")
        ),
    ),
    "base, penalised": (
        "",
        SamplingParams(max_tokens=LONG, ignore_eos=True, presence_penalty=0.4, stop=("never said",), seed=3),
    ),
}


def same(found: Read, expected: Read) -> None:
    """Token-equal; log-probabilities differ by the rounding of another split."""
    assert found.tokens == expected.tokens
    assert found.text == expected.text
    assert found.starts == 1
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


async def ask(pair: Deployed, adapter: str, sampling: SamplingParams) -> Question:
    return Question((await pair.client.prefill(TURNS)).handle, adapter, sampling)


async def holder(pair: Deployed) -> str:
    """The worker that runs the one stream there is."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for name in WORKERS:
                async with aclosing(pair.statuses(name)) as statuses:  # type: ignore[type-var]
                    if (await anext(statuses)).running:
                        return name


async def resumed(pair: Deployed) -> float:
    return await pair.metric("router", "alora_router_resumed_streams_total")


@pytest.mark.parametrize("name", ASKED)
async def test_a_stream_survives_the_death_of_its_worker(pair: Deployed, name: str) -> None:
    question = await ask(pair, *ASKED[name])
    expected = await read(pair.client, question)
    before = await resumed(pair)

    async def kill() -> None:
        await pair.local.kill(await holder(pair))

    same(await read(pair.client, question, then=kill), expected)
    assert await resumed(pair) == before + 1
    await pair.local.wait_ready()


async def test_a_stream_leaves_a_worker_that_hangs_and_never_hears_of_it_again(pair: Deployed) -> None:
    question = await ask(pair, "answer", SamplingParams(max_tokens=700, ignore_eos=True, temperature=1.0, seed=11))
    expected = await read(pair.client, question)
    before = await resumed(pair)
    waking: list[asyncio.Task[None]] = []

    async def hang() -> None:
        pid = pair.local.processes[await holder(pair)].pid
        os.kill(pid, signal.SIGSTOP)
        waking.append(asyncio.create_task(wake_once_resumed(pid)))

    async def wake_once_resumed(pid: int) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await resumed(pair) == before:  # noqa: ASYNC110  # asked over the network
                    await asyncio.sleep(0.1)
        finally:
            os.kill(pid, signal.SIGCONT)

    found = await read(pair.client, question, then=hang)
    assert waking[0].done(), "it woke up only when the answer was over"
    await waking[0]
    same(found, expected)
    assert await resumed(pair) == before + 1
    same(await read(pair.client, question), expected)


async def test_a_stream_longer_than_the_drain_goes_on_elsewhere(pair: Deployed) -> None:
    question = await ask(pair, "guard", SamplingParams(max_tokens=1500, ignore_eos=True))
    expected = await read(pair.client, question)
    restarts: list[asyncio.Task[None]] = []

    async def drain() -> None:
        restarts.append(asyncio.create_task(pair.local.restart(await holder(pair))))

    same(await read(pair.client, question, then=drain), expected)
    await restarts[0]
    await pair.local.wait_ready()


async def test_a_client_goes_on_when_its_router_died(pair: Deployed) -> None:
    question = await ask(pair, *ASKED["sampled"])
    expected = await read(pair.client, question)

    async def kill() -> None:
        await pair.local.kill("router")

    async with AsyncClient(pair.local.router_address) as client:
        same(await read(client, question, then=kill), expected)


async def test_a_client_goes_on_elsewhere_when_its_router_hangs(pair: Deployed) -> None:
    question = await ask(pair, *ASKED["sampled"])
    expected = await read(pair.client, question)
    processes, stopped = pair.local.processes, list[int]()

    async def stop() -> None:
        stopped.append(processes["router"].pid)
        os.kill(stopped[0], signal.SIGSTOP)

    async with another_router([processes["prefill"].address], [processes[name].address for name in WORKERS]) as second:
        both = f"ipv4:{pair.local.router_address},{second.address}"
        try:
            async with AsyncClient(both) as client:
                same(await read(client, question, then=stop), expected)
            assert stopped
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


async def test_a_fan_out_survives_the_death_of_a_worker_and_then_of_the_router(pair: Deployed) -> None:
    handle = (await pair.client.prefill(TURNS)).handle
    sampling = SamplingParams(max_tokens=LONG, ignore_eos=True, temperature=1.0, seed=5)
    adapters = ["guard", "answer", "plain", None, "guard"]
    expected = await pair.client.fanout(None, adapters, handle=handle, sampling=sampling).results()

    async def faults() -> None:
        await asyncio.sleep(0.3)
        await pair.local.kill(await holder(pair))
        await asyncio.sleep(0.5)
        await pair.local.kill("router")

    async with AsyncClient(pair.local.router_address) as client:
        disturbing = asyncio.create_task(faults())
        found = await client.fanout(None, adapters, handle=handle, sampling=sampling).results()
        await disturbing
    for result, wanted in zip(found, expected, strict=True):
        assert not isinstance(result, Exception), result
        assert not isinstance(wanted, Exception), wanted
        assert (result.token_ids, result.text, result.seed) == (wanted.token_ids, wanted.text, wanted.seed)
    assert found[0].token_ids != found[4].token_ids, "each target draws its own random numbers"  # type: ignore[union-attr]
    await pair.local.wait_ready()


async def test_samples_survive_the_death_of_a_worker(pair: Deployed) -> None:
    handle = (await pair.client.prefill(TURNS)).handle
    sampling = SamplingParams(max_tokens=LONG, ignore_eos=True, temperature=1.0, seed=5)
    expected = await pair.client.sample(count=3, adapter="guard", handle=handle, sampling=sampling).results()
    killing: asyncio.Task[None] | None = None
    stream = pair.client.sample(count=3, adapter="guard", handle=handle, sampling=sampling)
    async for _, event in stream:
        if isinstance(event, TokenChunk) and killing is None:
            killing = asyncio.create_task(pair.local.kill(await holder(pair)))
    found = await stream.results()
    assert killing is not None
    await killing
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    assert len({result.token_ids for result in found}) == 3
    await pair.local.wait_ready()
