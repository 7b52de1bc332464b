"""Where the router sends requests, why, and what it had to do twice."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from alora_serve.metrics.buckets import FAST_SECONDS
from alora_serve.metrics.labels import LabelCap, create_series

EndpointRole = Literal["base_prefill", "adapter_decode"]
EndpointState = Literal["healthy", "draining", "down"]
PickReason = Literal["prefix", "adapter", "load", "affinity", "fan_out", "only"]
ErrorDirection = Literal["late", "early"]


class RouterMetrics:
    """What the router reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._picks = Counter("alora_router_picks_total", "Endpoints picked.", ["role", "reason"], registry=registry)
        self._retries = Counter("alora_router_retries_total", "Attempts after the first.", ["role"], registry=registry)
        self._resumes = Counter(
            "alora_router_resumed_streams_total", "Streams that went on from the middle.", ["role"], registry=registry
        )
        # No series before such endpoints are looked for: 0 healthy ones is an alert, and some look for none.
        self._endpoints = Gauge("alora_router_endpoints", "Endpoints by state.", ["role", "state"], registry=registry)
        self._workers_prefill = Gauge(
            "alora_router_workers_prefill", "1 where workers prefill while no base prefill can.", registry=registry
        )
        self._in_flight = Gauge("alora_router_in_flight", "Requests in the router.", registry=registry)
        self._requests = Counter("alora_router_requests_total", "Requests by adapter.", ["adapter"], registry=registry)
        self._errors = Histogram(
            "alora_router_prediction_error_seconds",
            "How far first tokens were from their prediction.",
            ["role", "direction"],
            buckets=FAST_SECONDS,
            registry=registry,
        )
        self._cap = LabelCap("other")
        roles = get_args(EndpointRole)
        create_series(self._picks, roles, get_args(PickReason))
        create_series(self._errors, roles, get_args(ErrorDirection))
        for by_role in (self._retries, self._resumes):
            create_series(by_role, roles)

    def picked(self, role: EndpointRole, reason: PickReason) -> None:
        """An endpoint was picked, for one of the reasons of the router's policy."""
        self._picks.labels(role, reason).inc()

    def predicted(self, role: EndpointRole, predicted_seconds: float, actual_seconds: float) -> None:
        """A first token was predicted after one time and came after another."""
        error = actual_seconds - predicted_seconds
        self._errors.labels(role, "late" if error > 0 else "early").observe(abs(error))

    def resumed(self, role: EndpointRole) -> None:
        """A stream goes on elsewhere from the tokens delivered."""
        self._resumes.labels(role).inc()

    def retried(self, role: EndpointRole) -> None:
        """A request is tried again elsewhere."""
        self._retries.labels(role).inc()

    def endpoints(self, role: EndpointRole, state: EndpointState, count: int) -> None:
        """So many endpoints are in this state."""
        self._endpoints.labels(role, state).set(count)

    def workers_prefill(self, allowed: bool) -> None:
        """Whether decode workers stand in for base prefill: its loss is then no outage."""
        self._workers_prefill.set(allowed)

    def in_flight(self, count: int) -> None:
        """Requests in the router now."""
        self._in_flight.set(count)

    def requested(self, adapter: str) -> None:
        """A request names an adapter, or none."""
        self._requests.labels(self._cap(adapter or "base")).inc()
