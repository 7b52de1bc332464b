"""What happens around every call of our own services: request id, deadline, drain, errors, metrics and one log line."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any, Final, NoReturn, Protocol, TypeAlias, TypeVar, cast

import grpc
import structlog
from opentelemetry.trace import INVALID_SPAN

from alora_serve.errors import AloraServeError, DeadlinePassedError, InvalidRequestError, RequestCancelledError
from alora_serve.rpc.caller import CALLER
from alora_serve.rpc.channels import DEFAULT_MESSAGE_BYTES
from alora_serve.rpc.decoding import Refused, refusing
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.status import (
    REQUEST_ID_KEY,
    STATUS_CODES,
    internal_error,
    status_from_error,
    trailing_metadata,
)
from alora_serve.rpc.tracing import end_server_span, server_span
from alora_serve.types import Identity

OWN_METHODS: Final = "/alora_serve."
"""Health and reflection know how to fail, and their calls are nobody's requests."""

WRITE_TIMEOUT_SECONDS: Final = 30.0
READ_TIMEOUT_SECONDS: Final = 30.0
STATUS_SECONDS: Final = 1.0
"""Longest wait for a status to leave. It does not overtake messages that a client does not take; gRPC keeps it."""

LATE_SECONDS: Final = 0.1
"""A call that is cancelled so shortly before its deadline has met it: the client's clock began earlier than ours."""

LEAVING_SECONDS: Final = 0.1
"""Within it gRPC cancels a call that ended without a request because its client left, or sent too large a one."""

STATUS_STREAMS: Final = "Watch"
"""Methods of this prefix stream until the client leaves: a drain neither waits for them nor turns them away."""

_LOGGED_FIELDS: Final = 8
"""Of a request's bad fields, which may be as many as it has."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

ResultT = TypeVar("ResultT")
# As strings: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Begin: TypeAlias = Callable[[], Awaitable[None]]
log = structlog.stdlib.get_logger(__name__)


Authorize = Callable[[str, Mapping[str, str | bytes]], Identity]
"""From a method, ``/package.Service/Method``, and a call's metadata to who makes it; raises when it may not be made."""


LoadReports = Callable[[str], tuple[tuple[str, bytes], ...]]
"""From the status name that a call ends with to what its trailing metadata tells of the load."""


