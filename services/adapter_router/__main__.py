"""Starts the router: ``python -m adapter_router --help``."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from adapter_router.config import Settings
from adapter_router.peers import prefill_pool, worker_pool
from adapter_router.servicer import AloraServicer
from alora_serve.metrics import RequestMetrics, RouterMetrics, RpcMetrics
from alora_serve.rpc.server import Service, run_service, serve
from alora_serve.v1.alora_pb2_grpc import add_AloraServiceServicer_to_server


async def main(settings: Settings) -> int:
    """Find the endpoints, serve, drain; the process's exit status."""
    settings.check_endpoints()
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    metrics, options = RouterMetrics(registry), settings.endpoint_options()
    prefills = prefill_pool(settings.base_prefill_endpoints, options, metrics)
    workers = worker_pool(settings.decode_endpoints, options, metrics)
    servicer = AloraServicer(
        prefills,
        workers,
        settings.signer(),
        settings.limits(),
        router_metrics=metrics,
        request_metrics=RequestMetrics(registry),
    )
    async with prefills, workers:
        return await serve(
            "adapter-router",
            settings,
            [Service("alora_serve.v1.AloraService", partial(add_AloraServiceServicer_to_server, servicer))],
            observer=RpcMetrics(registry),
            registry=registry,
        )


if __name__ == "__main__":
    run_service("adapter-router", Settings, main)
