"""Where requests' tokens and time went."""

from __future__ import annotations

from time import monotonic
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from alora_serve.metrics.buckets import REQUEST_SECONDS, TOKEN_SECONDS
from alora_serve.metrics.labels import create_series
from alora_serve.types import Timings, Usage

TOKEN_SOURCES: Final = ("cached", "fetched", "computed", "generated")
REQUEST_PHASES: Final = ("queue", "fetch", "prefill", "decode")


class RequestMetrics:
    """Reported by whoever passes a request's events on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter("alora_tokens_total", "Tokens by where they came from.", ["source"], registry=registry)
        self._phases = Histogram(
            "alora_request_phase_seconds", "Parts of requests.", ["phase"], buckets=REQUEST_SECONDS, registry=registry
        )
        self._first_token = Histogram(
            "alora_time_to_first_token_seconds", "Arrival to first token.", buckets=REQUEST_SECONDS, registry=registry
        )
        self._inter_token = Histogram(
            "alora_inter_token_seconds", "From one token to the next.", buckets=TOKEN_SECONDS, registry=registry
        )
        self._fetched = Counter("alora_fetched_bytes_total", "KV read for requests.", registry=registry)
        self._stored = Counter("alora_stored_bytes_total", "KV written for requests.", registry=registry)
        create_series(self._tokens, TOKEN_SOURCES)
        create_series(self._phases, REQUEST_PHASES)

    def first_token(self, seconds: float) -> None:
        """A first token passes, so long after the request came: told at once, whatever becomes of the request."""
        self._first_token.observe(seconds)

    def more_tokens(self, count: int, seconds: float) -> None:
        """So many tokens pass together, so long after the one before them, which each is a part of the way from."""
        for _ in range(count):
            self._inter_token.observe(seconds / count)

    def record(self, usage: Usage, timings: Timings) -> None:
        """Count a finished request's tokens, bytes and seconds. ``fetched`` tokens are part of the ``cached`` ones."""
        for source in TOKEN_SOURCES:
            self._tokens.labels(source).inc(getattr(usage, f"{source}_tokens"))
        self._fetched.inc(usage.fetched_bytes)
        self._stored.inc(usage.stored_bytes)
        for phase in REQUEST_PHASES:
            self._phases.labels(phase).observe(getattr(timings, f"{phase}_seconds"))


class TokenTimes:
    """When the tokens of one stream pass, cancelled or not: a stall in its middle is seen as one.

    Attributes:
        first_seconds: from the request's arrival to its first token; None before it.
    """

    def __init__(self, metrics: RequestMetrics, arrived: float) -> None:
        """``arrived`` is when the request came, by :func:`time.monotonic`."""
        self.first_seconds: float | None = None
        self._metrics = metrics
        self._last = arrived

    def passed(self, count: int) -> None:
        """So many tokens pass now, together."""
        if not count:
            return
        since, self._last = self._last, monotonic()
        seconds = self._last - since
        if self.first_seconds is None:
            self.first_seconds = seconds
            self._metrics.first_token(seconds)
        else:
            self._metrics.more_tokens(count, seconds)
