"""Every Prometheus metric, declared in one place. Algorithms report through small Protocols that these classes meet.

Names begin with ``alora_``; counters end in ``_total``, durations in ``_seconds``, sizes in ``_bytes``. Only counters,
histograms and gauges of a current state: rates and means are for PromQL.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from alora_serve.types import Timings, Usage

FAST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Store calls, fetches and engine steps."""
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0, 300.0)
"""Times to a token and whole requests."""
MAX_LABEL_VALUES = 200
"""Distinct adapters a label may name; later ones count as ``other``."""

BREAKER_STATES = ("closed", "open", "half_open")


def service_registry() -> CollectorRegistry:
    """A registry with the process's own metrics (memory, file descriptors, garbage collection)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class TaskMetrics:
    """How many asyncio tasks the process has: what is forgotten shows there first."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tasks = Gauge("alora_tasks", "asyncio tasks of the process.", registry=registry)

    def watch(self, count: Callable[[], int]) -> None:
        """Ask there whenever somebody looks."""
        self._tasks.set_function(count)


class LabelCap:
    """Bounds the values of a label that people choose."""

    def __init__(self, limit: int = MAX_LABEL_VALUES) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """``value``, or ``other`` once the limit of distinct values is reached."""
        if value in self._seen or len(self._seen) < self._limit:
            self._seen.add(value)
            return value
        return "other"


class RpcMetrics:
    """What the server interceptors report."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("alora_rpc_started_total", "RPCs begun.", ["method"], registry=registry)
        self._handled = Counter("alora_rpc_handled_total", "RPCs ended.", ["method", "code"], registry=registry)
        self._seconds = Histogram(
            "alora_rpc_seconds", "Duration of RPCs.", ["method"], buckets=REQUEST_SECONDS, registry=registry
        )

    def started(self, method: str) -> None:
        """An RPC began."""
        self._started.labels(method).inc()

    def handled(self, method: str, code: str, seconds: float) -> None:
        """An RPC ended with a gRPC status name."""
        self._handled.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)


class StoreMetrics:
    """What the store's wrappers and the block store report."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._operations = Counter(
            "alora_store_operations_total", "Store calls.", ["operation", "outcome"], registry=registry
        )
        self._bytes = Counter("alora_store_bytes_total", "Bytes moved.", ["operation"], registry=registry)
        self._seconds = Histogram(
            "alora_store_operation_seconds", "Store calls.", ["operation"], buckets=FAST_SECONDS, registry=registry
        )
        self._misses = Counter(
            "alora_store_miss_blocks_total", "Blocks not had from the store.", ["reason"], registry=registry
        )
        self._drops = Counter(
            "alora_store_drop_blocks_total", "Blocks not written to the store.", ["reason"], registry=registry
        )
        self._breaker = Gauge(
            "alora_store_breaker_state", "1 for the state it is in.", ["direction", "state"], registry=registry
        )
        for direction in ("read", "write"):
            self._set_breaker(direction, "closed")
        self._retry = Gauge(
            "alora_store_breaker_retry_seconds", "Until it lets a probe through.", ["direction"], registry=registry
        )

    def observe(self, operation: str, outcome: str, seconds: float, bytes_moved: int) -> None:
        """One call of the store."""
        self._operations.labels(operation, outcome).inc()
        self._seconds.labels(operation).observe(seconds)
        self._bytes.labels(operation).inc(bytes_moved)

    def breaker_state(self, direction: str, state: enum.Enum) -> None:
        """The circuit breaker of ``read`` or ``write`` is in this state now."""
        self._set_breaker(direction, str(state.value))

    def breaker_retry(self, direction: str, seconds: Callable[[], float]) -> None:
        """Ask there how long the circuit breaker of ``read`` or ``write`` stays open."""
        self._retry.labels(direction).set_function(seconds)

    def _set_breaker(self, direction: str, state: str) -> None:
        for name in BREAKER_STATES:
            self._breaker.labels(direction, name).set(name == state)

    def store_miss(self, reason: str, blocks: int) -> None:
        """Blocks not had from the store."""
        self._misses.labels(reason).inc(blocks)

    def store_drop(self, reason: str, blocks: int) -> None:
        """Blocks not written to the store."""
        self._drops.labels(reason).inc(blocks)


