"""What is open to those who watch a process, from before it loads until it has ended all else: metrics and probes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

import grpc
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs
from prometheus_client import CollectorRegistry, start_http_server

from alora_serve.config import ServerSettings
from alora_serve.errors import ConfigError
from alora_serve.metrics import TaskMetrics, service_registry
from alora_serve.rpc.channels import server_options
from alora_serve.rpc.health import HealthServicer
from alora_serve.rpc.listening import host_and_port

PROBE_BYTES: Final = 4096
"""A probe asks with a service's name."""


@dataclass(frozen=True, slots=True)
class Monitoring:
    """How a process is watched.

    Attributes:
        registry: what ``/metrics`` shows.
        health: what probes are told.
        addresses: ``metrics_address`` and, with ``settings.health_listen``, ``health_address``: ``host:port`` each.
    """

    registry: CollectorRegistry
    health: HealthServicer
    addresses: Mapping[str, str]


@asynccontextmanager
async def monitored(
    settings: ServerSettings, services: Iterable[str], *, serving: bool = True
) -> AsyncIterator[Monitoring]:
    """Open ``/metrics`` and, where settings ask for it, the port of health: the process lives, and has not started.

    Args:
        settings: where to listen.
        services: full names of what the process is going to serve.
        serving: see :class:`HealthServicer`.

    Raises:
        ConfigError: an address cannot be bound.
    """
    loop, registry = asyncio.get_running_loop(), service_registry()
    TaskMetrics(registry).watch(lambda: len(asyncio.all_tasks(loop)))
    health = HealthServicer(services, serving=serving, started=False)
    with _metrics(settings.metrics_listen, registry) as metrics_address:
        addresses = {"metrics_address": metrics_address}
        if not settings.health_listen:
            yield Monitoring(registry, health, addresses)
            return
        async with _probes(settings.health_listen, health) as health_address:
            yield Monitoring(registry, health, addresses | {"health_address": health_address})


@contextmanager
def _metrics(address: str, registry: CollectorRegistry) -> Iterator[str]:
    """The address with the port that was taken."""
    host, port = host_and_port(address)
    try:
        server, _ = start_http_server(port, host.strip("[]"), registry)
    except OSError as error:
        raise ConfigError(f"metrics_listen={address}: cannot be bound: {error}") from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@asynccontextmanager
async def _probes(address: str, health: HealthServicer) -> AsyncIterator[str]:
    """The same of a server of health alone: what it says is no secret, and a probe has no certificate."""
    server = grpc.aio.server(options=server_options(PROBE_BYTES))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"health_listen={address}: cannot be bound: in use, or not an address of this machine"
        ) from error
    await server.start()
    try:
        yield f"{host_and_port(address)[0]}:{port}"
    finally:
        await server.stop(None)
