"""What happens around every call of our own services: request id, deadline, drain, errors, metrics and one log line."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol, TypeAlias, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from alora_serve.errors import AloraServeError, DeadlinePassedError, InvalidRequestError
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.status import (
    REQUEST_ID_KEY,
    STATUS_CODES,
    internal_error,
    status_from_error,
    trailing_metadata,
)
from alora_serve.rpc.wire import find_invalid_utf8

OWN_METHODS: Final = "/alora_serve."
"""Health and reflection know how to fail, and their calls are nobody's requests."""

STATUS_STREAMS: Final = "Watch"
"""Methods of this prefix stream until the client leaves: a drain neither waits for them nor turns them away."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

ResultT = TypeVar("ResultT")
# As strings: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
log = structlog.stdlib.get_logger(__name__)


class CallObserver(Protocol):
    """Where calls are counted; see :class:`alora_serve.metrics.RpcMetrics`."""

    def started(self, method: str) -> None:
        """A call of this method (``/package.Service/Method``) begins."""

    def handled(self, method: str, code: str, seconds: float) -> None:
        """It ended with this status name after so many seconds."""


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands in for a request that protobuf could not read: gRPC itself would answer INTERNAL without a reason."""

    error: InvalidRequestError


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds unary and server-streaming calls. Handlers raise AloraServeError; streams are async generators.

    The request id is the client's ``x-request-id`` where it is fit to be logged, else a new one. It is bound to the log
    context, and echoed in initial and trailing metadata.
    """

    def __init__(self, observer: CallObserver, in_flight: InFlightCalls) -> None:
        self._observer = observer
        self._in_flight = in_flight

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
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        surround = self._stream if handler.response_streaming else self._unary
        return make(
            surround(method, handler),
            request_deserializer=_reporting(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, handler: Any) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            return await self._run(method, request, context, lambda: handler.unary_unary(request, context))

        return call

    def _stream(self, method: str, handler: Any) -> Callable[[Any, Context], Awaitable[None]]:
        # A coroutine that writes, not a generator: when the client leaves while a message waits for it, the handler's
        # own generator is closed here and now, and what it holds is free.
        async def call(request: Any, context: Context) -> None:
            async def forward() -> None:
                responses: AsyncIterator[Any] = handler.unary_stream(request, context)
                async with aclosing(responses):  # type: ignore[type-var]
                    async for response in responses:
                        await context.write(response)

            await self._run(method, request, context, forward)

        return call

    async def _run(
        self, method: str, request: Any, context: Context, work: Callable[[], Awaitable[ResultT]]
    ) -> ResultT:
        request_id = _request_id(context.invocation_metadata() or ())
        is_status_stream = method.rpartition("/")[2].startswith(STATUS_STREAMS)
        started = time.perf_counter()
        self._observer.started(method)
        code, facts = "OK", dict[str, object]()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
                if _is_late(context):
                    raise DeadlinePassedError("the deadline had passed before the request was looked at")
                if isinstance(request, _Undecodable):
                    raise request.error
                with nullcontext() if is_status_stream else self._in_flight.call():
                    return await work()
            except AloraServeError as error:
                code, facts = error.status, _facts(error)
                await _abort(context, error, request_id)
            except asyncio.CancelledError:
                code = "DEADLINE_EXCEEDED" if _is_late(context) else "CANCELLED"
                raise
            except Exception:
                code = "INTERNAL"
                log.exception("rpc_bug", method=method)
                await _abort(context, internal_error(request_id), request_id)
            finally:
                seconds = time.perf_counter() - started
                level = log.debug if is_status_stream else log.info
                level("rpc", method=method, code=code, seconds=round(seconds, 6), **facts)
                self._observer.handled(method, code, seconds)


async def _abort(context: Context, error: AloraServeError, request_id: str) -> NoReturn:
    status = status_from_error(error, request_id)
    await context.abort(
        STATUS_CODES[error.status],
        status.message,
        trailing_metadata=(*trailing_metadata(status), (REQUEST_ID_KEY, request_id)),
    )


def _facts(error: AloraServeError) -> dict[str, object]:
    """What the log says about a refusal. Messages about a request may quote it, so those stay out."""
    facts: dict[str, object] = {"reason": error.reason}
    if error.violations:
        facts["fields"] = [violation.field for violation in error.violations]
    if not isinstance(error, InvalidRequestError):
        facts["error"] = str(error)
    return facts


def _is_late(context: Context) -> bool:
    # None without a deadline, which the stubs do not know.
    remaining_seconds = cast("float | None", context.time_remaining())
    return remaining_seconds is not None and remaining_seconds <= 0


def _request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    given = dict(metadata).get(REQUEST_ID_KEY)
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _reporting(deserialize: Callable[[bytes], Message]) -> Callable[[bytes], Message | _Undecodable]:
    """The deserializer of a generated message, ``X.FromString``, that reports what it cannot read."""

    def read(data: bytes) -> Message | _Undecodable:
        try:
            return deserialize(data)
        except DecodeError:
            descriptor = deserialize.__self__.DESCRIPTOR  # type: ignore[attr-defined]  # the message class
            field = find_invalid_utf8(descriptor, data)
            if field is None:
                return _Undecodable(InvalidRequestError(f"the request is not a {descriptor.full_name}"))
            return _Undecodable(InvalidRequestError.of(field, "is not UTF-8"))

    return read
