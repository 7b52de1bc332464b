"""What an endpoint picker of the Gateway API Inference Extension reads: vLLM's names, types, labels and meaning."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from alora_serve.metrics import InferenceExtensionMetrics
from alora_serve.types import ServingLoad


@pytest.fixture
def load() -> list[ServingLoad]:
    """Its last is what is going on now."""
    return [ServingLoad(max_running=8)]


@pytest.fixture
def registry(load: list[ServingLoad]) -> CollectorRegistry:
    registry = CollectorRegistry()
    InferenceExtensionMetrics(registry).watch("tiny", lambda: load[-1])
    return registry


def scraped(registry: CollectorRegistry) -> dict[str, tuple[str, dict[str, str], float]]:
    """Type, labels and value by name, of a page as a picker reads it; each name has one series."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        [sample] = family.samples
        found[sample.name] = (family.type, sample.labels, sample.value)
    return found


def test_queue_and_batch_and_kv(registry: CollectorRegistry, load: list[ServingLoad]) -> None:
    load.append(ServingLoad(running=3, waiting=5, kv_usage=0.25, max_running=8))
    page = scraped(registry)
    assert page["vllm:num_requests_running"] == ("gauge", {"model_name": "tiny"}, 3)
    assert page["vllm:num_requests_waiting"] == ("gauge", {"model_name": "tiny"}, 5)
    assert page["vllm:kv_cache_usage_perc"] == ("gauge", {"model_name": "tiny"}, 0.25)


def test_adapters_are_labels_of_one_series_that_is_of_this_moment(
    registry: CollectorRegistry, load: list[ServingLoad]
) -> None:
    nobody = {"max_lora": "8", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    for now, labels in (
        (load[-1], nobody),
        (
            ServingLoad(max_running=8, running_adapters=("a", "b"), waiting_adapters=("c",)),
            {"max_lora": "8", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"},
        ),
        (ServingLoad(max_running=8), nobody),
    ):
        load.append(now)
        before = time.time()
        kind, told, when = scraped(registry)["vllm:lora_requests_info"]
        assert (kind, told) == ("gauge", labels), "and no series of what was"
        assert before <= when <= time.time(), "the picker takes the latest by this"


def test_nothing_is_told_before_there_is_a_load_to_tell_of() -> None:
    registry = CollectorRegistry()
    InferenceExtensionMetrics(registry)
    assert generate_latest(registry) == b""
