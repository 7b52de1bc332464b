"""What clients see when endpoints die, fill up, drain or come back while requests run."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from adapter_router.admission import RouterLimits
from adapter_router.affinity import adapter_key, rendezvous_order
from alora_serve.errors import (
    AdapterRefusedError,
    IntrinsicOutputError,
    ModelMismatchError,
    OverloadedError,
    RequestCancelledError,
    StepFailedError,
    UnavailableError,
)
from alora_serve.rpc.convert import decode_from_proto, handle_to_proto, pack_token_ids
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import (
    AdapterDigest,
    EndpointStatus,
    Finished,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    Resume,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    Usage,
)
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import (
    ADAPTERS,
    FAST,
    FakePrefill,
    FakeService,
    FakeWorker,
    Names,
    Router,
    Server,
    answer,
    deployment,
    handle,
    healthy,
    model,
    router_on,
    start_prefill,
    start_worker,
    until,
)
from faulty_network import CALM, FaultyNetwork, host_and_port

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


def after_one_token(and_then: Any) -> Any:
    """The script of a worker that gives one token, and then does something else."""

    async def script(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
            if isinstance(event, TokenChunk):
                await and_then()
                return

    return script


async def beat(worker: FakeService) -> None:
    """Report again and again, as real workers do: one that a call found gone is back then."""
    while True:
        await asyncio.sleep(0.02)
        worker.repeat()


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
        assert (second.requests[0].taken_over, second.requests[0].HasField("resume")) == (True, False)
        assert first.requests[0].sampling.seed == second.requests[0].sampling.seed
        assert router.metric("alora_router_retries_total", role="adapter_decode") == 1
        assert router.metric("alora_time_to_first_token_seconds_count") == 1


async def test_a_worker_that_dies_in_mid_stream_is_replaced_without_a_gap_or_a_repeat() -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, first_server), (second, _) = ranked(router, workers, servers[1:])
        first.script = after_one_token(forever)
        responses = aiter(router.stub.Generate(ASK))
        events = [(await anext(responses)).event for _ in range(3)]
        await first_server.kill()
        events += [response.event async for response in responses]
        assert kinds(events) == ["started", "heartbeat", "chunk", "heartbeat", "chunk", "finished"]
        chunks = [event for event in events if event.HasField("chunk")]
        assert [(e.chunk.text, e.chunk.first_index, e.attempt) for e in chunks] == [("Hello", 0, 0), (" world", 1, 1)]
        again = decode_from_proto(second.requests[0])
        assert again.resume == Resume((10,), None, AdapterDigest(b"jailbreak".hex()), model().model_digest)
        assert again.is_taken_over
        assert not first.requests[0].taken_over
        assert first.requests[0].sampling.seed == second.requests[0].resume.seed
        assert router.metric("alora_router_resumed_streams_total", role="adapter_decode") == 1
        assert router.metric("alora_time_to_first_token_seconds_count") == 1


async def test_a_worker_that_hangs_is_left_for_another_and_what_it_says_later_is_dropped() -> None:
    spoke, late, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def speaks_to_nobody(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in after_one_token(spoke.wait)(request, attempt):
            yield event
        yield TokenChunk((99,), " wrong")
        yield Finished(FinishReason.STOP, Usage(4, generated_tokens=2), Timings(), text="!!")
        late.set()

    async def gated(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            while isinstance(event, TokenChunk) and not gate.is_set():
                await asyncio.sleep(0.05)
                yield Heartbeat()
            yield event

    workers = [FakeWorker(), FakeWorker()]
    servers = [await start_prefill(FakePrefill()), *[await start_worker(worker) for worker in workers]]
    with ExitStack() as stack:
        # Between the router and each worker: what is said while it is silent arrives once it no longer is.
        networks = [stack.enter_context(FaultyNetwork(*host_and_port(server.address))) for server in servers[1:]]
        behind = dict(zip((network.address for network in networks), zip(workers, networks, strict=True), strict=True))
        async with router_on([servers[0].address], list(behind), limits=RouterLimits(silence_seconds=0.3)) as router:
            await router.settled(1, 2)
            (first, network), (second, _) = (
                behind[address] for address in rendezvous_order(adapter_key("jailbreak"), behind)
            )
            first.script, second.script = speaks_to_nobody, gated
            responses = aiter(router.stub.Generate(ASK))
            events = [(await anext(responses)).event for _ in range(3)]
            network.worsen(is_silent=True)
            spoke.set()
            await until(lambda: late.is_set() and len(second.requests) == 1)
            network.weather = CALM
            # On the same connection, so it comes after all that was said on it.
            first.report(draining=True)
            await until(lambda: any(snapshot.draining for snapshot in router.workers.snapshots()))
            gate.set()
            events += [response.event async for response in responses]
    for server in servers:
        await server.kill()
    assert [event.chunk.text for event in events if event.HasField("chunk")] == ["Hello", " world"]
    assert {event.attempt for event in events if event.HasField("chunk") and event.chunk.first_index} == {1}
    assert [event.finished.text for event in events if event.HasField("finished")] == ["!"]
    assert len(second.requests) == 1


async def test_a_slow_worker_that_gives_signs_of_life_keeps_its_stream() -> None:
    async def slow(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            if isinstance(event, Finished):
                for _ in range(8):
                    await asyncio.sleep(0.1)
                    yield Heartbeat()
            yield event

    workers = [FakeWorker(slow), FakeWorker(slow)]
    async with deployment([FakePrefill()], workers, limits=RouterLimits(silence_seconds=0.4)) as (router, _):
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert sum(len(worker.requests) for worker in workers) == 1


async def test_a_worker_whose_steps_are_long_may_be_silent_for_some_of_them() -> None:
    async def long_steps(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            await asyncio.sleep(0.6)
            yield event

    status = EndpointStatus(model(), adapters=ADAPTERS, longest_step_seconds=0.6)
    workers = [FakeWorker(long_steps, status), FakeWorker(long_steps, status)]
    async with deployment([FakePrefill()], workers, limits=RouterLimits(silence_seconds=0.3)) as (router, _):
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert sum(len(worker.requests) for worker in workers) == 1


async def test_a_worker_that_hangs_once_it_has_said_all_holds_up_nobody() -> None:
    async def hangs_at_the_end(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
        await forever()

    worker = FakeWorker(hangs_at_the_end)
    async with deployment([FakePrefill()], [worker], limits=RouterLimits(silence_seconds=0.3)) as (router, _):
        async with asyncio.timeout(10.0):
            assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert len(worker.requests) == 1


async def test_attempts_that_deliver_something_do_not_count() -> None:
    async def one_token_each(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        delivered = len(request.resume.generated_tokens) if request.resume else 0
        yield Started(AdapterDigest("d"), None, request.sampling.seed or 0, 4)
        if delivered < 5:
            yield TokenChunk((delivered,), str(delivered))
            raise UnavailableError("gone")
        yield Finished(FinishReason.LENGTH, Usage(4), Timings())

    workers = [FakeWorker(one_token_each) for _ in range(2)]
    async with deployment([FakePrefill()], workers, limits=RouterLimits(max_attempts=2)) as (router, _):
        heartbeats = [asyncio.create_task(beat(worker)) for worker in workers]
        events = await events_of(router.stub.Generate(ASK))
        for task in heartbeats:
            task.cancel()
        assert "".join(event.chunk.text for event in events) == "01234"
        assert kinds(events).count("started") == 1


async def test_a_stream_that_nobody_can_go_on_with_is_unavailable_and_says_what_was_delivered() -> None:
    worker = FakeWorker(after_one_token(gone))
    async with deployment([FakePrefill()], [worker], limits=RouterLimits(resume_wait_seconds=0.2)) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(router.stub.Generate(ASK))
        error = error_from_rpc(caught.value)
        assert isinstance(error, UnavailableError)
        assert error.metadata["delivered_tokens"] == "1"


async def step_fails() -> None:
    raise StepFailedError("engine step failed: RuntimeError('broken')")


async def test_a_stream_goes_on_elsewhere_when_a_step_broke_for_whoever_was_to_blame() -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _) = ranked(router, workers, servers[1:])
        first.script = after_one_token(step_fails)
        events = await events_of(router.stub.Generate(ASK))
        assert [event.chunk.text for event in events if event.HasField("chunk")] == ["Hello", " world"]
        assert second.requests[0].taken_over
        assert healthy(router.workers) == 2


async def test_a_request_that_breaks_every_step_ends_after_the_attempts_and_is_no_reason_to_ask_again() -> None:
    workers = [FakeWorker(stopping_before(TokenChunk, and_then=step_fails)) for _ in range(2)]
    async with deployment([FakePrefill()], workers, limits=RouterLimits(max_attempts=3)) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(router.stub.Generate(ASK))
        error = error_from_rpc(caught.value)
        assert isinstance(error, StepFailedError)
        assert error.status == "INTERNAL"
        assert sum(len(worker.requests) for worker in workers) == 3


async def test_while_a_router_looks_for_a_worker_it_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_router.stream.HEARTBEAT_SECONDS", 0.05)
    worker = FakeWorker(after_one_token(gone))
    async with deployment([FakePrefill()], [worker], limits=RouterLimits(resume_wait_seconds=20.0)) as (router, _):
        responses = aiter(router.stub.Generate(ASK))
        events = [(await anext(responses)).event for _ in range(5)]
        assert kinds(events) == ["started", "heartbeat", "chunk", "heartbeat", "heartbeat"]
        assert [event.attempt for event in events[-2:]] == [1, 1]
        worker.script = answer
        worker.repeat()
        events += [response.event async for response in responses]
        assert "".join(event.chunk.text for event in events) == "Hello world"
        assert router.workers.snapshots()[0].in_flight == 0


async def test_a_stream_that_a_lost_worker_had_taken_in_waits_for_another_as_one_with_tokens_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapter_router.stream.HEARTBEAT_SECONDS", 0.05)
    worker = FakeWorker(stopping_before(TokenChunk, and_then=gone))
    options = dataclasses.replace(FAST, wait_seconds=0.0)  # of what no worker had yet
    async with deployment([FakePrefill()], [worker], options=options) as (router, _):
        responses = aiter(router.stub.Generate(ASK))
        events = [(await anext(responses)).event for _ in range(4)]
        assert kinds(events) == ["started", "heartbeat", "heartbeat", "heartbeat"]
        assert [event.attempt for event in events[-2:]] == [1, 1]
        worker.script = answer
        worker.repeat()
        events += [response.event async for response in responses]
        assert "".join(event.chunk.text for event in events) == "Hello world"
        assert [request.taken_over for request in worker.requests] == [False, True]


async def test_before_a_stream_has_begun_it_says_nothing_but_why_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, the first event decides on the status: after a sign of life, a client could not repeat its call."""
    monkeypatch.setattr("adapter_router.stream.HEARTBEAT_SECONDS", 0.05)

    async def going(*_: object) -> AsyncGenerator[StreamEvent]:
        await gone()
        yield Heartbeat()

    async with deployment([FakePrefill()], [FakeWorker(going)]) as (router, _):
        responses = aiter(router.stub.Generate(ASK))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(responses)
        assert isinstance(error_from_rpc(caught.value), UnavailableError)


