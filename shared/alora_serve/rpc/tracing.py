"""Traces across processes: the span of a call that arrives, those of calls made for it, and what tells peers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from opentelemetry import context, trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from alora_serve.errors import AloraServeError
from alora_serve.telemetry import Attributes, child_span, fail, tracer

_W3C: Final = TraceContextTextMapPropagator()
"""``traceparent`` and ``tracestate``. No baggage: whatever clients put there would go on to every service."""

_SERVER_FAULTS: Final = frozenset({"DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE"})
"""Of our statuses those that say that the server failed; all others are the client's doing."""

_HTTP_SERVER_FAULTS: Final = 500
"""The least of the statuses that say so over HTTP."""


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What tells a peer that the current span calls it; nothing outside of one."""
    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return tuple(carrier.items())


def server_span(
    method: str, metadata: Iterable[tuple[str, str | bytes]], request_id: str
) -> AbstractContextManager[Span]:
    """The current span while an arriving call runs: the child of its caller's, if it says so; else a trace begins.

    Untraced here, the caller's own is current: logs name its trace, and it still reaches who is called.

    Args:
        method: ``/package.Service/Method``.
        metadata: the call's.
        request_id: names the call in logs.
    """
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    return _arriving(method.removeprefix("/"), carrier, request_id, _call_attributes(method))


def end_server_span(span: Span, code: str, reason: object = None) -> None:
    """Say how the call ended: with the name of its status, and an error of ours' reason."""
    span.set_attribute("rpc.response.status_code", code)
    if reason is not None:
        span.set_attribute("alora.error.reason", str(reason))
    if code in _SERVER_FAULTS:
        fail(span, code)


def http_server_span(method: str, headers: Mapping[str, str], request_id: str) -> AbstractContextManager[Span]:
    """As :func:`server_span`, for an HTTP request.

    Args:
        method: of HTTP. It names the span until the route is known.
        headers: the request's, names in lower case.
        request_id: names the request in logs.
    """
    return _arriving(method, headers, request_id, {"http.request.method": method})


def end_http_server_span(span: Span, route: str, status: int) -> None:
    """Say how the request ended.

    Args:
        span: of :func:`http_server_span`.
        route: method and path as declared, never as sent: ``POST /v1/models``.
        status: of HTTP.
    """
    span.update_name(route)
    span.set_attribute("http.route", route.partition(" ")[2])
    span.set_attribute("http.response.status_code", status)
    if status >= _HTTP_SERVER_FAULTS:
        fail(span, str(status))


@contextmanager
def client_span(
    method: str, address: str, attributes: Attributes | None = None, *, parent: Span | None = None
) -> Iterator[Span]:
    """The span of a call that is made, around code whose failures are errors of ours. Not current, see ``child_span``.

    Args:
        method: ``/package.Service/Method``.
        address: ``host:port``.
        attributes: what else is known.
        parent: unset, the current span.
    """
    span = child_span(method.removeprefix("/"), parent=parent, kind=SpanKind.CLIENT)
    if not span.is_recording():
        yield span
        return
    host, _, port = address.rpartition(":")
    span.set_attributes({**_call_attributes(method), "server.address": host, **(attributes or {})})
    if port.isdecimal():
        span.set_attribute("server.port", int(port))
    code = "UNKNOWN"
    try:
        yield span
        code = "OK"
    except AloraServeError as error:
        code = error.status
        span.set_attribute("alora.error.reason", error.reason)
        raise
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    finally:
        span.set_attribute("rpc.response.status_code", code)
        if code not in ("OK", "CANCELLED"):
            fail(span, code)
        span.end()


def _call_attributes(method: str) -> Attributes:
    return {"rpc.system.name": "grpc", "rpc.method": method.removeprefix("/")}


@contextmanager
def _arriving(name: str, carrier: Mapping[str, str], request_id: str, attributes: Attributes) -> Iterator[Span]:
    caller, maker = _W3C.extract(carrier), tracer()
    if maker is None:
        token = context.attach(caller)
        try:
            yield INVALID_SPAN
        finally:
            context.detach(token)
        return
    attributes = {**attributes, "alora.request_id": request_id}
    with maker.start_as_current_span(
        name, caller, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        yield span
