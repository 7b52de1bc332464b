"""Around every call: request id, deadline, errors, undecodable requests, metrics and a log line that quotes nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from alora_serve.errors import (
    AdapterNotFoundError,
    AloraServeError,
    DeadlinePassedError,
    FieldViolation,
    IntrinsicOutputError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
)
from alora_serve.rpc.channels import internal_channel, server_options
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.interceptors import CallInterceptor
from alora_serve.rpc.status import MessageTooLargeError, error_from_rpc
from alora_serve.v1 import alora_pb2
from alora_serve.v1 import base_prefill_pb2 as pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceServicer, AloraServiceStub, add_AloraServiceServicer_to_server
from alora_serve.v1.base_prefill_pb2_grpc import (
    BasePrefillServiceServicer,
    BasePrefillServiceStub,
    add_BasePrefillServiceServicer_to_server,
)
from fake_services import until

TIMEOUT_SECONDS = 30.0
LIMIT_BYTES = 100_000
PREFILL = "/alora_serve.v1.BasePrefillService/Prefill"
WATCH = "/alora_serve.v1.BasePrefillService/WatchStatus"
GENERATE = "/alora_serve.v1.AloraService/Generate"
Request = pb2.BasePrefillServicePrefillRequest
WatchRequest = pb2.BasePrefillServiceWatchStatusRequest


class Counts:
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._ended: list[tuple[str, str]] = []
        self._more = asyncio.Event()

    def started(self, method: str) -> None:
        self.begun.append(method)

    def handled(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self._ended.append((method, code))
        self._more.set()

    async def ended(self, count: int = 1) -> list[tuple[str, str]]:
        """The calls that have ended, once there are so many: a client may hear of the end before it is counted."""
        while len(self._ended) < count:
            self._more.clear()
            await self._more.wait()
        return self._ended


class Servicer(BasePrefillServiceServicer):
    """Raises what it is told to, or waits for ever."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.wait = False
        self.messages = 3
        self.calls = 0
        self.bound_ids: list[str] = []
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.full = asyncio.Event()

    async def Prefill(self, request: Any, context: Any) -> pb2.BasePrefillServicePrefillResponse:  # noqa: N802
        self.calls += 1
        self.bound_ids.append(structlog.contextvars.get_contextvars()["request_id"])
        self.entered.set()
        if self.error:
            raise self.error
        try:
            if self.wait:
                await asyncio.Event().wait()
        finally:
            self.left.set()
        return pb2.BasePrefillServicePrefillResponse()

    def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.calls += 1
        # Kept, so that nothing but a deliberate close ends it.
        self.stream = self._watch()
        return self.stream

    async def _watch(self) -> AsyncIterator[Any]:
        try:
            for _ in range(self.messages):
                yield pb2.BasePrefillServiceWatchStatusResponse()
            if self.error:
                raise self.error
            while self.wait:
                # Fills the window of a client that does not read, so that a write waits.
                status = pb2.BasePrefillServiceWatchStatusResponse()
                status.status.model.name = "x" * 100_000
                self.full.set()
                yield status
        finally:
            self.left.set()


class Talker(AloraServiceServicer):
    """Streams messages as fast as they are taken: large ones, since a client's window swallows thousands of tokens."""

    MESSAGE_BYTES = 200_000

    def __init__(self) -> None:
        self.messages = 10**9
        self.sent = 0
        self.left = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[alora_pb2.GenerateResponse]:  # noqa: N802
        response = alora_pb2.GenerateResponse()
        response.event.chunk.text = "x" * self.MESSAGE_BYTES
        try:
            for _ in range(self.messages):
                self.sent += 1
                yield response
        finally:
            self.left.set()


async def finish(call: Any) -> None:
    """Wait for the end of a call, unary or streaming."""
    if hasattr(call, "read"):
        async for _ in call:
            pass
    else:
        await call


