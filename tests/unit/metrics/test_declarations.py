"""What is recorded shows under the promised names, units and labels, in the registry that was given and no other."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from alora_serve.metrics import (
    AdapterMetrics,
    CoreMetrics,
    EngineMetrics,
    LabelCap,
    RequestMetrics,
    RouterMetrics,
    RpcMetrics,
    StoreMetrics,
    TaskMetrics,
    service_registry,
)
from alora_serve.types import Timings, Usage

ALL: tuple[type[Any], ...] = (
    RpcMetrics,
    StoreMetrics,
    EngineMetrics,
    AdapterMetrics,
    RequestMetrics,
    RouterMetrics,
    TaskMetrics,
)
COUNTED_THINGS = "_tasks", "_seconds", "_sequences", "_tokens", "_endpoints", "_in_flight", "_resident", "_state"


class State(enum.Enum):
    """As a circuit breaker reports."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def value(registry: CollectorRegistry) -> Callable[..., float | None]:
    """Reads a sample by name and labels."""

    def read(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"alora_{name}", labels)

    return read


def test_names_say_whose_they_are_and_in_which_unit(registry: CollectorRegistry) -> None:
    for metrics in ALL:
        metrics(registry)
    seen: list[str] = []
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        seen.append(name)
        assert re.fullmatch(r"alora_[a-z_]+", name)
        assert family.documentation.endswith(".")
        if family.type == "gauge":
            assert not name.endswith("_total")
            assert name.endswith(("_bytes", *COUNTED_THINGS)), name
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_sequences")), name
    assert len(seen) == len(set(seen)) > len(ALL)


def test_two_processes_worth_of_metrics_live_in_one_interpreter() -> None:
    before = {family.name for family in REGISTRY.collect()}
    for metrics in ALL:
        metrics(CollectorRegistry())
        metrics(CollectorRegistry())
    assert {family.name for family in REGISTRY.collect()} == before, "the global registry is nobody's"


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


