"""Starts the router: ``python -m adapter_router --help``."""

from __future__ import annotations

from functools import partial
from typing import Final

from adapter_router.catalog import live_models
from adapter_router.config import Settings
from adapter_router.peers import prefill_pool, worker_pool
from adapter_router.prefilling import Prefilling
from adapter_router.servicer import AloraServicer
from alora_serve.metrics import RequestMetrics, RouterMetrics, RpcMetrics
from alora_serve.rpc.monitoring import Monitoring, monitored
from alora_serve.rpc.server import Service, run_service, serve
from alora_serve.rpc.tls import ClientTls
from alora_serve.v1.alora_pb2_grpc import add_AloraServiceServicer_to_server

SERVICE: Final = "alora_serve.v1.AloraService"


async def main(settings: Settings) -> int:
    """Find the endpoints, serve, drain; the process's exit status."""
    settings.check_endpoints()
    async with monitored(settings, [SERVICE], serving=False) as monitoring:
        return await _route(settings, monitoring)


async def _route(settings: Settings, monitoring: Monitoring) -> int:
    registry = monitoring.registry
    access, quotas = settings.access()
    tls = ClientTls.of_peers(settings)
    metrics, options = RouterMetrics(registry), settings.endpoint_options()
    metrics.workers_prefill(settings.workers_prefill)

    def tell_health() -> None:
        monitoring.health.set_serving(bool(live_models(prefilling.snapshots(), workers.snapshots())))

    prefills = prefill_pool(settings.base_prefill_endpoints, options, metrics, on_change=tell_health, tls=tls)
    workers = worker_pool(settings.decode_endpoints, options, metrics, on_change=tell_health, tls=tls)
    prefilling = Prefilling(
        prefills, workers, max_attempts=settings.max_attempts, workers_prefill=settings.workers_prefill
    )
    servicer = AloraServicer(
        prefilling,
        workers,
        settings.signer(),
        settings.limits(),
        demands=settings.demands(),
        salts=settings.salts(),
        quotas=quotas,
        router_metrics=metrics,
        request_metrics=RequestMetrics(registry),
    )
    async with prefills, workers:
        return await serve(
            "adapter-router",
            settings,
            [Service(SERVICE, partial(add_AloraServiceServicer_to_server, servicer))],
            monitoring=monitoring,
            observer=RpcMetrics(registry),
            max_message_bytes=servicer.max_message_bytes,
            authorize=access.authorize,
            essential=[prefills.looking, workers.looking],
        )


if __name__ == "__main__":
    run_service("adapter-router", Settings, main)
