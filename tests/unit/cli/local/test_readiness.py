from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import CollectorRegistry, start_http_server

from alora_serve.cli.local.events import Listening
from alora_serve.cli.local.readiness import wait_router_ready
from alora_serve.metrics import RouterMetrics
from alora_serve.rpc.health import HealthServicer

SERVICE = "alora_serve.v1.AloraService"


@pytest.fixture
async def router() -> AsyncIterator[tuple[Listening, RouterMetrics, HealthServicer]]:
    """A health service and metrics, as a router has them."""
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    http, _ = start_http_server(0, "127.0.0.1", registry)
    health = HealthServicer([SERVICE])
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Listening("router", 1, f"127.0.0.1:{port}", f"127.0.0.1:{http.server_port}"), metrics, health
    await server.stop(None)
    http.shutdown()
    http.server_close()


async def is_ready(listening: Listening, workers: int) -> bool:
    try:
        await asyncio.wait_for(wait_router_ready(listening, num_prefills=1, num_workers=workers), 0.5)
    except TimeoutError:
        return False
    return True


async def test_a_router_is_ready_once_every_endpoint_is_healthy(router) -> None:
    listening, metrics, health = router
    assert not await is_ready(listening, 2)
    metrics.endpoints("base_prefill", "healthy", 1)
    metrics.endpoints("adapter_decode", "healthy", 1)
    metrics.endpoints("adapter_decode", "down", 1)
    assert not await is_ready(listening, 2)
    metrics.endpoints("adapter_decode", "healthy", 2)
    assert await is_ready(listening, 2)
    health.shut_down()
    assert not await is_ready(listening, 2)


async def test_a_router_that_does_not_answer_is_waited_for() -> None:
    assert not await is_ready(Listening("router", 1, "127.0.0.1:1", "127.0.0.1:1"), 1)


async def test_a_router_without_metrics_is_not_ready(router) -> None:
    listening, _, _ = router
    assert not await is_ready(Listening("router", 1, listening.address, "127.0.0.1:1"), 1)
