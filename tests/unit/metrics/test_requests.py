"""Tokens, bytes and seconds of requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from alora_serve.metrics import RequestMetrics, TokenTimes
from alora_serve.types import Timings, Usage


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


def test_every_gap_between_tokens_is_told_as_it_passes(
    registry: CollectorRegistry, value: Callable[..., float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((103.0, 104.0, 112.0))
    monkeypatch.setattr("alora_serve.metrics.requests.monotonic", lambda: next(clock))
    times = TokenTimes(RequestMetrics(registry), arrived=100.0)
    assert times.first_seconds is None
    times.passed(2)
    assert times.first_seconds == 3
    assert value("time_to_first_token_seconds_sum") == 3
    assert value("inter_token_seconds_count") == 0, "the first two came together"
    times.passed(1)
    times.passed(0)
    times.passed(4)
    assert (value("inter_token_seconds_count"), value("inter_token_seconds_sum")) == (5, 9)
    assert value("inter_token_seconds_bucket", le="1.0") == 1, "the stall is seen"
    assert value("time_to_first_token_seconds_count") == 1