class EngineMetrics:
    """What engine, resident prefixes and adapters report."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._step_seconds = Histogram(
            "alora_engine_step_seconds", "Forward passes.", buckets=FAST_SECONDS, registry=registry
        )
        self._step_sequences = Histogram(
            "alora_engine_step_sequences", "Sequences a step.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self._step_tokens = Counter("alora_engine_step_tokens_total", "Tokens run.", registry=registry)
        self._running = Gauge("alora_engine_running_sequences", "Sequences in the batch.", registry=registry)
        self._waiting = Gauge("alora_engine_waiting_sequences", "Sequences without a place.", registry=registry)
        self._prefix_tokens = Counter(
            "alora_prefix_lookup_tokens_total", "Tokens looked up in memory.", ["outcome"], registry=registry
        )
        self._evicted = Counter("alora_prefix_evicted_segments_total", "Segments dropped.", registry=registry)
        self._prefix_bytes = Gauge("alora_prefix_bytes", "Memory of resident base KV.", registry=registry)
        self._fetch_decisions = Counter(
            "alora_fetch_decisions_total", "Prefixes fetched or computed again.", ["decision"], registry=registry
        )
        self._tail_bytes = Gauge("alora_tail_bytes", "Memory of running sequences' own KV.", registry=registry)

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        """One forward pass."""
        self._step_seconds.observe(seconds)
        self._step_sequences.observe(sequences)
        self._step_tokens.inc(tokens)

    def load(self, running: int, waiting: int, tail_bytes: int) -> None:
        """Sequences in the batch and without a place, and what their private KV takes."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._tail_bytes.set(tail_bytes)

    def prefix_lookup(self, hit_tokens: int, missed_tokens: int) -> None:
        """Tokens found resident and tokens not."""
        self._prefix_tokens.labels("hit").inc(hit_tokens)
        self._prefix_tokens.labels("miss").inc(missed_tokens)

    def fetch_decision(self, decision: str) -> None:
        """A prefix is fetched, or computed because that has been faster."""
        self._fetch_decisions.labels(decision).inc()

    def prefix_evicted(self, segments: int) -> None:
        """Segments dropped for space."""
        self._evicted.inc(segments)

    def prefix_bytes(self, size_bytes: int) -> None:
        """Bytes of resident base KV."""
        self._prefix_bytes.set(size_bytes)


