"""Starts the front door: ``python -m openai_front --help``."""

from __future__ import annotations

from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.monitoring import monitored
from alora_serve.rpc.server import run_service
from openai_front.app import build_app
from openai_front.config import Settings
from openai_front.endpoints import Endpoints
from openai_front.router import Router
from openai_front.serving import NAME, SERVICE, serve


async def main(settings: Settings) -> int:
    """Connect to the router, serve, drain; the process's exit status."""
    in_flight = InFlightCalls(settings.http_max_requests)
    router = Router(settings.router_address, settings.router_tls())
    try:
        async with monitored(settings, [SERVICE]) as monitoring:
            app = build_app(
                Endpoints(router, settings.write_timeout_seconds, settings.default_max_tokens),
                monitoring.registry,
                in_flight,
                with_page=settings.page,
                read_timeout_seconds=settings.read_timeout_seconds,
            )
            return await serve(app, settings, monitoring, in_flight)
    finally:
        await router.close()


if __name__ == "__main__":
    run_service(NAME, Settings, main)