async def test_a_client_that_leaves_while_its_router_looks_for_a_worker_holds_no_place() -> None:
    worker = FakeWorker(after_one_token(gone))
    async with deployment([FakePrefill()], [worker], limits=RouterLimits(resume_wait_seconds=20.0)) as (router, _):
        call = router.stub.Generate(ASK)
        responses = aiter(call)
        assert kinds([(await anext(responses)).event for _ in range(4)])[-1] == "heartbeat"
        call.cancel()
        await asyncio.sleep(0.1)
        worker.script = answer
        worker.repeat()
        await router.settled(1, 1)
        await asyncio.sleep(0.1)
        assert len(worker.requests) == 1
        assert router.workers.snapshots()[0].in_flight == 0


async def test_a_stream_goes_on_where_its_adapter_is_still_the_same() -> None:
    async def other_version() -> None:
        raise AdapterRefusedError("its files have changed")

    workers = [FakeWorker() for _ in range(3)]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _), (third, _) = ranked(router, workers, servers[1:])
        first.script = after_one_token(gone)
        second.script = stopping_before(Started, and_then=other_version)
        events = await events_of(router.stub.Generate(ASK))
        assert [event.chunk.text for event in events if event.HasField("chunk")] == ["Hello", " world"]
        assert third.requests[0].attempt == 2


