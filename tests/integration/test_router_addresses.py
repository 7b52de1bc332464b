"""Where endpoints are is for operators: clients learn what kind of service failed them, the log learns which."""

# ruff: noqa: N802  # gRPC methods carry the names of the proto
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from adapter_router.admission import RouterLimits
from alora_serve.rpc.status import STATUS_CODES, error_from_rpc
from alora_serve.types import Finished, GenerateRequest, StreamEvent
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.adapter_decode_pb2_grpc import add_AdapterDecodeServiceServicer_to_server
from alora_serve.v1.base_prefill_pb2_grpc import add_BasePrefillServiceServicer_to_server
from fake_services import FakePrefill, FakeWorker, Router, answer, deployment, router_on

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])
GENERATE = alora_pb2.GenerateRequest(prompt=HELLO, adapter="jailbreak")
FAN_OUT = alora_pb2.FanOutRequest(prompt=HELLO, targets=[alora_pb2.FanOutTarget(adapter="jailbreak")])
NOT_OURS = "connect failed, last error: ipv4:10.0.0.7:50052: refused"
"""As gRPC or a proxy speaks."""

Abort = Callable[[Any], Awaitable[None]]


class LostWorker(FakeWorker):
    """A decode worker that something on the way speaks for, except on its status stream."""

    def __init__(self, abort: Abort) -> None:
        super().__init__()
        self.abort = abort

    async def Decode(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        await self.abort(context)
        yield

    async def LoadAdapter(self, request: Any, context: Any) -> Any:
        await self.abort(context)


class LostPrefill(FakePrefill):
    """A base prefill of the same fate."""

    def __init__(self, abort: Abort) -> None:
        super().__init__()
        self.abort = abort

    async def Prefill(self, request: Any, context: Any) -> Any:
        await self.abort(context)


@asynccontextmanager
async def lost(
    code: grpc.StatusCode, text: str = NOT_OURS, *, prefill: bool = False
) -> AsyncGenerator[tuple[Router, str], None]:
    """A router whose decode worker, or base prefill, answers so; and that endpoint's address."""

    async def abort(context: Any) -> None:
        await context.abort(code, text)

    def bare() -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()  # without our interceptor, so that nothing here has our details
        stack.push_async_callback(server.stop, None)
        return server, f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"

    async with AsyncExitStack() as stack:
        (prefills, prefill_address), (workers, worker_address) = bare(), bare()
        add_BasePrefillServiceServicer_to_server(LostPrefill(abort) if prefill else FakePrefill(), prefills)
        add_AdapterDecodeServiceServicer_to_server(LostWorker(abort), workers)
        await prefills.start()
        await workers.start()
        limits = RouterLimits(max_attempts=1)
        async with router_on([prefill_address], [worker_address], limits=limits) as router:
            await router.settled(1, 1)
            yield router, prefill_address if prefill else worker_address


async def events_of(call: Any) -> list[types_pb2.GenerationEvent]:
    return [response.event async for response in call]


async def failure_of(answer: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value


def told(error: grpc.aio.AioRpcError) -> str:
    """Everything that a client can read: the message, its details, and metadata."""
    metadata = [*error.initial_metadata(), *error.trailing_metadata()]
    values = [value.decode("latin-1") if isinstance(value, bytes) else value for _, value in metadata]
    return "\n".join([error.details() or "", *values])


def no_address_in(text: str, address: str) -> bool:
    return not any(secret in text for secret in (address, address.rpartition(":")[2], "127.0.0.1", "10.0.0.7", "ipv4"))


@pytest.mark.parametrize("method", ["Generate", "LoadAdapter"])
@pytest.mark.parametrize(
    ("code", "expected", "advice"),
    [
        (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "is gone; send it again"),
        (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, "is gone; send it again"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED, "allow it more time"),
        (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.PERMISSION_DENIED, "report the request id"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED, "report the request id"),
        (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, "report the request id"),
    ],
)
async def test_what_others_say_of_a_worker_is_for_the_log(
    code: grpc.StatusCode, expected: grpc.StatusCode, advice: str, method: str
) -> None:
    async with lost(code) as (router, address):
        with capture_logs([structlog.contextvars.merge_contextvars]) as logs:
            if method == "Generate":
                error = await failure_of(events_of(router.stub.Generate(GENERATE)))
            else:
                error = await failure_of(router.stub.LoadAdapter(alora_pb2.LoadAdapterRequest(name="jailbreak")))
        assert error.code() is expected
        assert (error.details() or "").startswith("the adapter_decode endpoint that had this request ")
        assert (error.details() or "").endswith(advice)
        assert no_address_in(told(error), address), told(error)
        [line] = [line for line in logs if line["event"] == "call failed"]
        assert (line["role"], line["address"]) == ("adapter_decode", address)
        assert NOT_OURS in line["cause"]
        assert line["request_id"] == error_from_rpc(error).metadata["request_id"]


async def test_a_target_of_a_fan_out_is_told_as_little() -> None:
    async with lost(grpc.StatusCode.UNKNOWN) as (router, address):
        with capture_logs([structlog.contextvars.merge_contextvars]) as logs:
            call = router.stub.FanOut(FAN_OUT)
            [response] = [response async for response in call]
        failure = response.failure
        assert failure.code == STATUS_CODES["INTERNAL"].value[0]
        assert "adapter_decode endpoint" in failure.message
        assert no_address_in(str(response), address), response
        [line] = [line for line in logs if line["event"] == "call failed"]
        assert line["address"] == address
        assert line["request_id"] == dict(await call.trailing_metadata())["x-request-id"]


async def test_a_message_that_grpc_finds_too_large_is_called_so() -> None:
    text = "10.0.0.7:50052: Received message larger than max (9 vs. 4)"
    async with lost(grpc.StatusCode.RESOURCE_EXHAUSTED, text) as (router, address):
        error = await failure_of(events_of(router.stub.Generate(GENERATE)))
        assert (error.details() or "").endswith("shorten the request")
        assert no_address_in(told(error), address), told(error)


async def test_a_lost_base_prefill_is_named_by_its_kind() -> None:
    async with lost(grpc.StatusCode.UNAVAILABLE, prefill=True) as (router, address):
        error = await failure_of(router.stub.Prefill(alora_pb2.PrefillRequest(prompt=HELLO)))
        assert error.details() == "the base_prefill endpoint that had this request is gone; send it again"
        assert no_address_in(told(error), address), told(error)


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "ends early"])
async def test_a_worker_that_leaves_in_the_middle_of_a_stream_is_not_named(dies: bool) -> None:
    async def breaking_off(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            if isinstance(event, Finished):
                if dies:
                    await asyncio.Event().wait()
                return
            yield event

    limits = RouterLimits(max_attempts=1, resume_wait_seconds=0.2)
    async with deployment([FakePrefill()], [FakeWorker(breaking_off)], limits=limits) as (router, servers):
        responses = aiter(router.stub.Generate(GENERATE))
        for _ in range(4):  # started, a heartbeat, both tokens
            await anext(responses)
        if dies:
            await servers[1].kill()
        error = await failure_of(events_of(responses))  # a heartbeat of the next attempt may still come
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert no_address_in(told(error), servers[1].address), told(error)
