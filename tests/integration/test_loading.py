"""A model service that still loads is alive and watched, and a signal ends it; it serves once it has loaded."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import warm_starts
from alora_serve.cli.local import machine
from alora_serve.cli.local.spawning import Child
from alora_serve.cli.probe import health_of
from alora_serve.errors import UnavailableError
from alora_serve.rpc.health import LIVENESS, STARTUP
from deployment import PATIENCE_SECONDS, SECRET, ServedModel, metrics_page
from redis_servers import free_port

SERVICES = {
    "base_prefill": "alora_serve.v1.BasePrefillService",
    "adapter_decode": "alora_serve.v1.AdapterDecodeService",
}
NAMES = (LIVENESS, STARTUP)

pytestmark = pytest.mark.timeout(300)


class Loading:
    """A service that reads a pipe as the last thing of its load, into which nobody has written yet."""

    def __init__(self, child: Child, health_address: str, metrics_address: str, pipe: Path) -> None:
        self.child = child
        self.health_address = health_address
        self.metrics_address = metrics_address
        self._pipe = pipe

    async def health(self, *names: str) -> list[str]:
        """What probes are told, once any is."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    return [await asyncio.to_thread(health_of, self.health_address, name, 5.0) for name in names]
                except UnavailableError:
                    await asyncio.sleep(0.1)

    async def finish(self) -> dict[str, str]:
        """Let it load to the end; what it then says of itself."""
        await asyncio.to_thread(self._pipe.write_text, "[]")
        told: dict[str, str] = json.loads(await asyncio.wait_for(self.child.stdout.readline(), PATIENCE_SECONDS))
        return told


@asynccontextmanager
async def loading(module: str, model: ServedModel, folder: Path) -> AsyncIterator[Loading]:
    pipe = folder / "public-prompts.yaml"
    os.mkfifo(pipe)
    health_address, metrics_address = (f"127.0.0.1:{free_port()}" for _ in NAMES)
    settings = {
        "model": str(model.directory),
        "dtype": "float32",
        "store_url": f"lmdb://{folder / 'store'}",
        "store_budget_bytes": "64MiB",
        "handle_secrets": SECRET,
        "public_prompts_file": str(pipe),
        "health_listen": health_address,
        "metrics_listen": metrics_address,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    environment |= {f"ALORA_{name.upper()}": value for name, value in settings.items()}
    environment = machine.service_environment(environment, threads=1)
    child = await warm_starts.spawn((sys.executable, "-P", "-m", module), environment)
    try:
        yield Loading(child, health_address, metrics_address, pipe)
    finally:
        child.kill()
        await child.wait()


@pytest.mark.parametrize("module", SERVICES)
async def test_probes_and_metrics_are_answered_before_the_model_is_there(
    module: str, tiny_model: ServedModel, tmp_path: Path
) -> None:
    names = (*NAMES, SERVICES[module])
    async with loading(module, tiny_model, tmp_path) as service:
        assert await service.health(*names) == ["SERVING", "NOT_SERVING", "NOT_SERVING"]
        assert "alora_tasks" in await asyncio.to_thread(metrics_page, service.metrics_address)
        assert (await service.finish())["health_address"] == service.health_address
        assert await service.health(*names) == ["SERVING", "SERVING", "SERVING"]


@pytest.mark.parametrize("module", SERVICES)
async def test_a_signal_ends_a_service_that_loads(module: str, tiny_model: ServedModel, tmp_path: Path) -> None:
    async with loading(module, tiny_model, tmp_path) as service:
        assert await service.health(LIVENESS) == ["SERVING"]
        os.kill(service.child.pid, signal.SIGTERM)
        assert await asyncio.wait_for(service.child.wait(), PATIENCE_SECONDS) == -signal.SIGTERM