async def test_a_lost_worker_disturbs_only_its_own_targets_of_a_fan_out() -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, _):
        for worker in workers:
            worker.script = after_one_token(gone)

        async def repair() -> None:
            await until(lambda: sum(len(worker.requests) for worker in workers) >= 2)
            for worker in workers:
                worker.script = answer
                worker.repeat()

        repairing = asyncio.create_task(repair())
        targets = [alora_pb2.FanOutTarget(adapter=name) for name in ("jailbreak", "certainty")]
        responses = router.stub.FanOut(alora_pb2.FanOutRequest(prompt=HELLO, targets=targets))
        texts = ["", ""]
        async for response in responses:
            assert not response.HasField("failure"), response
            texts[response.index] += response.event.chunk.text
        await repairing
        assert texts == ["Hello world", "Hello world"]


async def test_another_router_goes_on_with_a_stream() -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _):
        resume = types_pb2.Resume(generated_token_ids=pack_token_ids((10,)), adapter_digest=b"jailbreak".hex(), seed=7)
        request = alora_pb2.GenerateRequest(prompt=HELLO, adapter="jailbreak", resume=resume)
        events = await events_of(router.stub.Generate(request))
        assert [event.chunk.text for event in events if event.HasField("chunk")] == [" world"]
        assert worker.requests[0].resume == resume
        assert worker.requests[0].sampling.seed == 7
        assert not worker.requests[0].taken_over


