"""What the HTTP front door reports of the requests it answers; their tokens and phases are the router's to report."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from alora_serve.metrics.buckets import REQUEST_SECONDS


class HttpMetrics:
    """Labels are routes as declared, never paths as sent."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._handled = Counter(
            "alora_http_requests_total", "HTTP requests ended.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "alora_http_request_seconds",
            "HTTP requests from their head to the last byte of their answer.",
            ["route"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge("alora_http_in_flight", "HTTP requests running now.", registry=registry)

    def started(self) -> None:
        """A request began."""
        self._in_flight.inc()

    def handled(self, route: str, status: int, seconds: float) -> None:
        """It ended, with this HTTP status; 499 where the client left before there was any."""
        self._in_flight.dec()
        self._handled.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
