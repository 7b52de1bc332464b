"""Store calls, misses, drops and breakers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from alora_serve.kv.guarded import BreakerState
from alora_serve.metrics import StoreMetrics


def test_store(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = StoreMetrics(registry)
    metrics.observe("get", "ok", 0.002, 4096)
    metrics.store_miss("corrupt", 2)
    metrics.store_drop("quota", 3)
    assert value("store_operations_total", operation="get", outcome="ok") == 1
    assert value("store_bytes_total", operation="get") == 4096
    assert value("store_operation_seconds_sum", operation="get") == 0.002
    assert value("store_miss_blocks_total", reason="corrupt") == 2
    assert value("store_drop_blocks_total", reason="quota") == 3
    metrics.breaker_retry("read", lambda: 2.5)
    assert value("store_breaker_retry_seconds", direction="read") == 2.5


@pytest.mark.parametrize("state", BreakerState)
def test_a_breaker_is_in_exactly_one_state(
    registry: CollectorRegistry, value: Callable[..., float | None], state: BreakerState
) -> None:
    metrics = StoreMetrics(registry)
    metrics.breaker_state("read", state)
    states = {other: value("store_breaker_state", direction="read", state=other.value) for other in BreakerState}
    assert states == {other: float(other is state) for other in BreakerState}
    assert value("store_breaker_state", direction="write", state="closed") == 1, "closed until it says otherwise"
