"""One conversation, many adapters, one call."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from adapter_router.affinity import conversation_key, rendezvous_order
from alora_serve.errors import InvalidRequestError, OverloadedError
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import EndpointStatus, GenerateRequest, StreamEvent
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import FakePrefill, FakeWorker, adapter, answer, deployment, model, until

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])


def ask_all(*adapters: str, **changes: Any) -> alora_pb2.FanOutRequest:
    targets = [alora_pb2.FanOutTarget(adapter=adapter) for adapter in adapters]
    return alora_pb2.FanOutRequest(prompt=HELLO, targets=targets, **changes)


async def results_of(call: Any) -> dict[int, list[alora_pb2.FanOutResponse]]:
    results: dict[int, list[alora_pb2.FanOutResponse]] = defaultdict(list)
    async for response in call:
        results[response.index].append(response)
    return results


def text(responses: list[alora_pb2.FanOutResponse]) -> str:
    return "".join(response.event.chunk.text for response in responses)


async def test_one_prefill_and_every_target_answers_under_its_index() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        results = await results_of(router.stub.FanOut(ask_all("jailbreak", "", "certainty")))
        assert sorted(results) == [0, 1, 2]
        assert all(text(responses) == "Hello world" for responses in results.values())
        assert len(prefill.requests) == 1
        assert {(request.sample_index, request.adapter) for request in worker.requests} == {
            (0, "jailbreak"),
            (1, ""),
            (2, "certainty"),
        }
        assert len({request.sampling.seed for request in worker.requests}) == 1


async def test_the_prefill_is_charged_once() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        results = await results_of(router.stub.FanOut(ask_all("plain", "jailbreak", "certainty")))
        usages = [results[index][-1].event.finished.usage for index in range(3)]
        # Prefill computed one token and stored 1000 bytes; the plain LoRA made no use of it.
        assert [usage.stored_bytes for usage in usages] == [0, 1000, 0]
        assert [usage.computed_tokens for usage in usages] == [1, 2, 1]


async def test_only_plain_loras_need_no_prefill() -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        await results_of(router.stub.FanOut(ask_all("plain", "plain")))
        assert prefill.requests[0].tokenize_only


async def test_results_come_as_they_come() -> None:
    gate = asyncio.Event()

    async def certainty_waits(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        if request.adapter == "certainty":
            await gate.wait()
        async for event in answer(request, attempt):
            yield event

    async with deployment([FakePrefill()], [FakeWorker(certainty_waits)]) as (router, _):
        finished = []
        async for response in router.stub.FanOut(ask_all("certainty", "jailbreak")):
            if response.event.HasField("finished"):
                finished.append(response.index)
                gate.set()
        assert finished == [1, 0]


async def test_a_failing_target_reports_itself_and_disturbs_nobody() -> None:
    async def certainty_fails(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
            if request.adapter == "certainty":
                raise OverloadedError("no more", retry_after_seconds=5)

    async with deployment([FakePrefill()], [FakeWorker(certainty_fails)]) as (router, _):
        results = await results_of(router.stub.FanOut(ask_all("jailbreak", "certainty", "nope", "broken")))
        assert text(results[0]) == "Hello world"
        failures = {index: results[index][-1].failure for index in (1, 2, 3)}
        assert [failures[index].code for index in (1, 2, 3)] == [
            grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
            grpc.StatusCode.NOT_FOUND.value[0],
            grpc.StatusCode.FAILED_PRECONDITION.value[0],
        ]
        assert failures[1].retry_after_seconds == 5
        assert [failure.reason for failure in failures.values()] == [
            "OVERLOADED",
            "ADAPTER_NOT_FOUND",
            "ADAPTER_REFUSED",
        ]


async def test_during_a_rollout_targets_are_prefilled_for_the_model_that_serves_them() -> None:
    old = FakeWorker(status=EndpointStatus(model("old"), adapters=(adapter("jailbreak"),)))
    new = FakeWorker(status=EndpointStatus(model("new"), adapters=(adapter("jailbreak"), adapter("certainty"))))
    prefills = [FakePrefill(EndpointStatus(model(name))) for name in ("old", "new")]
    async with deployment(prefills, [old, new]) as (router, _):
        for content in "abcdefgh":  # half of them are closer to the other model's base prefill
            request = ask_all("jailbreak", "certainty")
            request.prompt.messages[0].content = content
            results = await results_of(router.stub.FanOut(request))
            assert [text(results[index]) for index in range(2)] == ["Hello world"] * 2
        assert (len(old.requests), len(new.requests)) == (0, 16)


async def test_when_no_target_can_run_nothing_is_prefilled() -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        results = await results_of(router.stub.FanOut(ask_all("nope", "broken")))
        assert [responses[-1].HasField("failure") for responses in results.values()] == [True, True]
        assert not prefill.requests


@pytest.mark.parametrize("count", [0, 257])
async def test_too_few_or_too_many_targets_are_refused(count: int) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await results_of(router.stub.FanOut(ask_all(*["jailbreak"] * count)))
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidRequestError)
        assert error.violations[0].field == "targets"


async def test_256_targets_answer() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        results = await results_of(router.stub.FanOut(ask_all(*["jailbreak"] * 256)))
        assert len(results) == 256
        assert all(text(responses) == "Hello world" for responses in results.values())


async def test_a_fan_out_stays_on_few_workers() -> None:
    workers = [FakeWorker() for _ in range(4)]
    async with deployment([FakePrefill()], workers) as (router, servers):
        await results_of(router.stub.FanOut(ask_all(*["jailbreak"] * 4)))
        # Bound: ceil(1.25 x 4 / 4) = 2 a worker. Placed one by one, the first three would go to three workers.
        addresses = [server.address for server in servers[1:]]
        by_address = dict(zip(addresses, workers, strict=True))
        order = rendezvous_order(conversation_key((1,)), addresses)
        assert [len(by_address[address].requests) for address in order] == [2, 2, 0, 0]


async def test_cancelling_a_fan_out_cancels_every_target() -> None:
    async def endless(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
            await asyncio.Event().wait()

    worker = FakeWorker(endless)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        call = router.stub.FanOut(ask_all("jailbreak", "certainty", ""))
        await call.read()
        await until(lambda: len(worker.requests) == 3)
        call.cancel()
        await until(lambda: worker.cancelled == 3 and router.metric("alora_router_in_flight") == 0)


async def test_a_reader_that_stops_holds_a_bounded_buffer() -> None:
    produced = 0

    async def torrent(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        nonlocal produced
        events = [event async for event in answer(request, attempt)]
        yield events[0]
        while True:
            produced += 1
            yield type(events[2])((10,), "x" * 10_000)

    worker = FakeWorker(torrent)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        call = router.stub.FanOut(ask_all("jailbreak", "certainty"))
        await call.read()
        before = -1
        while produced != before:  # until nothing moves any more
            before = produced
            await asyncio.sleep(0.3)
        assert produced < 2000  # 10 kB each: flow control stopped both workers within a few MB
        call.cancel()
        await until(lambda: worker.cancelled == 2)
