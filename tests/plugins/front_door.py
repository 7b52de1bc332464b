"""Front doors before a router: in a process of their own, or in the test's."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import openai
from prometheus_client import CollectorRegistry

from alora_serve.cli.local.events import Listening
from alora_serve.cli.local.process import ProcessSpec, SupervisedProcess
from alora_serve.rpc.in_flight import InFlightCalls
from openai_front.app import build_app
from openai_front.config import Settings
from openai_front.endpoints import Endpoints
from openai_front.router import Router
from openai_front.serving import bound_socket, http_server

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Where it listens, and the client of OpenAI's that a test calls it with, which never calls again by itself."""

    listening: Listening
    process: SupervisedProcess
    openai: openai.AsyncOpenAI

    @property
    def url(self) -> str:
        return f"http://{self.listening.address}"


@asynccontextmanager
async def front_door(
    router_address: str, *, api_key: str = "nobody asks", emit: Callable[[object], None] = print, **settings: str
) -> AsyncIterator[FrontDoor]:
    """A front door before the router at that address."""
    chosen = {"router_address": router_address, "listen": "127.0.0.1:0", "drain_seconds": "5", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    environment |= {f"ALORA_{name.upper()}": value for name, value in chosen.items()}
    process = SupervisedProcess(
        ProcessSpec("front-door", (sys.executable, "-P", "-m", "openai_front"), environment), emit
    )
    try:
        listening = await process.start()
        async with openai.AsyncOpenAI(
            base_url=f"http://{listening.address}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_SECONDS
        ) as client:
            yield FrontDoor(listening, process, client)
    finally:
        await process.stop(PATIENCE_SECONDS)


@dataclass(frozen=True, slots=True)
class OpenDoor:
    """A front door in the test's own process and loop."""

    address: str
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    in_flight: InFlightCalls
    registry: CollectorRegistry
    num_connections: Callable[[], int]


@asynccontextmanager
async def open_door(router_address: str, **settings: Any) -> AsyncIterator[OpenDoor]:
    """The same as :func:`front_door`, but for the process: for what scripted services provoke."""
    chosen = Settings(router_address=router_address, listen="127.0.0.1:0", **settings)
    registry, in_flight = CollectorRegistry(), InFlightCalls(chosen.http_max_requests)
    router = Router(router_address, None)
    app = build_app(
        Endpoints(router, chosen.write_timeout_seconds, chosen.default_max_tokens),
        registry,
        in_flight,
        with_page=chosen.page,
        read_timeout_seconds=chosen.read_timeout_seconds,
    )
    with bound_socket(chosen) as bound:
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        server = http_server(app, chosen)
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        url = f"http://{address}"
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False) as http,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as ai,
            ):
                yield OpenDoor(address, http, ai, in_flight, registry, lambda: len(server.server_state.connections))
        finally:
            server.should_exit = True
            await serving
            await router.close()
