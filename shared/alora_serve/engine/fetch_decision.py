"""Fetch stored KV or compute it again: whichever has been faster lately."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final, Literal, Protocol

from alora_serve.engine.rates import RecentSpeed

PROBE_SECONDS: Final = 15.0
"""While computing is faster, a fetch is tried this often: a store that recovered would otherwise never be noticed."""

EARLY_PROBE_SECONDS: Final = 5.0
"""How often at first: a store that was slow for a few seconds is in use again within ten."""

EARLY_SECONDS: Final = 30.0
"""How long that is."""

Decision = Literal["fetch", "compute", "probe"]


class FetchMetrics(Protocol):
    """Counts decisions and tells what they are made from; implemented in ``metrics/``."""

    def measured_rates(self, fetch_bytes: Callable[[], float], prefill_tokens: Callable[[], float]) -> None:
        """Whenever asked, from any thread, both tell what was measured lately, a second; 0 before that."""

    def fetch_decision(self, decision: Decision) -> None:
        """``fetch``, ``compute``, or ``probe``: fetched although computing has been faster, to measure again."""


class FetchDecision:
    """Compares seconds: bytes over measured bandwidth against tokens over measured prefill speed. One event loop.

    What has not been measured yet is assumed to favour fetching. While computing is faster there is little to measure,
    so that what each probe finds counts alone: a mean would remember the slow spell for minutes.

    Args:
        bytes_per_token: KV of one token.
        fetched: bandwidth as measured here.
        compute_tokens_per_second: as measured, 0 while unknown.
        always: fetch whatever was measured.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        bytes_per_token: int,
        fetched: RecentSpeed,
        compute_tokens_per_second: Callable[[], float],
        metrics: FetchMetrics,
        *,
        always: bool = False,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._bytes_per_token = bytes_per_token
        self._fetched = fetched
        self._compute_speed = compute_tokens_per_second
        self._metrics = metrics
        self._always = always
        self._clock = clock
        self._slow_since: float | None = None
        self._probed_at = 0.0
        metrics.measured_rates(lambda: fetched.per_second, compute_tokens_per_second)

    def should_fetch(self, tokens: int) -> bool:
        """Whether to ask the store for so many tokens' KV; counted."""
        decision = self._decide(tokens)
        self._metrics.fetch_decision(decision)
        return decision != "compute"

    def measured(self, fetched_bytes: int, seconds: float) -> None:
        """A fetch, probe or not, brought so many bytes in so many seconds."""
        if self._slow_since is not None and fetched_bytes:
            self._fetched.forget()
        self._fetched.observe(fetched_bytes, seconds)

    def _decide(self, tokens: int) -> Decision:
        fetch_speed, compute_speed = self._fetched.per_second, self._compute_speed()
        is_known = not self._always and fetch_speed > 0 and compute_speed > 0
        if not is_known or tokens * self._bytes_per_token / fetch_speed <= tokens / compute_speed:
            self._slow_since = None
            return "fetch"
        now = self._clock()
        if self._slow_since is None:
            self._slow_since = self._probed_at = now
        pause_seconds = EARLY_PROBE_SECONDS if now - self._slow_since <= EARLY_SECONDS else PROBE_SECONDS
        if now - self._probed_at < pause_seconds:
            return "compute"
        self._probed_at = now
        return "probe"
