"""Starts the base-prefill service: ``python -m base_prefill --help``."""

from __future__ import annotations

import asyncio
from functools import partial

from alora_serve.engine.prefiller import Prefiller
from alora_serve.engine.startup import start_core
from alora_serve.metrics import CoreMetrics, RequestMetrics, RpcMetrics
from alora_serve.rpc.channels import message_bytes_for_context
from alora_serve.rpc.load_reports import LoadReporter
from alora_serve.rpc.monitoring import Monitoring, monitored
from alora_serve.rpc.prefill_servicer import SERVICE, BasePrefillServicer
from alora_serve.rpc.server import run_service, serve
from alora_serve.types import EndpointStatus
from base_prefill.config import BasePrefillSettings


async def main(settings: BasePrefillSettings) -> int:
    """Load, serve, drain; the process's exit status."""
    async with monitored(settings, [SERVICE]) as monitoring:
        return await _load_and_serve(settings, monitoring)


async def _load_and_serve(settings: BasePrefillSettings, monitoring: Monitoring) -> int:
    registry = monitoring.registry
    started = await asyncio.to_thread(start_core, settings, CoreMetrics(registry))
    core, draining = started.core, asyncio.Event()

    def status() -> EndpointStatus:
        return core.status(draining=draining.is_set())

    prefiller = Prefiller(core, started.signer)
    servicer = BasePrefillServicer(prefiller, status, core.is_alive, RequestMetrics(registry))
    return await serve(
        "base-prefill",
        settings,
        [servicer.service()],
        monitoring=monitoring,
        observer=RpcMetrics(registry),
        max_message_bytes=partial(message_bytes_for_context, core.model.context_tokens),
        on_drain=draining.set,
        may_recover=core.may_recover,
        cleanup=[core.drain, partial(asyncio.to_thread, started.close)],
        essential=[asyncio.wrap_future(core.engine.ended)],
        load_reports=LoadReporter(core.serving_load) if settings.orca_load_reports else None,
    )


if __name__ == "__main__":
    run_service("base-prefill", BasePrefillSettings, main)