class CallObserver(Protocol):
    """Where calls are counted; see :class:`alora_serve.metrics.RpcMetrics`."""

    def started(self, method: str) -> None:
        """A call of this method (``/package.Service/Method``) begins."""

    def handled(self, method: str, code: str, seconds: float) -> None:
        """It ended with this status name after so many seconds."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds unary and server-streaming calls. Handlers raise AloraServeError; streams are async generators.

    The request id is the client's ``x-request-id`` where it is fit to be logged, else a new one. It is bound to the log
    context, and echoed in trailing metadata, and in a stream's initial metadata once there is a message. Headers wait
    for the first message because proxies and retrying clients take a call for begun when they see them: one that ends
    before has its status alone, and may be made again elsewhere. Those of a unary call go out with its message, as gRPC
    itself sends them: they would go before it if they held anything, and a server can be killed in between.

    A stream whose client has stopped reading ends with CANCELLED once a message has waited for the client for
    ``write_timeout_seconds``: the handler's generator is closed, so that its sequence leaves the batch. Keepalive does
    not find such a client, whose machine answers pings. CANCELLED, because it is the client that gave the call up;
    RESOURCE_EXHAUSTED would tell other clients and dashboards of an overload. What stays is one message, and the
    status, in gRPC; they go to the client if it reads on, or with its connection. Messages wait only once the HTTP/2
    window is full, to which gRPC clients give 64 KiB to 4 MiB: a small answer fits, and never waits.

    To gRPC every request here is a stream, of which the one message is asked for once the call may be made. Of a unary
    request it would receive and parse up to 64 MiB before anybody saw whose they are; as it is, no more comes of a
    stranger's than the window that HTTP/2 gives each call.
    """

    def __init__(
        self,
        observer: CallObserver,
        in_flight: InFlightCalls,
        *,
        max_message_bytes: Callable[[], int] = lambda: DEFAULT_MESSAGE_BYTES,
        write_timeout_seconds: float = WRITE_TIMEOUT_SECONDS,
        read_timeout_seconds: float = READ_TIMEOUT_SECONDS,
        authorize: Authorize | None = None,
        load_reports: LoadReports | None = None,
    ) -> None:
        """Keep who is told.

        Args:
            observer: counts calls.
            in_flight: counts them for the drain, and admits none after it began.
            max_message_bytes: larger requests are refused by their largest field; asked for each request, since a
                router learns from its endpoints what their models take.
            write_timeout_seconds: longest wait of one message of a stream for its client.
            read_timeout_seconds: longest wait for a request to arrive whole.
            authorize: says who makes a call, or raises; None: nobody is asked.
            load_reports: asked at the end of every call but status streams; see :mod:`alora_serve.rpc.load_reports`.
                None: callers are told nothing.
        """
        self._observer = observer
        self._in_flight = in_flight
        self._max_message_bytes = max_message_bytes
        self._write_timeout_seconds = write_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._authorize = authorize
        self._load_reports = load_reports or _no_report

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of the method, surrounded; None, which is UNIMPLEMENTED, for a method that nobody registered."""
        handler: Any = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or handler.request_streaming or not method.startswith(OWN_METHODS):
            return cast("Handler | None", handler)
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        surround = self._stream if handler.response_streaming else self._unary
        return make(
            surround(method, handler),
            request_deserializer=refusing(handler.request_deserializer, self._max_message_bytes),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, handler: Any) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(requests: Any, context: Context) -> Any:
            async def answer(_: Begin) -> Any:
                return await handler.unary_unary(await self._read(context), context)

            return await self._run(method, context, answer)

        return call

    def _stream(self, method: str, handler: Any) -> Callable[[Any, Context], Awaitable[None]]:
        # A coroutine that writes, not a generator: when the client leaves while a message waits for it, the handler's
        # own generator is closed here and now, and what it holds is free.
        async def call(requests: Any, context: Context) -> None:
            async def forward(begin: Begin) -> None:
                request = await self._read(context)
                responses: AsyncIterator[Any] = handler.unary_stream(request, context)
                has_begun = False
                async with aclosing(responses):  # type: ignore[type-var]
                    async for response in responses:
                        if not has_begun:
                            await begin()
                            has_begun = True
                        await self._write(context, response)

            await self._run(method, context, forward)

        return call

    async def _read(self, context: Context) -> Any:
        try:
            async with asyncio.timeout(self._read_timeout_seconds):
                request = await context.read()
        except TimeoutError:
            waited = f"the request did not arrive within {self._read_timeout_seconds:g} s"
            raise RequestCancelledError(f"{waited}; send it without pausing") from None
        if _is_late(context):
            raise DeadlinePassedError("the deadline had passed before the request was looked at")
        if request is grpc.aio.EOF:
            await asyncio.sleep(LEAVING_SECONDS)
            raise InvalidRequestError("the call ended without a request")
        if isinstance(request, Refused):
            raise request.error
        return request

    async def _write(self, context: Context, response: Any) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_seconds):
                with _unless_over():
                    await context.write(response)
        except TimeoutError:
            waited = f"the client took no message for {self._write_timeout_seconds:g} s"
            raise RequestCancelledError(f"{waited}; read a stream to its end or cancel it") from None

    async def _run(self, method: str, context: Context, work: Callable[[Begin], Awaitable[ResultT]]) -> ResultT:
        metadata = context.invocation_metadata() or ()
        request_id = _request_id(metadata)

        async def begin() -> None:
            with _unless_over():
                await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))

        is_status_stream = method.rpartition("/")[2].startswith(STATUS_STREAMS)
        load_report = _no_report if is_status_stream else self._load_reports
        # A stream without an end would be a span that nobody ever sees.
        traced = nullcontext(INVALID_SPAN) if is_status_stream else server_span(method, metadata, request_id)
        started = time.perf_counter()
        self._observer.started(method)
        code, facts = "OK", dict[str, object]()
        with structlog.contextvars.bound_contextvars(request_id=request_id), traced as span:
            try:
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
                if self._authorize is not None:
                    CALLER.set(self._authorize(method, dict(context.invocation_metadata() or ())))
                with nullcontext() if is_status_stream else self._in_flight.call():
                    result = await work(begin)
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id), *load_report(code)))
                return result
            except AloraServeError as error:
                code, facts = error.status, _facts(error)
                await _abort(context, error, request_id, load_report(code))
            except asyncio.CancelledError:
                code = "DEADLINE_EXCEEDED" if _is_late(context) else "CANCELLED"
                raise
            except Exception:
                code = "INTERNAL"
                log.exception("rpc_bug", method=method)
                await _abort(context, internal_error(request_id), request_id, load_report(code))
            finally:
                seconds = time.perf_counter() - started
                level = log.debug if is_status_stream else log.info
                level("rpc", method=method, code=code, seconds=round(seconds, 6), **facts)
                self._observer.handled(method, code, seconds)
                end_server_span(span, code, facts.get("reason"))


@contextmanager
def _unless_over() -> Iterator[None]:
    """What gRPC says of sending to a client that has left, before it cancels the handler, ends it as that would."""
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _no_report(code: str) -> tuple[()]:
    return ()


async def _abort(
    context: Context, error: AloraServeError, request_id: str, load_report: tuple[tuple[str, bytes], ...]
) -> NoReturn:
    status = status_from_error(error, request_id)
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            await context.abort(
                STATUS_CODES[error.status],
                status.message,
                trailing_metadata=(*trailing_metadata(status), (REQUEST_ID_KEY, request_id), *load_report),
            )
    except TimeoutError:
        # gRPC has it and sends it when it can. This ends the call here, without a second status.
        raise asyncio.CancelledError from error


def _facts(error: AloraServeError) -> dict[str, object]:
    """What the log says about a refusal; see :attr:`AloraServeError.is_private`."""
    facts: dict[str, object] = {"reason": error.reason}
    if error.violations:
        facts["fields"] = [violation.field for violation in error.violations[:_LOGGED_FIELDS]]
    if not error.is_private:
        facts["error"] = str(error)
    elif error.metadata:
        facts["metadata"] = error.metadata
    return facts


def _is_late(context: Context) -> bool:
    # None without a deadline, which the stubs do not know.
    remaining_seconds = cast("float | None", context.time_remaining())
    return remaining_seconds is not None and remaining_seconds <= LATE_SECONDS


def _request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    given = dict(metadata).get(REQUEST_ID_KEY)
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