def test_store(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = StoreMetrics(registry)
    metrics.observe("get", "ok", 0.002, 4096)
    metrics.store_miss("corrupt", 2)
    metrics.store_drop("full", 3)
    assert value("store_operations_total", operation="get", outcome="ok") == 1
    assert value("store_bytes_total", operation="get") == 4096
    assert value("store_operation_seconds_sum", operation="get") == 0.002
    assert value("store_miss_blocks_total", reason="corrupt") == 2
    assert value("store_drop_blocks_total", reason="full") == 3
    metrics.breaker_retry("read", lambda: 2.5)
    assert value("store_breaker_retry_seconds", direction="read") == 2.5


@pytest.mark.parametrize("state", State)
def test_a_breaker_is_in_exactly_one_state(
    registry: CollectorRegistry, value: Callable[..., float | None], state: State
) -> None:
    metrics = StoreMetrics(registry)
    metrics.breaker_state("read", state)
    states = {other: value("store_breaker_state", direction="read", state=other.value) for other in State}
    assert states == {other: float(other is state) for other in State}
    assert value("store_breaker_state", direction="write", state="closed") == 1, "closed until it says otherwise"


def test_engine(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = EngineMetrics(registry)
    metrics.step(3, 40, 0.05)
    metrics.load(running=3, waiting=7, tail_bytes=512)
    metrics.prefix_lookup(100, 20)
    metrics.prefix_evicted(2)
    metrics.fetch_decision("compute")
    metrics.prefix_bytes(1 << 20)
    assert value("engine_step_seconds_sum") == 0.05
    assert value("engine_step_sequences_sum") == 3
    assert value("engine_step_tokens_total") == 40
    assert (value("engine_running_sequences"), value("engine_waiting_sequences")) == (3, 7)
    assert value("prefix_lookup_tokens_total", outcome="hit") == 100
    assert value("prefix_lookup_tokens_total", outcome="miss") == 20
    assert value("prefix_evicted_segments_total") == 2
    assert value("fetch_decisions_total", decision="compute") == 1
    assert value("prefix_bytes") == 1 << 20
    assert value("tail_bytes") == 512


def test_adapters_in_memory_are_those_loaded_and_not_dropped(
    registry: CollectorRegistry, value: Callable[..., float | None]
) -> None:
    metrics = AdapterMetrics(registry)
    for kind, size_bytes in (("load", 10), ("load", 5), ("hit", 10), ("refuse", 0), ("drop", 10)):
        metrics.event(kind, size_bytes, 0.5)
    assert (value("adapters_resident"), value("adapter_resident_bytes")) == (1, 5)
    assert value("adapter_events_total", event="load") == 2
    assert value("adapter_events_total", event="refuse") == 1
    assert value("adapter_load_seconds_count") == 2


def test_requests(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = RequestMetrics(registry)
    usage = Usage(
        cached_tokens=10, fetched_tokens=8, computed_tokens=4, generated_tokens=5, fetched_bytes=80, stored_bytes=40
    )
    metrics.record(
        usage,
        Timings(queue_seconds=1, fetch_seconds=2, prefill_seconds=3, first_token_seconds=6, decode_seconds=8),
    )
    assert value("time_to_first_token_seconds_count") == 0, "it was told when the token passed, or there was none"
    metrics.first_token(6)
    tokens = {source: value("tokens_total", source=source) for source in ("cached", "fetched", "computed", "generated")}
    assert tokens == {"cached": 10, "fetched": 8, "computed": 4, "generated": 5}
    assert (value("fetched_bytes_total"), value("stored_bytes_total")) == (80, 40)
    phases = [value("request_phase_seconds_sum", phase=phase) for phase in ("queue", "fetch", "prefill", "decode")]
    assert phases == [1, 2, 3, 8]
    assert value("time_to_first_token_seconds_sum") == 6
    assert value("inter_token_seconds_sum") == 2, "five tokens have four gaps"


@pytest.mark.parametrize(("generated", "between"), [(0, 0), (1, 0), (2, 1)])
def test_times_between_tokens_that_were_not_generated_are_not_recorded(
    registry: CollectorRegistry, value: Callable[..., float | None], generated: int, between: int
) -> None:
    RequestMetrics(registry).record(Usage(generated_tokens=generated), Timings())
    assert value("inter_token_seconds_count") == between


def test_router(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = RouterMetrics(registry)
    metrics.picked("decode", "prefix")
    metrics.predicted("decode", 0.5, 0.75)
    metrics.predicted("decode", 0.5, 0.25)
    metrics.predicted("decode", 0.5, 0.5)
    metrics.retried("decode")
    metrics.endpoints("decode", "healthy", 2)
    metrics.in_flight(4)
    metrics.requested("certainty")
    metrics.requested("")
    assert value("router_picks_total", role="decode", reason="prefix") == 1
    assert value("router_prediction_error_seconds_sum", role="decode", direction="late") == 0.25
    assert value("router_prediction_error_seconds_count", role="decode", direction="early") == 2
    assert value("router_retries_total", role="decode") == 1
    assert value("router_endpoints", role="decode", state="healthy") == 2
    assert value("router_in_flight") == 4
    assert value("router_requests_total", adapter="certainty") == 1
    assert value("router_requests_total", adapter="base") == 1


def test_labels_that_people_choose_are_bounded(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    cap = LabelCap(2)
    assert [cap(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]
    metrics = RouterMetrics(registry)
    for index in range(1000):
        metrics.requested(f"adapter-{index}")
    assert value("router_requests_total", adapter="other") == 800


def test_a_model_service_reports_store_and_engine_through_one_object(
    registry: CollectorRegistry, value: Callable[..., float | None]
) -> None:
    metrics = CoreMetrics(registry)
    metrics.store_miss("absent", 1)
    metrics.load(1, 0, 0)
    assert value("store_miss_blocks_total", reason="absent") == 1
    assert value("engine_running_sequences") == 1


def test_a_services_registry_holds_the_process_metrics() -> None:
    names = {metric.name for metric in service_registry().collect()}
    assert {"python_info", "python_gc_objects_collected"} <= names
