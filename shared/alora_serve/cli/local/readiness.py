"""When a router is ready: it says SERVING, and its metrics count every endpoint as healthy."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs
from prometheus_client.parser import text_string_to_metric_families

from alora_serve.cli.local.events import Listening
from alora_serve.rpc.channels import internal_channel
from alora_serve.rpc.tls import ClientTls

SERVICE: Final = "alora_serve.v1.AloraService"
_POLL_SECONDS: Final = 0.1
_ANSWER_SECONDS: Final = 5.0


async def wait_router_ready(
    router: Listening, *, num_prefills: int, num_workers: int, tls: ClientTls | None = None
) -> None:
    """Return when the router serves, and reaches so many base prefills and workers. Waits as long as it takes.

    ``tls``: how to speak to it; unset, in plain text.
    """
    async with internal_channel(router.address, tls=tls) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            if await _serves(health):
                healthy = await asyncio.to_thread(_healthy_endpoints, router.metrics_address)
                if healthy == {"base_prefill": num_prefills, "adapter_decode": num_workers}:
                    return
            await asyncio.sleep(_POLL_SECONDS)


async def _serves(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=_ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return False
        raise
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _healthy_endpoints(metrics_address: str) -> dict[str, int]:
    """How many endpoints of each service the router can reach; empty while it does not say."""
    # Never through the user's proxy: the address is this machine's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{metrics_address}/metrics", timeout=_ANSWER_SECONDS) as response:
            text = response.read().decode()
    except OSError:
        return {}
    return {
        sample.labels["role"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "alora_router_endpoints" and sample.labels["state"] == "healthy"
    }