class Server:
    """Two served servicers and stubs for them."""

    def __init__(self, write_timeout_seconds: float = TIMEOUT_SECONDS, **options: Any) -> None:
        self.reported: list[str] = []
        self.counts = Counts()
        self.in_flight = InFlightCalls()
        self.servicer = Servicer()
        self.talker = Talker()
        interceptor = CallInterceptor(
            self.counts,
            self.in_flight,
            max_message_bytes=lambda: LIMIT_BYTES,
            write_timeout_seconds=write_timeout_seconds,
            load_reports=self.report,
            **options,
        )
        self.server = grpc.aio.server(interceptors=[interceptor], options=server_options(2 * LIMIT_BYTES))
        add_BasePrefillServiceServicer_to_server(self.servicer, self.server)
        add_AloraServiceServicer_to_server(self.talker, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.channel = internal_channel(self.address)
        self.stub: Any = BasePrefillServiceStub(self.channel)

    def report(self, code: str) -> tuple[tuple[str, bytes], ...]:
        self.reported.append(code)
        return (("x-load-bin", code.encode()),)

    def prefill(self, **options: Any) -> Any:
        return self.stub.Prefill(Request(), **{"timeout": TIMEOUT_SECONDS, "wait_for_ready": True} | options)

    def watch(self, **options: Any) -> Any:
        return self.stub.WatchStatus(WatchRequest(), **{"timeout": TIMEOUT_SECONDS, "wait_for_ready": True} | options)

    def generate(self) -> Any:
        stub: Any = AloraServiceStub(self.channel)
        return stub.Generate(alora_pb2.GenerateRequest(), timeout=TIMEOUT_SECONDS, wait_for_ready=True)

    async def failure(self, call: Any) -> AloraServeError:
        """The domain error that a call ends with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await finish(call)
        return error_from_rpc(caught.value)


@asynccontextmanager
async def serving(*arguments: Any, **options: Any) -> AsyncIterator[Server]:
    served = Server(*arguments, **options)
    await served.server.start()
    yield served
    await served.channel.close()
    await served.server.stop(0)


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """Parametrized indirectly: how long a message may wait for its client."""
    async with serving(getattr(request, "param", TIMEOUT_SECONDS)) as served:
        yield served


async def test_a_clients_request_id_is_bound_and_echoed(server: Server) -> None:
    call = server.prefill(metadata=(("x-request-id", "mine-1"),))
    await call
    assert await call.initial_metadata() == grpc.aio.Metadata(), "headers of its own would go before the message"
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"
    assert server.servicer.bound_ids == ["mine-1"]
    stream = server.watch(metadata=(("x-request-id", "mine-2"),))
    assert [message async for message in stream] == [pb2.BasePrefillServiceWatchStatusResponse()] * 3
    assert dict(await stream.initial_metadata())["x-request-id"] == "mine-2"
    assert dict(await stream.trailing_metadata())["x-request-id"] == "mine-2"


@pytest.mark.parametrize("given", [None, "", "x" * 129, "two words", '"quoted"'])
async def test_a_missing_or_unfit_request_id_is_replaced(server: Server, given: str | None) -> None:
    call = server.prefill(metadata=() if given is None else (("x-request-id", given),))
    await call
    assert len(dict(await call.trailing_metadata())["x-request-id"]) == 32
    assert structlog.contextvars.get_contextvars() == {}, "the server's context must not leak"


async def test_errors_of_ours_arrive_whole_from_unary_and_streaming_calls(server: Server) -> None:
    server.servicer.error = OverloadedError("the queue is full", retry_after_seconds=1.5)
    for start in (server.prefill, server.watch):
        call = start()
        error = await server.failure(call)
        assert type(error) is OverloadedError
        assert error.retry_after_seconds == 1.5
        assert dict(await call.trailing_metadata())["x-request-id"] == error.metadata["request_id"]
    assert server.counts.begun == [PREFILL, WATCH]
    assert await server.counts.ended(2) == [(PREFILL, "RESOURCE_EXHAUSTED"), (WATCH, "RESOURCE_EXHAUSTED")]


async def test_every_call_but_a_status_stream_ends_with_a_report_of_the_load(server: Server) -> None:
    async def told(call: Any) -> bytes | None:
        with suppress(grpc.aio.AioRpcError):
            await finish(call)
        return dict(await call.trailing_metadata()).get("x-load-bin")

    server.talker.messages = 2
    assert await told(server.prefill()) == b"OK"
    assert await told(server.generate()) == b"OK"
    assert await told(server.watch()) is None
    for error, code in ((OverloadedError("full"), b"RESOURCE_EXHAUSTED"), (ValueError("a bug"), b"INTERNAL")):
        server.servicer.error = error
        assert await told(server.prefill()) == code
        assert await told(server.watch()) is None
    assert server.reported == ["OK", "OK", "RESOURCE_EXHAUSTED", "INTERNAL"]


RETRY_UNAVAILABLE = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 2,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


async def test_a_call_that_failed_before_its_first_message_can_be_made_again_by_grpc_itself(server: Server) -> None:
    """So it can by proxies: both take a call for begun, and beyond repeating, as soon as they see headers."""
    options = [("grpc.service_config", RETRY_UNAVAILABLE), ("grpc.enable_retries", 1)]
    server.servicer.error, server.servicer.messages = UnavailableError("draining"), 0
    async with grpc.aio.insecure_channel(server.address, options) as channel:
        stub: Any = BasePrefillServiceStub(channel)
        for call in (stub.Prefill(Request(), timeout=30), stub.WatchStatus(WatchRequest(), timeout=30)):
            error = await server.failure(call)
            assert await call.initial_metadata() == grpc.aio.Metadata()
            assert error.metadata["request_id"] == dict(await call.trailing_metadata())["x-request-id"]
    assert server.servicer.calls == 4, "both calls, and both again"


async def test_a_bug_is_internal_tells_nothing_and_is_logged_with_its_traceback(server: Server) -> None:
    server.servicer.error = ValueError("password=hunter2")
    for start in (server.prefill, server.watch):
        with capture_logs() as logs:
            error = await server.failure(start())
            await server.counts.ended(len(server.counts.begun))
        assert type(error) is AloraServeError
        assert str(error) == f"internal error; report request id {error.metadata['request_id']}"
        [bug] = [line for line in logs if line["event"] == "rpc_bug"]
        assert bug["exc_info"] is True
    assert [code for _, code in await server.counts.ended(2)] == ["INTERNAL", "INTERNAL"]


async def test_a_deadline_that_passes_ends_the_work_and_is_counted_as_such(server: Server) -> None:
    server.servicer.wait = True
    call = server.prefill(timeout=1.0)
    error = await server.failure(call)
    assert type(error) is DeadlinePassedError
    await server.servicer.left.wait()
    assert await server.counts.ended() == [(PREFILL, "DEADLINE_EXCEEDED")]


class LateContext:
    """A context of a call whose deadline is over, as a busy server meets it."""

    def __init__(self) -> None:
        self.aborted: list[grpc.StatusCode] = []

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float:
        return 0.0

    async def read(self) -> Any:
        return Request()

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.aborted.append(code)
        raise grpc.aio.AbortError


async def test_a_call_that_is_looked_at_too_late_does_no_work() -> None:
    counts, context, servicer = Counts(), LateContext(), Servicer()
    interceptor = CallInterceptor(counts, InFlightCalls())
    handler = grpc.unary_unary_rpc_method_handler(servicer.Prefill, request_deserializer=Request.FromString)

    async def continuation(details: Any) -> Any:
        return handler

    class Details:
        method = PREFILL

    surrounded: Any = await interceptor.intercept_service(continuation, Details())  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AbortError):
        await surrounded.stream_unary(None, context)
    assert servicer.calls == 0
    assert context.aborted == [grpc.StatusCode.DEADLINE_EXCEEDED]
    assert await counts.ended() == [(PREFILL, "DEADLINE_EXCEEDED")]


async def test_a_client_that_leaves_ends_the_work_and_is_counted(server: Server) -> None:
    server.servicer.wait = True
    call = server.prefill()
    await server.servicer.entered.wait()
    call.cancel()
    await server.servicer.left.wait()
    assert await server.counts.ended() == [(PREFILL, "CANCELLED")]


async def test_a_client_that_stops_reading_and_leaves_closes_the_handlers_stream(server: Server) -> None:
    server.servicer.wait = True
    stream = server.watch()
    await stream.read()
    await server.servicer.full.wait()
    stream.cancel()
    await server.servicer.left.wait()
    assert await server.counts.ended() == [(WATCH, "CANCELLED")]


@pytest.mark.parametrize("server", [0.3], indirect=True)
async def test_a_client_that_stops_reading_holds_a_bounded_buffer_and_then_frees_its_place(server: Server) -> None:
    with capture_logs() as logs:
        stream = server.generate()
        await stream.read()
        async with asyncio.timeout(TIMEOUT_SECONDS / 3):
            await server.talker.left.wait()
            assert await server.counts.ended() == [(GENERATE, "CANCELLED")]
    assert server.talker.sent * Talker.MESSAGE_BYTES < 32 << 20
    assert await server.in_flight.drain(0) == 0
    assert not stream.done(), "it was not the client that ended it"
    [line] = [line for line in logs if line["event"] == "rpc"]
    assert (line["code"], line["reason"]) == ("CANCELLED", "CANCELLED")
    assert "took no message for 0.3 s" in line["error"]


@pytest.mark.parametrize("server", [0.3], indirect=True)
async def test_a_client_that_reads_on_too_late_gets_what_had_been_sent_and_is_told_why(server: Server) -> None:
    stream = server.generate()
    received: list[Any] = []

    async def read_all() -> None:
        async for response in stream:
            received.append(response)
            if len(received) == 1:
                await server.counts.ended()

    error = await server.failure(read_all())
    assert type(error) is RequestCancelledError
    assert "took no message for 0.3 s" in str(error)
    assert error.metadata["request_id"] == dict(await stream.initial_metadata())["x-request-id"]
    assert len(received) == server.talker.sent


@pytest.mark.parametrize("server", [3.0], indirect=True)
async def test_a_client_that_reads_slowly_keeps_its_stream(server: Server) -> None:
    server.talker.messages = 40
    received = 0
    async for _ in server.generate():
        received += 1
        await asyncio.sleep(0.1)  # longer in all than a message may wait
    assert received == 40
    assert await server.counts.ended() == [(GENERATE, "OK")]


def raw(server: Server, data: bytes) -> Any:
    """A call whose request is exactly these bytes."""
    method: Any = server.channel.unary_unary(
        PREFILL,
        request_serializer=lambda _: data,
        response_deserializer=pb2.BasePrefillServicePrefillResponse.FromString,
    )
    return method(None, timeout=TIMEOUT_SECONDS, wait_for_ready=True)


async def test_a_string_that_is_not_utf8_is_an_invalid_argument_that_names_it(server: Server) -> None:
    data = Request(request_id="needle").SerializeToString().replace(b"needle", b"need\xff\xfe")
    error = await server.failure(raw(server, data))
    assert type(error) is InvalidRequestError
    assert [violation.field for violation in error.violations] == ["request_id"]
    assert server.servicer.calls == 0
    assert await server.counts.ended() == [(PREFILL, "INVALID_ARGUMENT")]


async def test_a_request_too_large_is_an_invalid_argument_that_names_its_largest_field(server: Server) -> None:
    error = await server.failure(server.stub.Prefill(Request(request_id="x" * LIMIT_BYTES), wait_for_ready=True))
    assert type(error) is InvalidRequestError
    assert [violation.field for violation in error.violations] == ["request_id"]
    assert server.servicer.calls == 0
    assert await server.counts.ended() == [(PREFILL, "INVALID_ARGUMENT")]


def refuse(method: str, metadata: Any) -> NoReturn:
    raise UnauthenticatedError("who are you?")


async def test_a_stranger_is_refused_before_the_request_is_received() -> None:
    async with serving(authorize=refuse) as server:
        for call in (server.prefill(), raw(server, bytes(3 * LIMIT_BYTES)), server.watch(), server.generate()):
            assert type(await server.failure(call)) is UnauthenticatedError
        assert server.servicer.calls == server.talker.sent == 0
        assert {code for _, code in await server.counts.ended(4)} == {"UNAUTHENTICATED"}


async def test_who_is_known_is_told_that_a_request_is_too_large_to_be_received(server: Server) -> None:
    error = await server.failure(raw(server, bytes(3 * LIMIT_BYTES)))
    assert type(error) is MessageTooLargeError


async def test_a_defect_in_authorizing_is_one_of_ours_and_no_call_waits_for_it() -> None:
    async with serving(authorize=lambda method, metadata: 1 / 0) as server:
        assert "internal error" in str(await server.failure(server.prefill()))


def in_parts(server: Server, requests: AsyncIterator[bytes]) -> Any:
    """A call whose client sends when it likes."""
    method: Any = server.channel.stream_unary(PREFILL)
    return method(requests, timeout=TIMEOUT_SECONDS, wait_for_ready=True)


async def nothing(leaves: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    if leaves is not None:
        await leaves.wait()
    for request in ():
        yield request


async def test_a_request_that_does_not_arrive_is_given_up() -> None:
    never = asyncio.Event()
    async with serving(read_timeout_seconds=0.3) as server:
        error = await server.failure(in_parts(server, nothing(never)))
        assert type(error) is RequestCancelledError
        assert "did not arrive within 0.3 s" in str(error)
        assert await server.counts.ended() == [(PREFILL, "CANCELLED")]
        assert await server.in_flight.drain(0) == 0
    assert server.servicer.calls == 0


async def test_a_client_that_leaves_before_its_request_has_arrived_is_counted_as_such(server: Server) -> None:
    call = in_parts(server, nothing(asyncio.Event()))
    await until(lambda: server.counts.begun == [PREFILL])
    call.cancel()
    assert await server.counts.ended() == [(PREFILL, "CANCELLED")]
    assert server.servicer.calls == 0


async def test_a_call_without_a_request_is_an_invalid_argument(server: Server) -> None:
    assert type(await server.failure(in_parts(server, nothing()))) is InvalidRequestError
    assert server.servicer.calls == 0


async def test_bytes_that_are_no_message_are_an_invalid_argument(server: Server) -> None:
    error = await server.failure(raw(server, b"\xff\xff"))
    assert type(error) is InvalidRequestError
    assert "alora_serve.v1.BasePrefillServicePrefillRequest" in str(error)


async def test_a_method_that_nobody_serves_is_unimplemented(server: Server) -> None:
    method: Any = server.channel.unary_unary("/alora_serve.v1.BasePrefillService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(b"", timeout=TIMEOUT_SECONDS, wait_for_ready=True)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.counts.begun == []


async def test_the_log_names_the_bad_fields_but_does_not_quote_the_request(server: Server) -> None:
    server.servicer.error = InvalidRequestError.of("prompt.messages[0].role", "'my secret diary' is no role")
    with capture_logs() as logs:
        await server.failure(server.prefill())
        await server.counts.ended()
    [line] = [line for line in logs if line["event"] == "rpc"]
    assert (line["code"], line["reason"]) == ("INVALID_ARGUMENT", "REQUEST_INVALID")
    assert line["fields"] == ["prompt.messages[0].role"]
    assert "diary" not in str(line)


async def test_the_log_says_whose_answer_was_no_result_but_does_not_quote_it(server: Server) -> None:
    server.servicer.error = IntrinsicOutputError("the answer is not JSON: 'my secret diary'", metadata={"adapter": "a"})
    with capture_logs() as logs:
        error = await server.failure(server.prefill())
        await server.counts.ended()
    assert "diary" in str(error), "who asked is told"
    [line] = [line for line in logs if line["event"] == "rpc"]
    assert (line["reason"], line["metadata"]) == ("INTRINSIC_OUTPUT", {"adapter": "a"})
    assert "diary" not in str(logs)


async def test_the_log_names_some_bad_fields_of_very_many(server: Server) -> None:
    bad = [FieldViolation(f"targets[{index}].adapter", "is bad") for index in range(1000)]
    server.servicer.error = InvalidRequestError("bad", violations=bad)
    with capture_logs() as logs:
        await server.failure(server.prefill())
        await server.counts.ended()
    [line] = [line for line in logs if line["event"] == "rpc"]
    assert line["fields"] == [violation.field for violation in bad[:8]]


async def test_the_log_says_why_a_call_was_refused_for_our_own_reasons(server: Server) -> None:
    server.servicer.error = AdapterNotFoundError("no adapter jailbrake; nearest: jailbreak")
    with capture_logs() as logs:
        await server.failure(server.prefill())
        await server.counts.ended()
    [line] = [line for line in logs if line["event"] == "rpc"]
    assert line["error"] == "no adapter jailbrake; nearest: jailbreak"


async def test_while_draining_new_calls_are_unavailable_and_status_streams_go_on(server: Server) -> None:
    assert await server.in_flight.drain(0) == 0
    error = await server.failure(server.prefill())
    assert type(error) is UnavailableError
    assert server.servicer.calls == 0
    assert len([message async for message in server.watch()]) == 3


async def test_a_drain_waits_for_running_calls_but_not_for_status_streams(server: Server) -> None:
    server.servicer.wait = True
    stream = server.watch()
    await stream.read()
    call = server.prefill()
    await server.servicer.entered.wait()
    assert await server.in_flight.drain(0) == 1
    call.cancel()
    assert await server.in_flight.drain(TIMEOUT_SECONDS) == 0
    stream.cancel()
