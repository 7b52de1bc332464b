"""A real router whose collector is slow, deaf or away: requests never notice, and what can be sent is."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from alora_serve.cli.local.events import Exited, LogLine
from alora_serve.client import AsyncClient
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceStub
from deployment import PATIENCE_SECONDS, another_router
from fake_services import SECRET, FakePrefill, FakeWorker, start_prefill, start_worker, until
from trace_collector import collector

ASK = alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")]))
CALL_SECONDS = 8.0
"""Less than an exporter waits for a collector: a request that waited for it would be too late."""


@dataclass
class Traced:
    """A router, and what became of it."""

    stub: Any = None
    log: list[str] = field(default_factory=list)
    exits: list[Exited] = field(default_factory=list)

    def emit(self, event: object) -> None:
        if isinstance(event, LogLine):
            self.log.append(event.line)
        if isinstance(event, Exited):
            self.exits.append(event)

    def logged(self, event: str) -> bool:
        return any(event in line for line in self.log)

    async def ask(self, times: int) -> None:
        for _ in range(times):
            responses = [response async for response in self.stub.Generate(ASK, timeout=CALL_SECONDS)]
            assert responses[-1].event.HasField("finished")


@asynccontextmanager
async def router(collector_address: str, **variables: str) -> AsyncIterator[Traced]:
    """A router between scripted services; leaving drains it."""
    traced = Traced()
    prefill, worker = await start_prefill(FakePrefill()), await start_worker(FakeWorker())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector_address}")
        for name, value in variables.items():
            environment.setenv(name, value)
        async with (
            another_router(
                [prefill.address], [worker.address], traced.emit, handle_secrets=SECRET.decode()
            ) as listening,
            grpc.aio.insecure_channel(listening.address) as channel,
        ):
            traced.stub = AloraServiceStub(channel)
            async with AsyncClient(listening.address) as client:
                await client.wait_ready(PATIENCE_SECONDS)
            yield traced
    await prefill.kill()
    await worker.kill()


@pytest.fixture
def refusing() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as briefly:
        return f"127.0.0.1:{briefly.getsockname()[1]}"


SMALL = {"OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8", "OTEL_BSP_SCHEDULE_DELAY": "10"}


async def test_a_collector_that_is_away_costs_spans_and_no_request(refusing: str) -> None:
    async with router(refusing, **SMALL) as traced:
        await traced.ask(50)
        await until(lambda: traced.logged("UNAVAILABLE"))
    assert [end.status for end in traced.exits] == [0]


async def test_a_collector_that_never_answers_costs_spans_and_no_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and says nothing
        async with router(f"127.0.0.1:{deaf.getsockname()[1]}", **SMALL) as traced:
            await traced.ask(50)
            await until(lambda: traced.logged("Queue full"))
    assert traced.logged("last spans not sent"), "the end waits no longer than it may"
    assert [end.status for end in traced.exits] == [0]


async def test_spans_flow_again_once_the_collector_is_back(refusing: str) -> None:
    async with router(refusing, OTEL_BSP_SCHEDULE_DELAY="10", OTEL_EXPORTER_OTLP_TIMEOUT="1") as traced:
        await traced.ask(1)
        await until(lambda: traced.logged("UNAVAILABLE"))
        with collector(refusing) as collecting:
            while not collecting.spans():
                await traced.ask(1)
    assert {span.service for span in collecting.spans()} == {"adapter-router"}


async def test_a_drain_sends_the_last_spans() -> None:
    with collector() as collecting:
        async with router(collecting.address, OTEL_BSP_SCHEDULE_DELAY="600000") as traced:
            await traced.ask(3)
            assert not collecting.spans(), "they wait for their batch"
        served = [span for span in collecting.spans() if span.name.endswith("AloraService/Generate")]
        assert len(served) == 3
    assert [end.status for end in traced.exits] == [0]
