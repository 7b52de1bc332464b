"""Too many requests, clients that leave, deadlines that pass: places are bounded, and free as soon as nobody waits."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack

import pytest

from alora_serve.client import ChatMessage, TokenChunk
from alora_serve.errors import DeadlinePassedError, OverloadedError
from deployment import BATCH, GREEDY, PATIENCE_SECONDS, QUEUE, WORKER, Deployed

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

REQUESTS = 1000
LONG = 1900
"""Tokens that take seconds: much longer than anything here waits for."""
TURNS = [ChatMessage("user", "Is the sea deep?")]


async def finished_answers(running: Deployed) -> float:
    """Generations that the worker ran to their end."""
    return await running.metric(WORKER, "alora_request_phase_seconds_count", phase="decode")


async def steps(running: Deployed) -> float:
    """Forward passes of the worker."""
    return await running.metric(WORKER, "alora_engine_step_seconds_count")


async def cancelled_answers(running: Deployed) -> float:
    """Generations that the worker was told to give up."""
    method = "/alora_serve.v1.AdapterDecodeService/Decode"
    return await running.metric(WORKER, "alora_rpc_handled_total", method=method, code="CANCELLED")


async def assert_still_right(running: Deployed) -> None:
    handle = (await running.client.prefill(TURNS)).handle
    answer = await running.ask(handle, "guard")
    assert answer.token_ids == running.model.cold_tokens("guard", running.model.prompt(handle, "guard"))


async def test_of_a_thousand_requests_at_once_some_are_told_when_to_retry_and_the_rest_are_right(
    tiny: Deployed,
) -> None:
    handle = (await tiny.client.prefill(TURNS)).handle
    expected = {name: tiny.model.cold_tokens(name, tiny.model.prompt(handle, name)) for name in ("guard", "answer", "")}

    async def one(number: int) -> tuple[str, tuple[int, ...]]:
        adapter = ("guard", "answer", "")[number % 3]
        # Half with a handle, which meet in the worker's queue, half with messages, which pass base prefill's before.
        given = {"handle": handle} if number % 2 else {"messages": TURNS}
        result = await tiny.client.generate(adapter=adapter, sampling=GREEDY, **given).result()
        return adapter, result.token_ids

    outcomes = await asyncio.gather(*(one(number) for number in range(REQUESTS)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    others = [outcome for outcome in outcomes if isinstance(outcome, BaseException) and outcome not in refused]
    assert not others
    assert refused
    assert all(error.retry_after_seconds for error in refused)
    assert len(answered) >= BATCH + QUEUE, "every place was used"
    assert all(tokens == expected[adapter] for adapter, tokens in answered)
    await tiny.wait_for_load(running=0)
    await assert_still_right(tiny)


@pytest.mark.parametrize("leaving", ["cancels", "closes its channel", "is killed"])
async def test_a_client_that_leaves_mid_stream_frees_its_place_within_a_step(tiny: Deployed, leaving: str) -> None:
    finished, cancelled = await finished_answers(tiny), await cancelled_answers(tiny)
    if leaving == "is killed":
        await _stream_in_a_process_that_is_killed(tiny)
    else:
        await _stream_and_leave(tiny, by_cancelling=leaving == "cancels")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await cancelled_answers(tiny) == cancelled:
            pass
    # Read after the worker was told, so that a machine however busy can add nothing to the difference.
    told = await steps(tiny)
    await tiny.wait_for_load(running=0)
    assert await steps(tiny) - told <= 1
    assert await finished_answers(tiny) == finished, "the answer was not run to its end for nobody"
    assert await tiny.metric("router", "alora_router_in_flight") == 0
    await assert_still_right(tiny)


async def _stream_and_leave(running: Deployed, *, by_cancelling: bool) -> None:
    async with AsyncExitStack() as leaving:
        client = running.client if by_cancelling else await leaving.enter_async_context(running.another_client())
        stream = client.generate(TURNS, adapter="guard", max_tokens=LONG, ignore_eos=True)
        async for event in stream:
            if isinstance(event, TokenChunk):
                break
        await running.wait_for_load(running=1)
        if by_cancelling:
            await stream.close()


async def _stream_in_a_process_that_is_killed(running: Deployed) -> None:
    program = (
        "from alora_serve.client import Client\n"
        f"for event in Client({running.local.router_address!r}).generate('Hi', max_tokens={LONG}, ignore_eos=True):\n"
        "    print(event, flush=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    while b"TokenChunk" not in await process.stdout.readline():
        assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def test_a_client_that_leaves_the_queue_frees_its_place_there(tiny: Deployed) -> None:
    handle = (await tiny.client.prefill(TURNS)).handle
    async with AsyncExitStack() as batch:
        for _ in range(BATCH):
            running = tiny.client.generate(handle=handle, adapter="guard", max_tokens=LONG, ignore_eos=True)
            await batch.enter_async_context(running)
        await tiny.wait_for_load(running=BATCH)
        async with tiny.client.generate(handle=handle, max_tokens=1) as queued:
            await anext(queued)
            await tiny.wait_for_load(running=BATCH, queued=1)
        await tiny.wait_for_load(running=BATCH, queued=0)
    await tiny.wait_for_load(running=0)
    await assert_still_right(tiny)


@pytest.mark.parametrize("timeout_seconds", [0.0, 1e-6])
async def test_a_deadline_already_passed_runs_nothing(tiny: Deployed, timeout_seconds: float) -> None:
    before = await finished_answers(tiny)
    for call in (
        tiny.client.generate(TURNS, timeout_seconds=timeout_seconds).result(),
        tiny.client.prefill(TURNS, timeout_seconds=timeout_seconds),
    ):
        with pytest.raises(DeadlinePassedError):
            await call
    assert await finished_answers(tiny) == before
    await assert_still_right(tiny)


async def test_a_deadline_that_passes_mid_stream_ends_it_and_frees_its_place(tiny: Deployed) -> None:
    before = await finished_answers(tiny)
    stream = tiny.client.generate(TURNS, max_tokens=LONG, ignore_eos=True, timeout_seconds=0.5)
    with pytest.raises(DeadlinePassedError):
        await stream.result()
    await tiny.wait_for_load(running=0)
    assert await finished_answers(tiny) == before
    await assert_still_right(tiny)
