"""Sends spans to the OTLP collector that the standard ``OTEL_*`` variables name. The only file that loads the SDK."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Final

import structlog

from alora_serve.errors import ConfigError
from alora_serve.telemetry.spans import spans_by

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

FLUSH_SECONDS: Final = 3.0
"""Longest that the end of a process waits for a collector to take the last spans."""

_EXPORTERS: Final = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

_log = structlog.stdlib.get_logger(__name__)


@contextmanager
def tracing(service: str) -> Iterator[None]:
    """Requests are traced while the block runs, if the environment names a collector; the last spans leave at its end.

    Read are ``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``, without which there are no
    traces, and all that the SDK and its exporter read. Spans wait in a bounded queue for a thread that sends them: what
    it cannot send in time is dropped, and no request ever waits for it. A variable whose value is not served costs the
    traces, which is logged, and not the service: operators of a cluster set such variables for all that runs there.

    Args:
        service: ``service.name``, unless the environment says otherwise.
    """
    provider = _provider(service)
    if provider is None:
        yield
        return
    try:
        with spans_by(provider):
            yield
    finally:
        _close(provider)


def _provider(service: str) -> TracerProvider | None:
    """None: traces are not wanted, or cannot be sent as the environment says."""
    try:
        return _open_provider(service) if _is_wanted() else None
    except ConfigError as error:
        _log.error("no traces", problem=str(error))
        return None


def _is_wanted() -> bool:
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if not endpoint or is_disabled or exporter == "none":
        return False
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER={exporter}: traces leave by otlp, or not at all (none)")
    return True


def _open_provider(service: str) -> TracerProvider:
    # Here, so that a process without traces does not even load it.
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = Resource.create({"service.name": service, "service.version": version("alora-serve")})
    # The environment's own attributes once more: they count more than ours.
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    open_exporter = _find_exporter()
    try:
        provider.add_span_processor(BatchSpanProcessor(open_exporter()))
    except Exception as error:  # exporters have classes of their own for this
        raise ConfigError(f"an OTEL_* variable does not fit: {error}") from error
    return provider


def _find_exporter() -> Callable[[], SpanExporter]:
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((value for name in names if (value := os.environ.get(name, "").strip())), "grpc")
    if protocol not in _EXPORTERS:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: set it to one of {', '.join(_EXPORTERS)}")
    found = entry_points(group="opentelemetry_traces_exporter", name=_EXPORTERS[protocol])
    if not found:
        package = f"opentelemetry-exporter-{_EXPORTERS[protocol].replace('_', '-')}"
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} needs the package {package}: set it to grpc, and the endpoint to "
            "the collector's port for that (4317), or install the package"
        )
    exporter: Callable[[], SpanExporter] = next(iter(found)).load()
    return exporter


def _close(provider: TracerProvider) -> None:
    """Send what is left, within :data:`FLUSH_SECONDS`; the SDK itself would wait for half a minute."""
    closing = threading.Thread(target=provider.shutdown, name="flush-traces", daemon=True)
    closing.start()
    closing.join(FLUSH_SECONDS)
    if closing.is_alive():
        _log.warning("last spans not sent", waited_seconds=FLUSH_SECONDS)
