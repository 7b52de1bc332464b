"""Steps, sequences and the memory of KV."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from alora_serve.metrics import EngineMetrics


def test_engine(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = EngineMetrics(registry)
    metrics.step(3, 40, 0.05)
    metrics.load(running=3, waiting=7, tail_bytes=512)
    metrics.prefix_lookup(100, 30, 20)
    metrics.prefix_evicted(2)
    metrics.fetch_decision("compute")
    metrics.prefix_bytes(1 << 20)
    assert value("engine_step_seconds_sum") == 0.05
    assert value("engine_step_sequences_sum") == 3
    assert value("engine_step_tokens_total") == 40
    assert (value("engine_running_sequences"), value("engine_waiting_sequences")) == (3, 7)
    assert value("prefix_lookup_tokens_total", outcome="hit") == 100
    assert value("prefix_lookup_tokens_total", outcome="dropped") == 30
    assert value("prefix_lookup_tokens_total", outcome="miss") == 20
    assert value("prefix_evicted_segments_total") == 2
    assert value("fetch_decisions_total", decision="compute") == 1
    assert value("prefix_bytes") == 1 << 20
    assert value("tail_bytes") == 512


def test_what_would_cost_a_step_is_asked_for_when_somebody_looks(
    registry: CollectorRegistry, value: Callable[..., float | None]
) -> None:
    metrics, tokens = EngineMetrics(registry), [300]
    metrics.queued_prefill_tokens(lambda: tokens[0])
    metrics.prefix_pinned_bytes(lambda: 4096)
    metrics.measured_rates(lambda: 1e9, lambda: 360.0)
    assert value("engine_queued_prefill_tokens") == 300
    tokens[0] = 0
    assert value("engine_queued_prefill_tokens") == 0
    assert value("prefix_pinned_bytes") == 4096
    assert value("measured_fetch_bytes_per_second") == 1e9
    assert value("measured_prefill_tokens_per_second") == 360
