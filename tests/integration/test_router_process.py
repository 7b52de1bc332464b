"""The router as a process of its own: starts before its peers, serves once it has some, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alora_serve.types import Finished, GenerateRequest
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceStub
from fake_services import SECRET, FakePrefill, FakeWorker, answer, start_prefill, start_worker
from redis_servers import free_port

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ASK = alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")]))


@asynccontextmanager
async def router_process(*flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A running router and its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "ALORA_HANDLE_SECRETS": SECRET.decode()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapter_router", *flags, env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = json.loads(await process.stdout.readline())
        assert line["service"] == "adapter-router"
        yield process, line["address"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_it_serves_when_it_has_a_model_and_drains_on_sigterm() -> None:
    gate = asyncio.Event()

    async def gated(request: GenerateRequest, attempt: int) -> Any:
        async for event in answer(request, attempt):
            if isinstance(event, Finished):
                await gate.wait()
            yield event

    prefill = await start_prefill(FakePrefill())
    fake = FakeWorker(gated)
    worker = await start_worker(fake)
    await worker.kill()
    flags = (f"--base-prefill-endpoints={prefill.address}", f"--decode-endpoints={worker.address}")
    async with router_process(*flags) as (process, address), grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        stub: Any = AloraServiceStub(channel)
        statuses = aiter(health.Watch(health_pb2.HealthCheckRequest(service="alora_serve.v1.AloraService")))
        assert (await anext(statuses)).status == NOT_SERVING
        worker = await start_worker(fake, worker.address)
        assert (await anext(statuses)).status == SERVING

        responses = aiter(stub.Generate(ASK))
        assert (await anext(responses)).event.HasField("started")
        process.send_signal(signal.SIGTERM)
        assert (await anext(statuses)).status == NOT_SERVING
        gate.set()
        events = [response.event async for response in responses]
        assert events[-1].HasField("finished")
        assert await process.wait() == 0
    await prefill.kill()
    await worker.kill()


@pytest.mark.parametrize("allowed", [True, False])
async def test_it_tells_prometheus_whether_workers_may_prefill(allowed: bool) -> None:
    """Without base prefill that is the difference between a warning and an outage."""
    flags: tuple[str, ...] = ("--base-prefill-endpoints=127.0.0.1:1", "--decode-endpoints=127.0.0.1:1")
    metrics = f"127.0.0.1:{free_port()}"
    flags += (f"--metrics-listen={metrics}", f"--workers-prefill={allowed}")
    async with router_process(*flags), httpx.AsyncClient() as http:
        told = (await http.get(f"http://{metrics}/metrics")).text
    assert f"alora_router_workers_prefill {float(allowed)}" in told.splitlines()
    assert 'alora_router_endpoints{role="base_prefill",state="healthy"} 0.0' in told.splitlines()


async def test_it_stops_serving_when_its_last_worker_is_gone() -> None:
    prefill, worker = await start_prefill(FakePrefill()), await start_worker(FakeWorker())
    flags = (f"--base-prefill-endpoints={prefill.address}", f"--decode-endpoints={worker.address}")
    async with router_process(*flags) as (_, address), grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        statuses = aiter(health.Watch(health_pb2.HealthCheckRequest()))
        while (await anext(statuses)).status != SERVING:
            pass
        await worker.kill()
        assert (await anext(statuses)).status == NOT_SERVING
    await prefill.kill()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "base_prefill_endpoints"),
        (("--base-prefill-endpoints=h:1", "--decode-endpoints=nonsense"), "nonsense"),
        (("--no-such-flag=1",), "no-such-flag"),
    ],
)
async def test_a_wrong_setting_stops_the_start_with_its_name(flags: tuple[str, ...], named: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "ALORA_HANDLE_SECRETS": SECRET.decode()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "adapter_router", *flags),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert named in errors.decode()


async def test_the_router_needs_no_torch() -> None:
    heavy = ("torch", "numpy", "transformers")
    code = f"import adapter_router.__main__, sys; sys.exit(any(name in sys.modules for name in {heavy}))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert await process.wait() == 0