def rollout() -> tuple[list[FakePrefill], list[FakeWorker]]:
    """Base prefills and workers of two revisions of the model: m and next."""
    statuses = [EndpointStatus(model(name), adapters=ADAPTERS) for name in ("m", "next")]
    return [FakePrefill(EndpointStatus(status.model)) for status in statuses], [FakeWorker(status=s) for s in statuses]


def resume_of(model_name: str) -> types_pb2.Resume:
    return types_pb2.Resume(
        generated_token_ids=pack_token_ids((10,)),
        adapter_digest=b"jailbreak".hex(),
        seed=7,
        model_digest=model(model_name).model_digest,
    )


@pytest.mark.parametrize("name", ["m", "next"])
async def test_during_a_rollout_a_stream_is_gone_on_with_by_the_model_it_began_with(name: str) -> None:
    prefills, workers = rollout()
    async with deployment(prefills, workers) as (router, _):
        for content in "abcdefgh":  # one of two models would be the other's at some of them
            prompt = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content=content)])
            request = alora_pb2.GenerateRequest(prompt=prompt, adapter="jailbreak", resume=resume_of(name))
            started = (await events_of(router.stub.Generate(request)))[0].started
            assert started.model_digest == model(name).model_digest
            target = alora_pb2.FanOutTarget(adapter="jailbreak", resume=resume_of(name))
            assert [r async for r in router.stub.FanOut(alora_pb2.FanOutRequest(prompt=prompt, targets=[target]))]
        asked = {worker.status.model.name: len(worker.requests) for worker in workers}
        assert asked == {"m": 0, "next": 0} | {name: 16}


async def test_a_stream_of_another_model_than_is_served_or_than_its_handle_s_is_not_gone_on_with() -> None:
    by_handle = types_pb2.Prompt(handle=handle_to_proto(handle()))
    prefills, workers = rollout()
    async with deployment(prefills, workers) as (router, _):
        for prompt, name in ((HELLO, "gone"), (by_handle, "next")):
            request = alora_pb2.GenerateRequest(prompt=prompt, adapter="jailbreak", resume=resume_of(name))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await events_of(router.stub.Generate(request))
            assert isinstance(error_from_rpc(caught.value), ModelMismatchError)
        targets = [alora_pb2.FanOutTarget(adapter="jailbreak", resume=resume_of(name)) for name in ("m", "next")]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await aiter(router.stub.FanOut(alora_pb2.FanOutRequest(prompt=HELLO, targets=targets))).__anext__()
        assert isinstance(error_from_rpc(caught.value), ModelMismatchError)
        assert not any(worker.requests for worker in workers)


async def test_a_client_s_resume_that_one_worker_refuses_is_not_the_router_s_own_at_the_next() -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        (first, _), (second, _) = ranked(router, workers, servers[1:])
        first.script = stopping_before(Started, and_then=full())
        resume = types_pb2.Resume(generated_token_ids=pack_token_ids((10,)), adapter_digest=b"jailbreak".hex(), seed=7)
        request = alora_pb2.GenerateRequest(prompt=HELLO, adapter="jailbreak", resume=resume)
        assert kinds(await events_of(router.stub.Generate(request)))[-1] == "finished"
        assert [(request.attempt, request.taken_over) for request in second.requests] == [(1, False)]


