"""What every service tells of its process: memory, tasks, calls, and how long its certificates last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from alora_serve.metrics.buckets import REQUEST_SECONDS

CertificateUse = Literal["server", "peer", "store"]
"""What a certificate is shown for: to whoever calls the service, to the services it calls, or to the store."""


def service_registry() -> CollectorRegistry:
    """A registry with the process's own metrics (memory, file descriptors, garbage collection)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class TaskMetrics:
    """How many asyncio tasks the process has: what is forgotten shows there first."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tasks = Gauge("alora_tasks", "asyncio tasks of the process.", registry=registry)

    def watch(self, count: Callable[[], int]) -> None:
        """Ask there whenever somebody looks."""
        self._tasks.set_function(count)


class CertificateMetrics:
    """Until when the process's certificates are valid. None without TLS."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._expiry = Gauge(
            "alora_certificate_expiry_timestamp_seconds",
            "Unix time at which the certificate in use expires.",
            ["use"],
            registry=registry,
        )

    def watch(self, use: CertificateUse, expires_at: Callable[[], float]) -> None:
        """Ask there, for seconds since the epoch, whenever somebody looks."""
        self._expiry.labels(use).set_function(expires_at)


class RpcMetrics:
    """What the server interceptors report."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("alora_rpc_started_total", "RPCs begun.", ["method"], registry=registry)
        self._handled = Counter("alora_rpc_handled_total", "RPCs ended.", ["method", "code"], registry=registry)
        self._seconds = Histogram(
            "alora_rpc_seconds", "Duration of RPCs.", ["method"], buckets=REQUEST_SECONDS, registry=registry
        )

    def started(self, method: str) -> None:
        """An RPC began."""
        self._started.labels(method).inc()

    def handled(self, method: str, code: str, seconds: float) -> None:
        """An RPC ended with a gRPC status name."""
        self._handled.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)
