"""Tasks, calls and certificates."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from alora_serve.metrics import CertificateMetrics, RpcMetrics, TaskMetrics


def test_tasks_are_counted_when_somebody_looks(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    counts = iter((3, 5))
    TaskMetrics(registry).watch(lambda: next(counts))
    assert (value("tasks"), value("tasks")) == (3, 5)


def test_rpcs(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = RpcMetrics(registry)
    metrics.started("/a/B")
    metrics.handled("/a/B", "NOT_FOUND", 0.3)
    assert value("rpc_started_total", method="/a/B") == 1
    assert value("rpc_handled_total", method="/a/B", code="NOT_FOUND") == 1
    assert value("rpc_seconds_sum", method="/a/B") == 0.3


def test_certificates_are_asked_for_when_somebody_looks_and_absent_without_tls(
    registry: CollectorRegistry, value: Callable[..., float | None]
) -> None:
    metrics, expiry = CertificateMetrics(registry), [1e9]
    assert value("certificate_expiry_timestamp_seconds", use="server") is None
    metrics.watch("server", lambda: expiry[0])
    assert value("certificate_expiry_timestamp_seconds", use="server") == 1e9
    expiry[0] = 2e9
    assert value("certificate_expiry_timestamp_seconds", use="server") == 2e9
    assert value("certificate_expiry_timestamp_seconds", use="peer") is None