async def test_a_fan_out_goes_on_with_the_targets_that_had_not_ended() -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _):
        resume = types_pb2.Resume(generated_token_ids=pack_token_ids((10,)), adapter_digest=b"certainty".hex(), seed=7)
        targets = [
            alora_pb2.FanOutTarget(adapter="nope", skip=True),
            alora_pb2.FanOutTarget(adapter="certainty", resume=resume),
        ]
        responses = [r async for r in router.stub.FanOut(alora_pb2.FanOutRequest(prompt=HELLO, targets=targets))]
        assert {response.index for response in responses} == {1}
        assert "".join(response.event.chunk.text for response in responses) == " world"
        assert [request.sample_index for request in worker.requests] == [1]


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


async def test_a_base_prefill_that_hangs_is_left_for_another() -> None:
    prefills = [FakePrefill(), FakePrefill()]
    options = dataclasses.replace(FAST, silence_seconds=0.3)
    async with deployment(prefills, [FakeWorker()], options=options) as (router, _):
        for prefill in prefills:
            prefill.before = forever
        beats = {prefill: asyncio.create_task(beat(prefill)) for prefill in prefills}
        call = asyncio.create_task(events_of(router.stub.Generate(ASK)))
        await until(lambda: any(prefill.requests for prefill in prefills))
        asked, other = sorted(prefills, key=lambda prefill: not prefill.requests)
        other.before = None
        beats[asked].cancel()
        assert kinds(await call)[-1] == "finished"
        assert len(asked.requests) == len(other.requests) == 1
        beats[other].cancel()


async def test_a_worker_that_hangs_holds_up_no_unloading() -> None:
    workers = [FakeWorker(), FakeWorker()]
    options = dataclasses.replace(FAST, silence_seconds=0.3)
    async with deployment([FakePrefill()], workers, options=options) as (router, _):
        beats = [asyncio.create_task(beat(worker)) for worker in workers]
        workers[0].free.clear()
        call = asyncio.ensure_future(router.stub.UnloadAdapter(alora_pb2.UnloadAdapterRequest(name="jailbreak")))
        await until(lambda: all(worker.unloaded for worker in workers))
        beats[0].cancel()
        assert not (await asyncio.wait_for(call, 10)).was_resident
        beats[1].cancel()


async def test_a_definition_is_asked_of_another_worker_when_one_hangs() -> None:
    workers = [FakeWorker(), FakeWorker()]
    for worker in workers:
        worker.define("certainty", "model: ~\nresponse_format: ~\ntransformations: ~\n")
    options = dataclasses.replace(FAST, silence_seconds=0.3)
    async with deployment([FakePrefill()], workers, options=options) as (router, _):
        beats = {worker: asyncio.create_task(beat(worker)) for worker in workers}
        for worker in workers:
            worker.free.clear()
        request = alora_pb2.RunIntrinsicRequest(prompt=ASK.prompt, intrinsic="certainty")
        call = asyncio.ensure_future(router.stub.RunIntrinsic(request))
        await until(lambda: any(worker.defined for worker in workers))
        asked, other = sorted(workers, key=lambda worker: not worker.defined)
        other.free.set()
        beats[asked].cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 10)
        assert isinstance(error_from_rpc(caught.value), IntrinsicOutputError), "the answer of a fake is none"
        assert len(other.defined) == 1
        beats[other].cancel()


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


async def test_workers_prefill_where_they_may_once_no_base_prefill_can() -> None:
    prefill, worker = FakePrefill(), FakeWorker(prefill=FakePrefill())
    async with deployment([prefill], [worker], workers_prefill=True) as (router, servers):
        assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert (len(prefill.requests), len(worker.prefill.requests)) == (1, 0)
        await servers[0].kill()
        for _ in range(2):
            assert kinds(await events_of(router.stub.Generate(ASK)))[-1] == "finished"
        assert (len(prefill.requests), len(worker.prefill.requests)) == (1, 2)


async def test_a_router_that_has_never_met_a_base_prefill_can_do_with_workers_alone() -> None:
    worker = FakeWorker(prefill=FakePrefill())
    server = await start_worker(worker)
    try:
        async with router_on(["127.0.0.1:1"], [server.address], workers_prefill=True) as router:
            await router.settled(0, 1)
            assert (await router.stub.GetModel(alora_pb2.GetModelRequest())).model.name
            assert (await router.stub.Prefill(alora_pb2.PrefillRequest(prompt=HELLO))).HasField("handle")
    finally:
        await server.kill()