class AdapterMetrics:
    """What the adapter registry reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._events = Counter(
            "alora_adapter_events_total", "Hits, loads, refusals, drops.", ["event"], registry=registry
        )
        self._load_seconds = Histogram(
            "alora_adapter_load_seconds", "Reading an adapter.", buckets=FAST_SECONDS, registry=registry
        )
        self._resident = Gauge("alora_adapters_resident", "Adapters in memory.", registry=registry)
        self._bytes = Gauge("alora_adapter_resident_bytes", "Adapter weights in memory.", registry=registry)

    def event(self, kind: str, size_bytes: int, seconds: float) -> None:
        """An adapter was a ``hit``, or underwent a ``load``, ``refuse`` or ``drop``."""
        self._events.labels(kind).inc()
        if kind == "load":
            self._load_seconds.observe(seconds)
            self._resident.inc()
            self._bytes.inc(size_bytes)
        elif kind == "drop":
            self._resident.dec()
            self._bytes.dec(size_bytes)


class RequestMetrics:
    """Where requests' tokens and time went; reported by whoever passes the request's events on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter("alora_tokens_total", "Tokens by where they came from.", ["source"], registry=registry)
        self._phases = Histogram(
            "alora_request_phase_seconds", "Parts of requests.", ["phase"], buckets=REQUEST_SECONDS, registry=registry
        )
        self._first_token = Histogram(
            "alora_time_to_first_token_seconds", "Arrival to first token.", buckets=REQUEST_SECONDS, registry=registry
        )
        self._inter_token = Histogram(
            "alora_inter_token_seconds", "Mean time between tokens.", buckets=FAST_SECONDS, registry=registry
        )
        self._fetched = Counter("alora_fetched_bytes_total", "KV read for requests.", registry=registry)
        self._stored = Counter("alora_stored_bytes_total", "KV written for requests.", registry=registry)

    def first_token(self, seconds: float) -> None:
        """A first token passes, so long after the request came: told at once, whatever becomes of the request."""
        self._first_token.observe(seconds)

    def record(self, usage: Usage, timings: Timings) -> None:
        """Count a finished request's tokens, bytes and seconds. ``fetched`` tokens are part of the ``cached`` ones."""
        for source in ("cached", "fetched", "computed", "generated"):
            self._tokens.labels(source).inc(getattr(usage, f"{source}_tokens"))
        self._fetched.inc(usage.fetched_bytes)
        self._stored.inc(usage.stored_bytes)
        for phase in ("queue", "fetch", "prefill", "decode"):
            self._phases.labels(phase).observe(getattr(timings, f"{phase}_seconds"))
        if usage.generated_tokens > 1:
            self._inter_token.observe(timings.decode_seconds / (usage.generated_tokens - 1))


class RouterMetrics:
    """What the router reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._picks = Counter("alora_router_picks_total", "Endpoints picked.", ["role", "reason"], registry=registry)
        self._retries = Counter("alora_router_retries_total", "Attempts after the first.", ["role"], registry=registry)
        self._resumes = Counter(
            "alora_router_resumed_streams_total", "Streams that went on from the middle.", ["role"], registry=registry
        )
        self._endpoints = Gauge("alora_router_endpoints", "Endpoints by state.", ["role", "state"], registry=registry)
        self._in_flight = Gauge("alora_router_in_flight", "Requests in the router.", registry=registry)
        self._requests = Counter("alora_router_requests_total", "Requests by adapter.", ["adapter"], registry=registry)
        self._errors = Histogram(
            "alora_router_prediction_error_seconds",
            "How far first tokens were from their prediction.",
            ["role", "direction"],
            buckets=FAST_SECONDS,
            registry=registry,
        )
        self._cap = LabelCap()

    def picked(self, role: str, reason: str) -> None:
        """An endpoint was picked, for one of the reasons of the router's policy."""
        self._picks.labels(role, reason).inc()

    def predicted(self, role: str, predicted_seconds: float, actual_seconds: float) -> None:
        """A first token was predicted after one time and came after another."""
        error = actual_seconds - predicted_seconds
        self._errors.labels(role, "late" if error > 0 else "early").observe(abs(error))

    def resumed(self, role: str) -> None:
        """A stream goes on elsewhere from the tokens delivered."""
        self._resumes.labels(role).inc()

    def retried(self, role: str) -> None:
        """A request is tried again elsewhere."""
        self._retries.labels(role).inc()

    def endpoints(self, role: str, state: str, count: int) -> None:
        """So many endpoints are ``healthy``, ``draining`` or ``down``."""
        self._endpoints.labels(role, state).set(count)

    def in_flight(self, count: int) -> None:
        """Requests in the router now."""
        self._in_flight.set(count)

    def requested(self, adapter: str) -> None:
        """A request names an adapter, or none."""
        self._requests.labels(self._cap(adapter or "base")).inc()


class CoreMetrics(StoreMetrics, EngineMetrics):
    """What the parts of a model service report, together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        StoreMetrics.__init__(self, registry)
        EngineMetrics.__init__(self, registry)
