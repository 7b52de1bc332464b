"""What the Gateway API Inference Extension's endpoint picker reads of a model server, under vLLM's names.

The picker scrapes every worker itself and looks for names, types and labels of vLLM's; its model server protocol says
what each means. A series whose labels are what is going on now must vanish when that changes, so these are collected
when somebody looks, and never kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from alora_serve.types import ServingLoad


class InferenceExtensionMetrics(Collector):
    """Nothing before :meth:`watch`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._model_name = ""
        self._load: Callable[[], ServingLoad] | None = None
        registry.register(self)

    def watch(self, model_name: str, load: Callable[[], ServingLoad]) -> None:
        """Ask there, whenever somebody looks, how busy the service of this base model is."""
        self._model_name, self._load = model_name, load

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The families, without samples."""
        yield _family("num_requests_running", "Sequences in the batch.", "model_name")
        yield _family("num_requests_waiting", "Sequences without a place in it.", "model_name")
        yield _family("kv_cache_usage_perc", "KV that requests use, 1 is all of it.", "model_name")
        yield _family(
            "lora_requests_info",
            "Adapters of these sequences, at this Unix time.",
            *("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample each, of one moment."""
        if self._load is None:
            return
        load = self._load()
        running, waiting, usage, adapters = self.describe()
        running.add_metric([self._model_name], load.running)
        waiting.add_metric([self._model_name], load.waiting)
        usage.add_metric([self._model_name], load.kv_usage)
        # Every place in the batch may have an adapter of its own.
        names = (",".join(load.running_adapters), ",".join(load.waiting_adapters))
        adapters.add_metric([str(load.max_running), *names], time.time())
        yield from (running, waiting, usage, adapters)


def _family(name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vllm:{name}", meaning, labels=labels)
