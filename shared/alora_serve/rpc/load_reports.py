"""Load reports in trailing metadata (ORCA): Envoy and gRPC's weighted round robin weigh replicas by them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from alora_serve.types import ServingLoad
from alora_serve.v1.load_report_pb2 import LoadReport

LOAD_REPORT_KEY: Final = "endpoint-load-metrics-bin"

RATE_SECONDS: Final = 10.0
"""What happened so long ago counts 1/e in a rate: long enough for slow streams, short enough to follow a burst."""

_OWN_FAILURES: Final = frozenset(
    {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
)
"""Statuses that another replica might have spared the caller."""


class LoadReporter:
    """Makes one service's reports. One event loop.

    A report is what is known at the end of a call: the load of that moment, the call itself included, and the rate of
    calls lately. Both are above 0, without which a report counts for nothing.
    """

    def __init__(self, load: Callable[[], ServingLoad], clock: Callable[[], float] = time.monotonic) -> None:
        """Keep whom to ask.

        Args:
            load: how busy the service is.
            clock: seconds, monotonic.
        """
        self._load = load
        self._calls, self._failures = _Rate(clock), _Rate(clock)

    def __call__(self, code: str) -> tuple[tuple[str, bytes], ...]:
        """Count a call that ends with a gRPC status name; the metadata to send with it."""
        self._calls.add(1)
        self._failures.add(code in _OWN_FAILURES)
        load = self._load()
        # Whatever the figures, the names make its length a multiple of three, which Base64 needs no padding for: gRPC
        # sends none, and Envoy before 1.40 ignores what lacks it.
        report = LoadReport(
            rps_fractional=self._calls.per_second,
            eps=self._failures.per_second,
            application_utilization=(load.requests + 1) / load.max_running,
            named_metrics={
                "num_requests_running": load.running,
                "num_requests_waiting": load.waiting,
                "kv_cache_usage_perc": load.kv_usage,
                "queued_prefill_tokens": load.queued_prefill_tokens,
            },
        )
        return ((LOAD_REPORT_KEY, report.SerializeToString()),)


class _Rate:
    """Events a second, of which each counts less the longer ago it was."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self.per_second = 0.0

    def add(self, events: int) -> None:
        """So many happen now."""
        now = self._clock()
        self.per_second = self.per_second * math.exp((self._at - now) / RATE_SECONDS) + events / RATE_SECONDS
        self._at = now
