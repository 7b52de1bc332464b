"""What is asked of the KV store, what it is too slow, too full or too far away for, and its circuit breakers."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from alora_serve.metrics.buckets import FAST_SECONDS
from alora_serve.metrics.labels import create_series

StoreOperation = Literal["get", "contains", "put", "delete"]
StoreOutcome = Literal["ok", "unavailable", "timeout", "full", "error", "caller"]
MissReason = Literal["absent", "corrupt", "version", "timeout", "unavailable"]
DropReason = Literal["full", "timeout", "unavailable", "backlog", "quota"]
BreakerDirection = Literal["read", "write"]
BreakerStateName = Literal["closed", "open", "half_open"]


class StoreMetrics:
    """What the store's wrappers and the block store report."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._operations = Counter(
            "alora_store_operations_total", "Store calls.", ["operation", "outcome"], registry=registry
        )
        self._bytes = Counter("alora_store_bytes_total", "Bytes moved.", ["operation"], registry=registry)
        self._seconds = Histogram(
            "alora_store_operation_seconds", "Store calls.", ["operation"], buckets=FAST_SECONDS, registry=registry
        )
        self._misses = Counter(
            "alora_store_miss_blocks_total", "Blocks not had from the store.", ["reason"], registry=registry
        )
        self._drops = Counter(
            "alora_store_drop_blocks_total", "Blocks not written to the store.", ["reason"], registry=registry
        )
        self._breaker = Gauge(
            "alora_store_breaker_state", "1 for the state it is in.", ["direction", "state"], registry=registry
        )
        self._retry = Gauge(
            "alora_store_breaker_retry_seconds", "Until it lets a probe through.", ["direction"], registry=registry
        )
        create_series(self._operations, get_args(StoreOperation), get_args(StoreOutcome))
        for by_operation in (self._bytes, self._seconds):
            create_series(by_operation, get_args(StoreOperation))
        create_series(self._misses, get_args(MissReason))
        create_series(self._drops, get_args(DropReason))
        create_series(self._retry, get_args(BreakerDirection))
        for direction in get_args(BreakerDirection):
            self._set_breaker(direction, "closed")

    def observe(self, operation: StoreOperation, outcome: StoreOutcome, seconds: float, bytes_moved: int) -> None:
        """One call of the store."""
        self._operations.labels(operation, outcome).inc()
        self._seconds.labels(operation).observe(seconds)
        self._bytes.labels(operation).inc(bytes_moved)

    def breaker_state(self, direction: BreakerDirection, state: enum.Enum) -> None:
        """The circuit breaker of that direction is in this state now."""
        self._set_breaker(direction, str(state.value))

    def breaker_retry(self, direction: BreakerDirection, seconds: Callable[[], float]) -> None:
        """Ask there how long the circuit breaker of that direction stays open."""
        self._retry.labels(direction).set_function(seconds)

    def _set_breaker(self, direction: BreakerDirection, state: str) -> None:
        for name in get_args(BreakerStateName):
            self._breaker.labels(direction, name).set(name == state)

    def store_miss(self, reason: MissReason, blocks: int) -> None:
        """Blocks not had from the store."""
        self._misses.labels(reason).inc(blocks)

    def store_drop(self, reason: DropReason, blocks: int) -> None:
        """Blocks not written to the store."""
        self._drops.labels(reason).inc(blocks)
