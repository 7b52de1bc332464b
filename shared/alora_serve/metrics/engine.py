"""What engine and resident prefixes do, hold and wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from alora_serve.metrics.buckets import FAST_SECONDS
from alora_serve.metrics.labels import create_series
from alora_serve.metrics.store import StoreMetrics

LookupOutcome = Literal["hit", "dropped", "miss"]
FetchDecision = Literal["fetch", "compute", "probe"]


class EngineMetrics:
    """What engine, resident prefixes and the decision to fetch report."""

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
        self._queued_tokens = Gauge(
            "alora_engine_queued_prefill_tokens", "Prompt tokens still to run.", registry=registry
        )
        self._prefix_tokens = Counter(
            "alora_prefix_lookup_tokens_total", "Tokens looked up in memory.", ["outcome"], registry=registry
        )
        self._evicted = Counter("alora_prefix_evicted_segments_total", "Segments dropped.", registry=registry)
        self._prefix_bytes = Gauge("alora_prefix_bytes", "Memory of resident base KV.", registry=registry)
        self._pinned_bytes = Gauge("alora_prefix_pinned_bytes", "Of these, what requests use.", registry=registry)
        self._tail_bytes = Gauge("alora_tail_bytes", "Memory of running sequences' own KV.", registry=registry)
        self._fetch_decisions = Counter(
            "alora_fetch_decisions_total", "Prefixes fetched or computed again.", ["decision"], registry=registry
        )
        self._fetch_rate = Gauge(
            "alora_measured_fetch_bytes_per_second", "KV from the store, as lately measured.", registry=registry
        )
        self._prefill_rate = Gauge(
            "alora_measured_prefill_tokens_per_second", "Prompts computed, as lately measured.", registry=registry
        )
        create_series(self._prefix_tokens, get_args(LookupOutcome))
        create_series(self._fetch_decisions, get_args(FetchDecision))

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

    def queued_prefill_tokens(self, tokens: Callable[[], int]) -> None:
        """Ask there, whenever somebody looks, how many prompt tokens of accepted sequences have not run yet."""
        self._queued_tokens.set_function(tokens)

    def prefix_lookup(self, hit_tokens: int, dropped_tokens: int, missed_tokens: int) -> None:
        """Tokens found resident, those of whole blocks that were until they made room, and all others."""
        self._prefix_tokens.labels("hit").inc(hit_tokens)
        self._prefix_tokens.labels("dropped").inc(dropped_tokens)
        self._prefix_tokens.labels("miss").inc(missed_tokens)

    def fetch_decision(self, decision: FetchDecision) -> None:
        """A prefix is fetched, or computed because that has been faster."""
        self._fetch_decisions.labels(decision).inc()

    def measured_rates(self, fetch_bytes: Callable[[], float], prefill_tokens: Callable[[], float]) -> None:
        """Ask there, whenever somebody looks, what these decisions are made from."""
        self._fetch_rate.set_function(fetch_bytes)
        self._prefill_rate.set_function(prefill_tokens)

    def prefix_evicted(self, segments: int) -> None:
        """Segments dropped for space."""
        self._evicted.inc(segments)

    def prefix_bytes(self, size_bytes: int) -> None:
        """Bytes of resident base KV."""
        self._prefix_bytes.set(size_bytes)

    def prefix_pinned_bytes(self, size_bytes: Callable[[], int]) -> None:
        """Ask there, whenever somebody looks, how many of these bytes requests use."""
        self._pinned_bytes.set_function(size_bytes)


class CoreMetrics(StoreMetrics, EngineMetrics):
    """What the parts of a model service report, together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        StoreMetrics.__init__(self, registry)
        EngineMetrics.__init__(self, registry)
