"""Spans of this very process, kept in memory: for tests of one process's parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from alora_serve.telemetry import spans_by


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded and has ended."""

    provider: TracerProvider
    exporter: InMemorySpanExporter

    def named(self, name: str, kind: str | None = None) -> list[ReadableSpan]:
        """Ended spans whose name ends so, in the order in which they began."""
        found = [
            span
            for span in self.exporter.get_finished_spans()
            if span.name.endswith(name) and kind in (None, span.kind.name.lower())
        ]
        return sorted(found, key=lambda span: span.start_time or 0)

    def one(self, name: str, kind: str | None = None) -> ReadableSpan:
        """The only one of that name."""
        [found] = self.named(name, kind)
        return found

    @property
    def names(self) -> list[str]:
        """Of all, without packages."""
        return [span.name.rpartition("/")[2] for span in self.named("")]


def facts(span: ReadableSpan) -> dict[str, Any]:
    """Its attributes."""
    return dict(span.attributes or {})


def failed(span: ReadableSpan) -> bool:
    """Its status is an error."""
    return span.status.status_code is StatusCode.ERROR


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """One is directly inside the other."""
    return span.parent is not None and span.parent.span_id == parent.context.span_id


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record every span while the block runs."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with spans_by(provider):
        yield Recorded(provider, exporter)
    provider.shutdown()
