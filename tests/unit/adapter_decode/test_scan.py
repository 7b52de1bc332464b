"""What a worker says of adapters that it refuses, and that it goes on looking whatever one look ran into."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from adapter_decode.config import AdapterDecodeSettings
from adapter_decode.scan import open_registry, scan_forever
from alora_serve.adapters.files import CONFIG_NAME
from alora_serve.engine.rates import RecentMean
from alora_serve.errors import ConfigError
from alora_serve.metrics import AdapterMetrics
from alora_serve.model.loader import load_base_model
from deployment import save_tiny_model
from fake_services import until


async def test_a_refused_adapter_is_logged_and_counted_at_the_start_and_when_it_is_found_later(tmp_path: Path) -> None:
    directory, counted = save_tiny_model(tmp_path).directory, CollectorRegistry()
    settings = AdapterDecodeSettings(model=str(directory), adapter_roots=(tmp_path / "adapters",))

    def save_broken(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_NAME).write_text("{")
        (tmp_path / name).rename(tmp_path / "adapters" / name)

    def told() -> dict[str, str]:
        return {line["adapter"]: line["problem"] for line in lines if line["event"] == "adapter refused"}

    save_broken("there-before")
    with capture_logs() as lines:
        model = load_base_model(directory, dtype="float32")
        registry = open_registry(settings, model, AdapterMetrics(counted), RecentMean())
        assert told().keys() == {"there-before"}
        scanning = asyncio.create_task(scan_forever(registry, 0.001))
        save_broken("there-now")
        await until(lambda: len(told()) == 2)
        scanning.cancel()
        await asyncio.gather(scanning, return_exceptions=True)
    assert told() == {info.name: info.problem for info in registry.list_adapters() if info.problem}
    assert counted.get_sample_value("alora_adapter_events_total", {"event": "refuse"}) == 2


async def test_an_adapter_read_again_for_touched_files_is_counted_in_memory_once(tmp_path: Path) -> None:
    directory, counted = save_tiny_model(tmp_path).directory, CollectorRegistry()
    settings = AdapterDecodeSettings(model=str(directory), adapter_roots=(tmp_path / "adapters",))
    registry = open_registry(
        settings, load_base_model(directory, dtype="float32"), AdapterMetrics(counted), RecentMean()
    )
    name = next(info.name for info in registry.list_adapters())
    for _ in range(3):
        registry.acquire(name).release()
        for file in (tmp_path / "adapters" / name).iterdir():
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert counted.get_sample_value("alora_adapter_events_total", {"event": "load"}) == 3
    assert counted.get_sample_value("alora_adapters_resident") == 1
    assert counted.get_sample_value("alora_adapter_resident_bytes") == registry.resident_bytes() > 0
    registry.unload(name)
    assert counted.get_sample_value("alora_adapters_resident") == 0
    assert counted.get_sample_value("alora_adapter_resident_bytes") == 0


class Roots:
    """A registry whose looks end in each of these in turn, and then well."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.looks = 0

    def refresh(self) -> None:
        self.looks += 1
        if self._failures:
            raise self._failures.pop(0)


async def test_a_look_that_fails_is_logged_and_not_the_last() -> None:
    roots: Any = Roots(ConfigError("away for a moment"), OverflowError("unforeseen"), MemoryError())
    with capture_logs() as logs:
        scanning = asyncio.create_task(scan_forever(roots, 0.0))
        await until(lambda: roots.looks > 3)
        assert not scanning.done()
        scanning.cancel()
    assert [line["log_level"] for line in logs] == ["warning", "error", "error"]
