"""Starts a decode worker: ``python -m adapter_decode --help``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Final

from adapter_decode.config import AdapterDecodeSettings
from adapter_decode.scan import open_registry, scan_forever
from adapter_decode.servicer import AdapterDecodeServicer
from alora_serve.engine.decoder import Decoder
from alora_serve.engine.prefiller import Prefiller
from alora_serve.engine.rates import RecentMean
from alora_serve.engine.scorer import Scorer
from alora_serve.engine.startup import start_core
from alora_serve.metrics import AdapterMetrics, CoreMetrics, InferenceExtensionMetrics, RequestMetrics, RpcMetrics
from alora_serve.rpc.channels import message_bytes_for_context
from alora_serve.rpc.load_reports import LoadReporter
from alora_serve.rpc.monitoring import Monitoring, monitored
from alora_serve.rpc.prefill_servicer import SERVICE as PREFILL_SERVICE
from alora_serve.rpc.prefill_servicer import BasePrefillServicer
from alora_serve.rpc.server import Service, run_service, serve
from alora_serve.types import EndpointStatus
from alora_serve.v1.adapter_decode_pb2_grpc import add_AdapterDecodeServiceServicer_to_server

SERVICE: Final = "alora_serve.v1.AdapterDecodeService"


async def main(settings: AdapterDecodeSettings) -> int:
    """Load, serve, drain; the process's exit status."""
    names = [SERVICE, PREFILL_SERVICE] if settings.workers_prefill else [SERVICE]
    async with monitored(settings, names) as monitoring:
        return await _load_and_serve(settings, monitoring)


async def _load_and_serve(settings: AdapterDecodeSettings, monitoring: Monitoring) -> int:
    registry = monitoring.registry
    started = await asyncio.to_thread(start_core, settings, CoreMetrics(registry))
    core = started.core
    load_seconds = RecentMean()
    adapters = await asyncio.to_thread(open_registry, settings, core.model, AdapterMetrics(registry), load_seconds)
    InferenceExtensionMetrics(registry).watch(core.model.name, core.serving_load)
    draining = asyncio.Event()

    def status() -> EndpointStatus:
        return replace(
            core.status(draining=draining.is_set()),
            adapters=adapters.list_adapters(),
            adapter_load_seconds=load_seconds.value,
        )

    metrics = RequestMetrics(registry)
    decoder, scorer = Decoder(core, adapters, started.signer), Scorer(core, adapters, started.signer)
    await asyncio.to_thread(decoder.warm)
    servicer = AdapterDecodeServicer(decoder, scorer, adapters, status, core.is_alive, metrics)
    services = [Service(SERVICE, partial(add_AdapterDecodeServiceServicer_to_server, servicer))]
    if settings.workers_prefill:
        standing_in = BasePrefillServicer(Prefiller(core, started.signer), status, core.is_alive, metrics)
        services.append(standing_in.service())
    scanning = asyncio.create_task(scan_forever(adapters, settings.adapter_scan_seconds))
    return await serve(
        "adapter-decode",
        settings,
        services,
        monitoring=monitoring,
        observer=RpcMetrics(registry),
        max_message_bytes=partial(message_bytes_for_context, core.model.context_tokens),
        on_drain=draining.set,
        may_recover=core.may_recover,
        cleanup=[core.drain, partial(asyncio.to_thread, started.close)],
        essential=[asyncio.wrap_future(core.engine.ended), scanning],
        load_reports=LoadReporter(core.serving_load) if settings.orca_load_reports else None,
    )


if __name__ == "__main__":
    run_service("adapter-decode", AdapterDecodeSettings, main)
