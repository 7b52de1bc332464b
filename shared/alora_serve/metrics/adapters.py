"""Which adapters are in memory, and what it took to have them there."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from alora_serve.metrics.buckets import FAST_SECONDS
from alora_serve.metrics.labels import LabelCap, create_series

AdapterEventKind = Literal["hit", "load", "refuse", "evict", "drop"]

NameAndDigest = tuple[str, str]


class AdapterMetrics:
    """What the adapter registry reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._events = Counter("alora_adapter_events_total", "Uses, loads and ends.", ["event"], registry=registry)
        self._load_seconds = Histogram(
            "alora_adapter_load_seconds", "Reading an adapter.", buckets=FAST_SECONDS, registry=registry
        )
        self._resident = Gauge("alora_adapters_resident", "Adapters in memory.", registry=registry)
        self._bytes = Gauge("alora_adapter_resident_bytes", "Adapter weights in memory.", registry=registry)
        self._loaded = _LoadedAdapters()
        registry.register(self._loaded)
        create_series(self._events, get_args(AdapterEventKind))

    def event(self, kind: AdapterEventKind, seconds: float) -> None:
        """An adapter was a ``hit``, underwent a ``load`` or ``refuse``, or left memory by ``evict`` or ``drop``."""
        self._events.labels(kind).inc()
        if kind == "load":
            self._load_seconds.observe(seconds)

    def watch_resident(
        self, resident: Callable[[], Collection[NameAndDigest]], resident_bytes: Callable[[], int]
    ) -> None:
        """Ask there, whenever somebody looks, for name and digest of every adapter in memory, and what they take.

        Events would not tell: a version that is in memory can be read again, and stays the one it was.
        """
        self._loaded.ask = resident
        self._resident.set_function(lambda: len(resident()))
        self._bytes.set_function(resident_bytes)


class _LoadedAdapters(Collector):
    """One series for each adapter in memory at the moment, and none for those that have left it."""

    def __init__(self) -> None:
        self.ask: Callable[[], Iterable[NameAndDigest]] = tuple
        self._cap = LabelCap(("other", ""))

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("alora_adapter_loaded", "1 for an adapter in memory.", labels=("adapter", "digest"))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for family in self.describe():
            for labels, count in Tally(map(self._cap, sorted(self.ask()))).items():
                family.add_metric(labels, count)
            yield family
