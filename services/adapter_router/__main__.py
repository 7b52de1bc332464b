"""Starts the router: ``python -m adapter_router --help``."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from adapter_router.config import Settings
from adapter_router.endpoints.pool import EndpointSet
from adapter_router.servicer import AloraServicer
from adapter_router.watch import watch_prefill, watch_worker
from alora_serve.metrics import RequestMetrics, RouterMetrics, RpcMetrics
from alora_serve.rpc.channels import internal_channel
from alora_serve.rpc.server import Service, run_service, serve
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceAsyncStub, AdapterDecodeServiceStub
from alora_serve.v1.alora_pb2_grpc import add_AloraServiceServicer_to_server
from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceAsyncStub, BasePrefillServiceStub


async def main(settings: Settings) -> int:
    """Find the endpoints, serve, drain; the process's exit status."""
    settings.check_endpoints()
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    metrics = RouterMetrics(registry)
    prefills = EndpointSet[BasePrefillServiceAsyncStub](
        "base_prefill",
        settings.base_prefill_endpoints,
        connect=internal_channel,
        make_stub=BasePrefillServiceStub,
        watch=watch_prefill,
        options=settings.endpoint_options(),
        metrics=metrics,
    )
    workers = EndpointSet[AdapterDecodeServiceAsyncStub](
        "adapter_decode",
        settings.decode_endpoints,
        connect=internal_channel,
        make_stub=AdapterDecodeServiceStub,
        watch=watch_worker,
        options=settings.endpoint_options(),
        metrics=metrics,
    )
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
