"""All metrics together: names say whose and in which unit, and what the code can report is there from the start."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from adapter_router.policy import Reason
from alora_serve import metrics
from alora_serve.adapters.residency import AdapterEventKind
from alora_serve.engine.fetch_decision import Decision
from alora_serve.kv.guarded import BreakerState, Direction, Operation, Outcome
from alora_serve.kv.record import MissReason
from alora_serve.kv.transfer import DropReason
from alora_serve.metrics import adapters, buckets, engine, router, store

ALL: tuple[type[Any], ...] = (
    metrics.RpcMetrics,
    metrics.StoreMetrics,
    metrics.EngineMetrics,
    metrics.AdapterMetrics,
    metrics.RequestMetrics,
    metrics.RouterMetrics,
    metrics.TaskMetrics,
    metrics.CertificateMetrics,
    metrics.HttpMetrics,
)
"""All but those of another's naming."""
COUNTED_THINGS = (
    "_tasks",
    "_seconds",
    "_sequences",
    "_tokens",
    "_endpoints",
    "_in_flight",
    "_resident",
    "_state",
    "_loaded",
    "_per_second",
    "_workers_prefill",
)


def test_names_say_whose_they_are_and_in_which_unit(registry: CollectorRegistry) -> None:
    for owner in ALL:
        owner(registry)
    seen: list[str] = []
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        seen.append(name)
        assert re.fullmatch(r"alora_[a-z_]+", name)
        assert family.documentation.endswith(".")
        if family.type == "gauge":
            assert not name.endswith("_total")
            assert name.endswith(("_bytes", *COUNTED_THINGS)), name
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_sequences")), name
    assert len(seen) == len(set(seen)) > len(ALL)


def test_two_processes_worth_of_metrics_live_in_one_interpreter() -> None:
    before = {family.name for family in REGISTRY.collect()}
    for owner in (*ALL, metrics.InferenceExtensionMetrics):
        owner(CollectorRegistry())
        owner(CollectorRegistry())
    assert {family.name for family in REGISTRY.collect()} == before, "the global registry is nobody's"


@pytest.mark.parametrize(
    ("declared", "reported"),
    [
        (store.StoreOperation, Operation),
        (store.StoreOutcome, Outcome),
        (store.MissReason, MissReason),
        (store.DropReason, DropReason),
        (store.BreakerDirection, Direction),
        (engine.FetchDecision, Decision),
        (adapters.AdapterEventKind, AdapterEventKind),
        (router.PickReason, Reason),
    ],
)
def test_what_is_declared_is_what_can_be_reported(declared: Any, reported: Any) -> None:
    """That nothing else can be reported is for mypy to say."""
    assert set(get_args(declared)) == set(get_args(reported))


def test_the_states_of_a_breaker_are_declared() -> None:
    assert set(get_args(store.BreakerStateName)) == {state.value for state in BreakerState}


def test_counters_and_histograms_with_known_labels_start_at_0_so_that_their_first_event_is_an_increase(
    registry: CollectorRegistry,
) -> None:
    for owner in ALL:
        owner(registry)
    open_labels = {
        "alora_rpc_started",
        "alora_rpc_handled",
        "alora_rpc_seconds",
        "alora_router_requests",
        "alora_http_requests",
        "alora_http_request_seconds",
    }
    for family in registry.collect():
        if family.type not in {"counter", "histogram"} or family.name in open_labels:
            continue
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        assert samples, family.name
        assert {sample.value for sample in samples} == {0}, family.name
    assert registry.get_sample_value("alora_store_miss_blocks_total", {"reason": "corrupt"}) == 0
    picks = {"role": "adapter_decode", "reason": "fan_out"}
    assert registry.get_sample_value("alora_router_picks_total", picks) == 0


def test_a_router_without_a_kind_of_endpoint_has_no_series_of_it(registry: CollectorRegistry) -> None:
    """None healthy is an alert; a router may have no base prefill on purpose."""
    metrics.RouterMetrics(registry)
    labels = {"role": "base_prefill", "state": "healthy"}
    assert registry.get_sample_value("alora_router_endpoints", labels) is None


def test_buckets_rise_and_span_what_language_models_take() -> None:
    for bounds in (buckets.FAST_SECONDS, buckets.TOKEN_SECONDS, buckets.REQUEST_SECONDS):
        assert list(bounds) == sorted(set(bounds))
    assert (buckets.TOKEN_SECONDS[0], buckets.TOKEN_SECONDS[-1]) == (0.001, 10.0)
    assert buckets.REQUEST_SECONDS[0] == 0.005
    assert buckets.REQUEST_SECONDS[-1] >= 300
    assert 1.5 in buckets.REQUEST_SECONDS, "the objective of deploy/prometheus/rules/recording.yaml"


def test_a_model_service_reports_store_and_engine_through_one_object(registry: CollectorRegistry) -> None:
    core = metrics.CoreMetrics(registry)
    core.store_miss("absent", 1)
    core.load(1, 0, 0)
    assert registry.get_sample_value("alora_store_miss_blocks_total", {"reason": "absent"}) == 1
    assert registry.get_sample_value("alora_engine_running_sequences") == 1


def test_a_services_registry_holds_the_process_metrics() -> None:
    names = {metric.name for metric in metrics.service_registry().collect()}
    assert {"python_info", "python_gc_objects_collected"} <= names
