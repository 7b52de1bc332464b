"""What happens around every HTTP request: its id, the drain, metrics, its span, one log line, and bugs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Final

import structlog
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alora_serve.errors import AloraServeError
from alora_serve.metrics import HttpMetrics
from alora_serve.rpc.channels import MAX_MESSAGE_BYTES
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.status import REQUEST_ID_KEY, internal_error
from alora_serve.rpc.tracing import end_http_server_span, http_server_span
from openai_front.caller import Caller
from openai_front.completion_request import MAX_PROMPTS
from openai_front.event_stream import LEFT
from openai_front.failures import failure_of
from openai_front.router import Router

UNCOUNTED: Final = frozenset({"/health", "/metrics"})
"""Neither waited for by a drain nor turned away: they ask about the process."""
METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
"""Those of HTTP. A client may send any other word, which metrics and spans call ``other``."""
UNASKED_BYTES: Final = 64 * 1024
"""What is read of a body for anybody: times ``http_max_requests`` it still fits, and an HTTP server buffers as much."""
CLIENT_LEFT: Final = 499
INTERNAL: Final = 500
COMPLETIONS: Final = "/v1/completions"

log = structlog.stdlib.get_logger(__name__)


class RequestMiddleware:
    """Outermost; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        router: Router,
        in_flight: InFlightCalls,
        metrics: HttpMetrics,
        read_timeout_seconds: float,
    ) -> None:
        self._app = app
        self._router = router
        self._in_flight = in_flight
        self._metrics = metrics
        self._read_timeout_seconds = read_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = Caller.read(headers)
        caller.attach(scope)
        method, status, started = method_of(scope), INTERNAL, time.perf_counter()
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                MutableHeaders(scope=message)[REQUEST_ID_KEY] = caller.request_id
            await send(message)

        counted = scope["path"] not in UNCOUNTED
        self._metrics.started()
        with (
            structlog.contextvars.bound_contextvars(request_id=caller.request_id),
            http_server_span(method, _traced(headers), caller.request_id) as span,
        ):
            try:
                with self._in_flight.call() if counted else nullcontext():
                    limit = await self._most_bytes(scope["path"], headers, caller) if counted else UNASKED_BYTES
                    await self._app(scope, Bounded(receive, limit, self._read_timeout_seconds), send_on)
            except HTTPException as error:
                await answer_unrouted(error)(scope, receive, send_on)
            except AloraServeError as error:  # not let in; the application answers its own
                await answer_with(error)(scope, receive, send_on)
            except Exception:
                log.exception("http_bug", route=route_of(scope))
                if not has_begun:
                    await answer_with(internal_error(caller.request_id))(scope, receive, send_on)
            finally:
                status = CLIENT_LEFT if scope.get(LEFT) else status
                route, seconds = f"{method} {route_of(scope)}", time.perf_counter() - started
                level = log.info if counted else log.debug
                level("http", route=route, status=status, seconds=round(seconds, 6))
                self._metrics.handled(route, status, seconds)
                end_http_server_span(span, route, status)

    async def _most_bytes(self, path: str, headers: Mapping[str, str], caller: Caller) -> int:
        """The longest body that is read; more than a little only for a caller whose key the router knows.

        Raises:
            HTTPException: the body is longer than any that the model can need.
            AloraServeError: the router does not let the caller in, or does not answer.
        """
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) <= UNASKED_BYTES and "transfer-encoding" not in headers:
            return UNASKED_BYTES
        limit = await self._router.most_bytes(self._router.as_caller(caller.api_key, caller.request_id))
        if path == COMPLETIONS:
            limit = min(MAX_PROMPTS * limit, MAX_MESSAGE_BYTES)  # each prompt may fill the context
        if not length.isdecimal() or int(length) > limit:
            raise _too_long(limit)
        return limit


def answer_with(error: AloraServeError) -> JSONResponse:
    """The response that an error comes to."""
    failure = failure_of(error)
    return JSONResponse(failure.body, failure.status, dict(failure.headers))


def answer_unrouted(error: HTTPException) -> JSONResponse:
    """The response to what reaches no endpoint, in the same form."""
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, {"x-should-retry": "false", **(error.headers or {})})


def method_of(scope: Scope) -> str:
    """The method, so that words which clients invent make no series of their own."""
    return scope["method"] if scope["method"] in METHODS else "other"


def route_of(scope: Scope) -> str:
    """The path as declared, so that names in it make no series of their own."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))


class Bounded:
    """A body, cut off where it gets too long, though it was not announced, or takes too long to arrive."""

    def __init__(self, receive: Receive, limit_bytes: int, timeout_seconds: float) -> None:
        self._receive = receive
        self._limit = self._left = limit_bytes
        self._due: float | None = asyncio.get_running_loop().time() + timeout_seconds

    async def __call__(self) -> Message:
        """The next part; after the last one, that the client has left, for which nobody is in a hurry."""
        try:
            async with asyncio.timeout_at(self._due):
                message = await self._receive()
        except TimeoutError:
            raise _too_slow() from None
        if not message.get("more_body", False):
            self._due = None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_long(self._limit)
        return message


# FastAPI lets these pass where it reads a body, and calls anything else an error of parsing. Each is made anew: an
# exception keeps the frames that it was raised in, and with them what had come of the body.


def _too_long(limit_bytes: int) -> HTTPException:
    return HTTPException(413, f"the body is longer than {limit_bytes} bytes, more than this model can need")


def _too_slow() -> HTTPException:
    # The rest of the body is not waited for.
    return HTTPException(408, "the body did not arrive in time; send it without pausing", {"connection": "close"})


def _traced(headers: Headers) -> dict[str, str]:
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
