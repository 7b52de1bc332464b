"""Several samples of one prompt in one call."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from alora_serve.errors import AloraServeError, OverloadedError, UnavailableError
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import GenerateRequest, StreamEvent
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import FakePrefill, FakeWorker, answer, deployment

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])


def ask(count: int, adapter: str = "jailbreak", **changes: Any) -> alora_pb2.GenerateRequest:
    sampling = types_pb2.SamplingParams(n=count)
    return alora_pb2.GenerateRequest(prompt=HELLO, adapter=adapter, sampling=sampling, **changes)


async def samples_of(call: Any) -> dict[int, list[types_pb2.GenerationEvent]]:
    samples: dict[int, list[types_pb2.GenerationEvent]] = {}
    async for response in call:
        samples.setdefault(response.event.sample_index, []).append(response.event)
    return samples


async def failure_of(call: Any) -> AloraServeError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await samples_of(call)
    return error_from_rpc(caught.value)


async def test_one_prefill_and_every_sample_under_its_index() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        samples = await samples_of(router.stub.Generate(ask(3)))
        assert sorted(samples) == [0, 1, 2]
        for events in samples.values():
            assert "".join(event.chunk.text for event in events) == "Hello world"
            assert (events[0].WhichOneof("event"), events[-1].WhichOneof("event")) == ("started", "finished")
        assert len(prefill.requests) == 1
        assert sorted(request.sample_index for request in worker.requests) == [0, 1, 2]
        assert {request.sampling.n for request in worker.requests} == {1}
        assert len({request.sampling.seed for request in worker.requests}) == 1
        # What the one prefill stored is charged once.
        assert [samples[index][-1].finished.usage.stored_bytes for index in range(3)] == [1000, 0, 0]


async def test_one_sample_is_number_0() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        assert list(await samples_of(router.stub.Generate(ask(1)))) == [0]


async def test_each_sample_survives_the_loss_of_its_own_worker() -> None:
    async def second_fails_once(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        sent = 0
        async for event in answer(request, attempt):
            yield event
            sent += 1
            if request.sampling.sample_index == 1 and attempt == 0 and sent == 3:
                raise UnavailableError("gone")

    workers = [FakeWorker(second_fails_once), FakeWorker(second_fails_once)]
    async with deployment([FakePrefill()], workers) as (router, _):
        samples = await samples_of(router.stub.Generate(ask(3)))
        assert {"".join(event.chunk.text for event in events) for events in samples.values()} == {"Hello world"}
        assert [max(event.attempt for event in samples[index]) for index in range(3)] == [0, 1, 0]
        resumed = [request for worker in workers for request in worker.requests if request.HasField("resume")]
        assert [request.sample_index for request in resumed] == [1]


async def test_a_sample_that_fails_ends_the_call_by_its_index() -> None:
    async def second_is_refused(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        if request.sampling.sample_index == 1:
            raise OverloadedError("full")
        async for event in answer(request, attempt):
            yield event

    async with deployment([FakePrefill()], [FakeWorker(second_is_refused)]) as (router, _):
        error = await failure_of(router.stub.Generate(ask(2)))
        assert isinstance(error, OverloadedError)
        assert error.metadata["sample_index"] == "1"


async def test_interrupted_samples_go_on_and_ended_ones_are_not_asked() -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _):
        stood = types_pb2.Resume(generated_token_ids=b"\x0a\0\0\0", seed=5, adapter_digest=b"jailbreak".hex())
        interrupted = [
            alora_pb2.InterruptedSample(skip=True),
            alora_pb2.InterruptedSample(resume=stood),
            alora_pb2.InterruptedSample(),
        ]
        samples = await samples_of(router.stub.Generate(ask(3, interrupted_samples=interrupted)))
        assert sorted(samples) == [1, 2]
        assert "".join(event.chunk.text for event in samples[1]) == " world"
        assert "".join(event.chunk.text for event in samples[2]) == "Hello world"
        ended = [alora_pb2.InterruptedSample(skip=True)] * 2
        assert await samples_of(router.stub.Generate(ask(2, interrupted_samples=ended))) == {}
