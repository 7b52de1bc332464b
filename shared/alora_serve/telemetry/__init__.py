"""Traces of requests, by OpenTelemetry: off, and then nothing but no-ops, unless the environment says where they go."""

from alora_serve.telemetry.attributes import (
    Attributes,
    answer_attributes,
    counts,
    request_attributes,
    started_attributes,
    usage_attributes,
)
from alora_serve.telemetry.export import tracing
from alora_serve.telemetry.spans import (
    child_span,
    current,
    fail,
    is_recorded,
    note,
    past_span,
    span,
    spans_by,
    tracer,
)

__all__ = [
    "Attributes",
    "answer_attributes",
    "child_span",
    "counts",
    "current",
    "fail",
    "is_recorded",
    "note",
    "past_span",
    "request_attributes",
    "span",
    "spans_by",
    "started_attributes",
    "tracer",
    "tracing",
    "usage_attributes",
]
