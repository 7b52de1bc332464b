"""Fetch stored KV or compute it again: whichever has been faster lately."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final, Literal, Protocol

PROBE_SECONDS: Final = 15.0
"""While computing is faster, a fetch is tried this often: a store that recovered would otherwise never be noticed."""

Decision = Literal["fetch", "compute", "probe"]


class FetchMetrics(Protocol):
    """Counts decisions and tells what they are made from; implemented in ``metrics/``."""

    def measured_rates(self, fetch_bytes: Callable[[], float], prefill_tokens: Callable[[], float]) -> None:
        """Whenever asked, from any thread, both tell what was measured lately, a second; 0 before that."""

    def fetch_decision(self, decision: Decision) -> None:
        """``fetch``, ``compute``, or ``probe``: fetched although computing has been faster, to measure again."""


class FetchDecision:
    """Compares seconds: bytes over measured bandwidth against tokens over measured prefill speed. One event loop.

    What has not been measured yet is assumed to favour fetching.

    Args:
        bytes_per_token: KV of one token.
        fetch_bytes_per_second: as measured, 0 while unknown.
        compute_tokens_per_second: likewise.
        always: fetch whatever was measured.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        bytes_per_token: int,
        fetch_bytes_per_second: Callable[[], float],
        compute_tokens_per_second: Callable[[], float],
        metrics: FetchMetrics,
        *,
        always: bool = False,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._bytes_per_token = bytes_per_token
        self._fetch_speed = fetch_bytes_per_second
        self._compute_speed = compute_tokens_per_second
        self._metrics = metrics
        self._always = always
        self._clock = clock
        self._probed_at = clock()
        metrics.measured_rates(fetch_bytes_per_second, compute_tokens_per_second)

    def should_fetch(self, tokens: int) -> bool:
        """Whether to ask the store for so many tokens' KV; counted."""
        decision = self._decide(tokens)
        self._metrics.fetch_decision(decision)
        return decision != "compute"

    def _decide(self, tokens: int) -> Decision:
        fetch_speed, compute_speed = self._fetch_speed(), self._compute_speed()
        if self._always or not fetch_speed or not compute_speed:
            return "fetch"
        if tokens * self._bytes_per_token / fetch_speed <= tokens / compute_speed:
            return "fetch"
        if self._clock() - self._probed_at >= PROBE_SECONDS:
            self._probed_at = self._clock()
            return "probe"
        return "compute"
