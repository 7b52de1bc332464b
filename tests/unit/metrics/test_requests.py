"""Tokens, bytes and seconds of requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from alora_serve.metrics import RequestMetrics
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
    assert value("inter_token_seconds_sum") == 2, "five tokens have four gaps"


@pytest.mark.parametrize(("generated", "between"), [(0, 0), (1, 0), (2, 1)])
def test_times_between_tokens_that_were_not_generated_are_not_recorded(
    registry: CollectorRegistry, value: Callable[..., float | None], generated: int, between: int
) -> None:
    RequestMetrics(registry).record(Usage(generated_tokens=generated), Timings())
    assert value("inter_token_seconds_count") == between
