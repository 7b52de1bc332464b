"""The worker's adapters: opened from settings, and looked at again for changes on disk."""

from __future__ import annotations

import asyncio

import structlog

from adapter_decode.config import AdapterDecodeSettings
from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.adapters.residency import AdapterEvent
from alora_serve.engine.rates import RecentMean
from alora_serve.errors import ConfigError
from alora_serve.metrics import AdapterMetrics
from alora_serve.model.loader import BaseModel

_log = structlog.get_logger(__name__)


def open_registry(
    settings: AdapterDecodeSettings, model: BaseModel, metrics: AdapterMetrics, load_seconds: RecentMean
) -> AdapterRegistry:
    """The adapters under the settings' roots, checked against the base model.

    Args:
        settings: where they are and how much memory they may take.
        model: what they are checked against.
        metrics: told of every event, and where to ask for what is in memory.
        load_seconds: told how long each load took.

    Raises:
        ConfigError: a root is not a readable directory.
    """

    def report(event: AdapterEvent) -> None:
        metrics.event(event.kind, event.seconds)
        if event.kind == "load":
            load_seconds.observe(event.seconds)
        elif event.kind == "refuse":
            _log.warning("adapter refused", adapter=event.name, problem=event.problem)

    registry = AdapterRegistry(
        settings.adapter_roots,
        base=AdapterHost.of(model),
        max_resident_bytes=settings.adapter_cache_bytes,
        on_event=report,
    )
    metrics.watch_resident(registry.resident, registry.resident_bytes)
    return registry


async def scan_forever(registry: AdapterRegistry, interval_seconds: float) -> None:
    """Look at the roots again and again.

    A look that fails leaves the catalogue as it was, until the next time. What cannot be read of one adapter refuses
    that one, which keeps its place and what of it is in memory.
    """
    while True:
        await asyncio.sleep(interval_seconds)
        try:
            await asyncio.to_thread(registry.refresh)
        except ConfigError as error:
            _log.warning("adapter roots not read", error=str(error))
        except Exception:  # noqa: BLE001 - this is logged, and the worker would end with its look at the roots
            _log.exception("adapter roots not read")
