"""A real OTLP collector: a gRPC server that keeps the spans which services send to its socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class CollectedSpan:
    """A span as it arrived. ``parent_id`` is empty at a root."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    failed: bool
    began_nanoseconds: int
    ended_nanoseconds: int
    attributes: Mapping[str, Any]
    num_events: int


class Trace:
    """The spans of one trace, by name and by who is whose child."""

    def __init__(self, spans: Iterable[CollectedSpan]) -> None:
        self.spans = sorted(spans, key=lambda span: span.began_nanoseconds)
        self._by_id = {span.span_id: span for span in self.spans}

    def named(self, name: str, kind: str | None = None) -> list[CollectedSpan]:
        """Those whose name ends so, the earliest first."""
        return [span for span in self.spans if span.name.endswith(name) and kind in (None, span.kind)]

    def one(self, name: str, kind: str | None = None) -> CollectedSpan:
        """The only one of that name."""
        [found] = self.named(name, kind)
        return found

    def parent(self, span: CollectedSpan) -> CollectedSpan | None:
        """None where it is not in this trace: the caller's own, or none."""
        return self._by_id.get(span.parent_id)

    def children(self, span: CollectedSpan) -> list[CollectedSpan]:
        """The earliest first."""
        return [child for child in self.spans if child.parent_id == span.span_id]

    def path(self, span: CollectedSpan) -> list[str]:
        """Names from the trace's root to this span, services and packages left out."""
        above = self.parent(span)
        return [*(self.path(above) if above else []), f"{span.kind} {span.name.rpartition('/')[2]}"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets.

    Attributes:
        address: where it listens.
        raw: every request as bytes.
    """

    def __init__(self) -> None:
        self.address = ""
        self.raw: list[bytes] = []
        self._spans: list[CollectedSpan] = []
        self._more = Condition()

    def Export(  # noqa: N802  # named by the proto
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._more:
            self.raw.append(request.SerializeToString())
            self._spans += _spans(request)
            self._more.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[CollectedSpan]:
        """All so far."""
        with self._more:
            return list(self._spans)

    def wait_for(self, trace_id: str, complete: Callable[[Trace], bool]) -> Trace:
        """The trace, once it is complete: services send their spans one by one."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._more:
            while True:
                found = Trace(span for span in self._spans if span.trace_id == trace_id)
                if complete(found):
                    return found
                if not self._more.wait(deadline - time.monotonic()):
                    raise AssertionError(f"of {trace_id} there came only {[span.name for span in found.spans]}")


@contextmanager
def collector(address: str = "127.0.0.1:0") -> Iterator[Collector]:
    """A running collector."""
    collecting = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collecting, server)
    collecting.address = f"{address.rpartition(':')[0]}:{server.add_insecure_port(address)}"
    server.start()
    try:
        yield collecting
    finally:
        server.stop(None)


def _spans(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[CollectedSpan]:
    for of_resource in request.resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        for scope in of_resource.scope_spans:
            for span in scope.spans:
                yield CollectedSpan(
                    service=resource["service.name"],
                    instance=resource["service.instance.id"],
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    began_nanoseconds=span.start_time_unix_nano,
                    ended_nanoseconds=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    num_events=len(span.events),
                )


def _attributes(listed: Iterable[Any]) -> dict[str, Any]:
    return {entry.key: _value(entry.value) for entry in listed}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    return getattr(value, kind)
