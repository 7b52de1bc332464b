"""What clients see when endpoints die, fill up, drain or come back while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from adapter_router.affinity import adapter_key, rendezvous_order
from adapter_router.servicer import RouterLimits
from alora_serve.errors import OverloadedError, RequestCancelledError, UnavailableError
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import Finished, GenerateRequest, Heartbeat, StreamEvent, TokenChunk
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import (
    FakePrefill,
    FakeWorker,
    Names,
    Router,
    Server,
    answer,
    deployment,
    healthy,
    router_on,
    start_prefill,
    start_worker,
    until,
)

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])
ASK = alora_pb2.GenerateRequest(prompt=HELLO, adapter="jailbreak")


async def events_of(call: Any) -> list[types_pb2.GenerationEvent]:
    return [response.event async for response in call]


def kinds(events: list[types_pb2.GenerationEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


def stopping_before(kind: type[StreamEvent], *, and_then: Any) -> Any:
    """The script of a worker that answers until the first event of this kind, and then does something else."""

    async def script(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            if isinstance(event, kind):
                await and_then()
                return
            yield event

    return script


async def forever() -> None:
    await asyncio.Event().wait()


def full(retry_after_seconds: float = 2.0) -> Any:
    async def raise_full() -> None:
        raise OverloadedError("the queue is full", retry_after_seconds=retry_after_seconds)

    return raise_full


async def gone() -> None:
    raise UnavailableError("this server is shutting down")


def ranked(router: Router, workers: list[FakeWorker], servers: list[Server]) -> list[tuple[FakeWorker, Server]]:
    """Workers in the order in which requests for the adapter prefer them."""
    pairs = {server.address: (worker, server) for worker, server in zip(workers, servers, strict=True)}
    return [pairs[address] for address in rendezvous_order(adapter_key("jailbreak"), pairs)]


@pytest.mark.parametrize("seen", [TokenChunk, Heartbeat])
async def test_a_worker_that_dies_before_the_first_token_is_replaced_unnoticed(seen: type[StreamEvent]) -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, first_server), (second, _) = ranked(router, workers, servers[1:])
        first.script = stopping_before(seen, and_then=forever)
        call = router.stub.Generate(ASK)
        responses = aiter(call)
        events = [(await anext(responses)).event]
        await first_server.kill()
        events += [response.event async for response in responses]
        # Started came from the first attempt and is told once, since the second says the same.
        assert kinds(events)[0] == "started"
        assert kinds(events)[-3:] == ["chunk", "chunk", "finished"]
        assert kinds(events).count("started") == 1
        assert {event.attempt for event in events if event.HasField("chunk")} == {1}
        assert [request.attempt for request in second.requests] == [1]
        assert first.requests[0].sampling.seed == second.requests[0].sampling.seed
        assert router.metric("alora_router_retries_total", role="adapter_decode") == 1
        assert router.metric("alora_time_to_first_token_seconds_count") == 1


async def test_after_the_first_token_a_death_is_unavailable_and_nothing_is_repeated() -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, first_server), (second, _) = ranked(router, workers, servers[1:])
        first.script = stopping_before(Finished, and_then=forever)
        responses = aiter(router.stub.Generate(ASK))
        seen = [(await anext(responses)).event for _ in range(4)]
        await first_server.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(responses)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [event.chunk.text for event in seen if event.HasField("chunk")] == ["Hello", " world"]
        assert router.metric("alora_time_to_first_token_seconds_count") == 1, "it came, whatever came then"
        assert not second.requests


async def test_a_stream_that_ends_without_finishing_counts_as_a_death() -> None:
    async def nothing() -> None:
        return

    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _) = ranked(router, workers, servers[1:])
        first.script = stopping_before(TokenChunk, and_then=nothing)
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert len(second.requests) == 1


async def test_a_worker_that_cancels_what_nobody_cancelled_counts_as_a_death() -> None:
    async def cut_off() -> None:
        raise RequestCancelledError("shutting down")

    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _) = ranked(router, workers, servers[1:])
        first.script = stopping_before(TokenChunk, and_then=cut_off)
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert len(second.requests) == 1


async def test_attempts_are_bounded() -> None:
    workers = [FakeWorker(stopping_before(TokenChunk, and_then=gone)) for _ in range(4)]
    async with deployment([FakePrefill()], workers, limits=RouterLimits(max_attempts=3)) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(router.stub.Generate(ASK))
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
        assert sorted(len(worker.requests) for worker in workers) == [0, 1, 1, 1]


async def test_a_full_worker_is_followed_by_one_other_whose_refusal_passes_on() -> None:
    workers = [FakeWorker() for _ in range(3)]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _), (third, _) = ranked(router, workers, servers[1:])
        first.script = stopping_before(TokenChunk, and_then=full())
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert len(second.requests) == 1
        second.script = stopping_before(TokenChunk, and_then=full(7.0))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(router.stub.Generate(ASK))
        error = error_from_rpc(caught.value)
        assert isinstance(error, OverloadedError)
        assert error.retry_after_seconds == 7.0
        assert not third.requests
        # Full is not gone: all of them still take requests.
        assert healthy(router.workers) == 3


async def test_the_only_workers_refusal_passes_on_at_once() -> None:
    worker = FakeWorker(stopping_before(TokenChunk, and_then=full(3.0)))
    async with deployment([FakePrefill()], [worker]) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(router.stub.Generate(ASK))
        assert error_from_rpc(caught.value).retry_after_seconds == 3.0
        assert len(worker.requests) == 1


async def test_a_base_prefill_that_dies_is_replaced() -> None:
    prefills = [FakePrefill(), FakePrefill()]
    async with deployment(prefills, [FakeWorker()]) as (router, servers):
        for prefill in prefills:
            prefill.before = forever
        call = asyncio.create_task(events_of(router.stub.Generate(ASK)))
        await until(lambda: any(prefill.requests for prefill in prefills))
        asked = next(index for index, prefill in enumerate(prefills) if prefill.requests)
        prefills[1 - asked].before = None
        await servers[asked].kill()
        assert kinds(await call)[-1] == "finished"
        assert all(prefill.requests for prefill in prefills)
        assert router.metric("alora_router_retries_total", role="base_prefill") == 1


async def test_a_single_worker_that_restarts_is_waited_for() -> None:
    worker = FakeWorker(stopping_before(TokenChunk, and_then=forever))
    async with deployment([FakePrefill()], [worker]) as (router, servers):
        call = asyncio.create_task(events_of(router.stub.Generate(ASK)))
        await until(lambda: len(worker.requests) == 1)
        await servers[1].kill()
        again = await start_worker(FakeWorker(), servers[1].address)
        events = await call
        assert kinds(events)[-1] == "finished"
        assert {event.attempt for event in events if event.HasField("chunk")} == {1}
        await again.kill()


async def test_after_everything_died_and_came_back_requests_are_served_again() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, servers):
        for server in servers:
            await server.kill()
        await router.settled(0, 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(router.stub.Generate(ASK))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        again = [
            await start_prefill(FakePrefill(), servers[0].address),
            await start_worker(FakeWorker(), servers[1].address),
        ]
        await router.settled(1, 1)
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        for server in again:
            await server.kill()


async def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    gate = asyncio.Event()
    workers = [FakeWorker(), FakeWorker()]

    async def gated(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            if isinstance(event, Finished):
                await gate.wait()
            yield event

    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _) = ranked(router, workers, servers[1:])
        first.script = gated
        running = asyncio.create_task(events_of(router.stub.Generate(ASK)))
        await until(lambda: len(first.requests) == 1)
        first.report(draining=True)
        await until(lambda: any(snapshot.draining for snapshot in router.workers.snapshots()))
        for _ in range(3):
            assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert len(first.requests) == 1
        assert len(second.requests) == 3
        gate.set()
        assert kinds(await running)[-1] == "finished"


async def test_a_worker_that_leaves_the_name_finishes_its_stream() -> None:
    gate = asyncio.Event()

    async def gated(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            if isinstance(event, Finished):
                await gate.wait()
            yield event

    worker = FakeWorker(gated)
    servers = [await start_prefill(FakePrefill()), await start_worker(worker)]
    names = Names({"workers:1": {servers[1].address}})
    async with router_on([servers[0].address], ["workers:1"], names=names) as router:
        await router.settled(1, 1)
        running = asyncio.create_task(events_of(router.stub.Generate(ASK)))
        await until(lambda: len(worker.requests) == 1)
        names.known["workers:1"] = set()
        await until(lambda: not router.workers.members())
        gate.set()
        assert kinds(await running)[-1] == "finished"
    for server in servers:
        await server.kill()


async def test_a_worker_that_joins_the_name_takes_requests() -> None:
    servers = [await start_prefill(FakePrefill()), await start_worker(FakeWorker())]
    names = Names({"workers:1": set()})
    async with router_on([servers[0].address], ["workers:1"], names=names) as router:
        names.known["workers:1"] = {servers[1].address}
        await router.settled(1, 1)
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
    for server in servers:
        await server.kill()
