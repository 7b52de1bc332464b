"""Spans of requests. They are made inside one that is recorded, and are the API's no-op everywhere else.

Spans carry names, counts, sizes and reasons. Never text, token ids, keys or tenants, and so no exception either: its
message may quote a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer

from alora_serve.telemetry.attributes import Attributes

SCOPE: Final = "alora_serve"


class _Switch:
    """One a process, as the current span is: what is deep inside need not be handed a tracer to have none."""

    tracer: Tracer | None = None


_switch: Final = _Switch()


def tracer() -> Tracer | None:
    """What begins traces; None while nobody wants any."""
    return _switch.tracer


@contextmanager
def spans_by(provider: trace.TracerProvider) -> Iterator[None]:
    """Spans come from this provider while the block runs."""
    before, _switch.tracer = _switch.tracer, provider.get_tracer(SCOPE)
    try:
        yield
    finally:
        _switch.tracer = before


def child_span(
    name: str,
    attributes: Attributes | None = None,
    *,
    parent: Span | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    start_nanoseconds: int | None = None,
) -> Span:
    """A span inside ``parent``, or the current one; the caller ends it. The no-op where that one is not recorded.

    It does not become the current span, so it may live in an asynchronous generator, whose context is its reader's.
    """
    maker = _switch.tracer
    if maker is None:
        return INVALID_SPAN
    parent = parent or trace.get_current_span()
    if not parent.is_recording():
        return INVALID_SPAN
    within = trace.set_span_in_context(parent)
    return maker.start_span(name, within, kind, dict(attributes or {}), start_time=start_nanoseconds)


def current(inner: Span) -> AbstractContextManager[Span]:
    """Makes a span the current one while the block runs, which must not be left by ``yield``.

    The no-op leaves things as they are: peers are to learn that the trace is not recorded, not that there is none.
    """
    if inner is INVALID_SPAN:
        return nullcontext(inner)
    return trace.use_span(inner, record_exception=False, set_status_on_exception=False)


@contextmanager
def span(name: str) -> Iterator[Span]:
    """A child of the current span that is itself current while the block runs. Not for asynchronous generators."""
    inner = child_span(name)
    if not inner.is_recording():
        yield inner
        return
    try:
        with current(inner):
            yield inner
    except Exception as error:
        fail(inner, type(error).__name__)
        raise
    finally:
        inner.end()


def past_span(name: str, began_seconds: float, ended_seconds: float, attributes: Attributes | None = None) -> None:
    """A child of the current span for what is over: between two moments of the monotonic clock."""
    if not is_recorded():
        return
    # Of the wall clock, as far back as the other one says.
    now, now_nanoseconds = time.monotonic(), time.time_ns()
    start, end = (now_nanoseconds - int((now - at) * 1e9) for at in (began_seconds, ended_seconds))
    child_span(name, attributes, start_nanoseconds=start).end(max(start, end))


def is_recorded() -> bool:
    """There is a current span, and what is said of it will be seen."""
    return trace.get_current_span().is_recording()


def note(attributes: Callable[[], Attributes]) -> None:
    """Add to the current span; asked for only where it is recorded."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes(attributes())


def fail(failed: Span, kind: str) -> None:
    """The span's work failed, in this way: a class or a status, no message."""
    failed.set_attribute("error.type", kind)
    failed.set_status(Status(StatusCode.ERROR))
