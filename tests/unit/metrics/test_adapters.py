"""Adapters in memory: how many, which, and what became of them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from alora_serve.metrics import AdapterMetrics
from alora_serve.metrics.adapters import AdapterEventKind
from alora_serve.metrics.labels import MAX_LABEL_VALUES


def loaded(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """The series of the metric by name and digest."""
    return {
        (sample.labels["adapter"], sample.labels["digest"]): sample.value
        for family in registry.collect()
        if family.name == "alora_adapter_loaded"
        for sample in family.samples
    }


def test_what_became_of_adapters_is_counted(registry: CollectorRegistry, value: Callable[..., float | None]) -> None:
    metrics = AdapterMetrics(registry)
    kinds: list[AdapterEventKind] = ["load", "load", "load", "hit", "refuse", "evict", "drop"]
    for kind in kinds:
        metrics.event(kind, 0.5)
    assert value("adapter_events_total", event="load") == 3
    assert value("adapter_events_total", event="evict") == 1
    assert value("adapter_events_total", event="drop") == 1
    assert value("adapter_events_total", event="refuse") == 1
    assert value("adapter_load_seconds_count") == 3


def test_each_adapter_in_memory_has_a_series_and_what_has_left_has_none(
    registry: CollectorRegistry, value: Callable[..., float | None]
) -> None:
    metrics = AdapterMetrics(registry)
    assert loaded(registry) == {}
    held = {("certainty", "aa"), ("certainty", "bb"), ("jailbreak", "cc")}
    metrics.watch_resident(lambda: held, lambda: 5 * len(held))
    assert loaded(registry) == dict.fromkeys(held, 1)
    assert (value("adapters_resident"), value("adapter_resident_bytes")) == (3, 15)
    held.remove(("certainty", "aa"))
    assert loaded(registry) == {("certainty", "bb"): 1, ("jailbreak", "cc"): 1}
    assert (value("adapters_resident"), value("adapter_resident_bytes")) == (2, 10)


def test_adapters_that_come_and_go_make_a_bounded_number_of_series(registry: CollectorRegistry) -> None:
    metrics, held = AdapterMetrics(registry), set[tuple[str, str]]()
    metrics.watch_resident(lambda: held, lambda: 0)
    seen: set[tuple[str, str]] = set()
    for round_number in range(3):
        held.clear()
        held.update((f"adapter-{number}", f"digest-{round_number}") for number in range(MAX_LABEL_VALUES - 50))
        seen |= loaded(registry).keys()
    assert len(seen) == MAX_LABEL_VALUES + 1
    assert loaded(registry) == {("other", ""): MAX_LABEL_VALUES - 50}
