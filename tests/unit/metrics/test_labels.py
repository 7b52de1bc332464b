"""Labels whose values people choose are bounded."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from alora_serve.metrics import RouterMetrics
from alora_serve.metrics.labels import LabelCap


def test_labels_that_people_choose_are_bounded(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    cap = LabelCap("other", 2)
    assert [cap(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]
    metrics = RouterMetrics(registry)
    for index in range(1000):
        metrics.requested(f"adapter-{index}")
    assert value("router_requests_total", adapter="other") == 800
