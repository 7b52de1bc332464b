"""Picks, predictions, attempts and endpoints."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from alora_serve.metrics import RouterMetrics


def test_router(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics, decode = RouterMetrics(registry), "adapter_decode"
    metrics.picked(decode, "prefix")
    metrics.predicted(decode, 0.5, 0.75)
    metrics.predicted(decode, 0.5, 0.25)
    metrics.predicted(decode, 0.5, 0.5)
    metrics.retried(decode)
    metrics.resumed(decode)
    metrics.endpoints(decode, "healthy", 2)
    metrics.in_flight(4)
    metrics.workers_prefill(True)
    metrics.requested("certainty")
    metrics.requested("")
    assert value("router_picks_total", role=decode, reason="prefix") == 1
    assert value("router_prediction_error_seconds_sum", role=decode, direction="late") == 0.25
    assert value("router_prediction_error_seconds_count", role=decode, direction="early") == 2
    assert value("router_retries_total", role=decode) == 1
    assert value("router_resumed_streams_total", role=decode) == 1
    assert value("router_endpoints", role=decode, state="healthy") == 2
    assert value("router_in_flight") == 4
    assert value("router_workers_prefill") == 1
    assert value("router_requests_total", adapter="certainty") == 1
    assert value("router_requests_total", adapter="base") == 1
