"""A service whose engine hangs, though its event loop answers: another one is asked, and it says that it is lost."""

from __future__ import annotations

import asyncio
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from adapter_router.endpoints.endpoint import EndpointOptions
from alora_serve.client import ChatMessage
from alora_serve.engine import pulse
from alora_serve.metrics import RequestMetrics
from alora_serve.model.loader import load_base_model
from alora_serve.rpc.channels import internal_channel
from alora_serve.rpc.health import LIVENESS
from alora_serve.rpc.prefill_servicer import BasePrefillServicer
from alora_serve.types import EndpointStatus
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.base_prefill_pb2_grpc import add_BasePrefillServiceServicer_to_server
from deployment import PATIENCE_SECONDS, WORKER, ServedModel, deployed
from fake_services import FakeWorker, healthy, router_on, start_server, start_worker, until
from in_process import MemoryStore, Stack, open_stack

PROMPT = types_pb2.Prompt(token_ids=torch.arange(5, 45, dtype=torch.int32).numpy().tobytes())
TURNS: Final = [ChatMessage("user", "The ferry crosses at noon. When does it cross?")]
OTHER_TURNS: Final = [ChatMessage("user", "The bell rings twice. How often does it ring?")]
HANGING: Final = Path(__file__).parent / "hanging_engine"


def hang(stack: Stack, release: threading.Event) -> threading.Event:
    """Have the stack's next step wait for ``release``; the event says that it does."""
    runner: Any = stack.core.engine._stepper._runner
    forward, arrived = runner.forward, threading.Event()

    def held(*args: Any) -> Any:
        arrived.set()
        release.wait(60)
        return forward(*args)

    runner.forward = held
    return arrived


async def test_a_prefill_goes_elsewhere_when_its_engine_hangs_and_its_event_loop_does_not(
    tiny_model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LEAST_SECONDS", 0.3)
    model = load_base_model(tiny_model.directory, dtype="float32")
    release = threading.Event()
    async with open_stack(model, MemoryStore()) as first, open_stack(model, MemoryStore()) as second:
        stacks, servers = (first, second), []
        for stack in stacks:
            servicer = BasePrefillServicer(
                stack.prefiller, stack.core.status, stack.core.is_alive, RequestMetrics(CollectorRegistry())
            )
            servers.append(await start_server(partial(add_BasePrefillServiceServicer_to_server, servicer)))
        worker = await start_worker(FakeWorker(status=EndpointStatus(model=first.core.model_info())))
        options = EndpointOptions(silence_seconds=1.5, wait_seconds=1.0)
        addresses = [server.address for server in servers]
        try:
            async with router_on(addresses, [worker.address], options=options) as router:
                await router.settled(2, 1)
                arrived = [hang(stack, release) for stack in stacks]
                call = router.stub.Prefill(alora_pb2.PrefillRequest(prompt=PROMPT))
                await until(lambda: any(event.is_set() for event in arrived))
                hung = 0 if arrived[0].is_set() else 1
                assert not arrived[1 - hung].is_set()
                del stacks[1 - hung].core.engine._stepper._runner.forward  # type: ignore[attr-defined]
                response = await asyncio.wait_for(asyncio.ensure_future(call), 30)
                assert response.usage.computed_tokens == 40, "by the other one"
                assert healthy(router.prefills) == 1
                release.set()
                await router.settled(2, 1)
        finally:
            release.set()
            for server in (*servers, worker):
                await server.kill()


@pytest.mark.parametrize("process", ["prefill", WORKER])
async def test_a_process_whose_engine_hangs_for_long_is_not_alive(
    tiny_model: ServedModel, process: str, tmp_path: Path
) -> None:
    mark = tmp_path / "hangs"
    path = os.pathsep.join([str(HANGING), *filter(None, [os.environ.get("PYTHONPATH")])])
    async with deployed(tiny_model, f"lmdb://{tmp_path}/kv") as running:
        handle = (await running.client.prefill(TURNS)).handle
        environment = {"PYTHONPATH": path, "HANGS_WHILE_THERE_IS": str(mark)}
        await running.local.restart(process, environment=environment)
        address = (await running.local.wait_listening(process)).address
        async with internal_channel(address) as channel:
            assert await is_alive(channel)
            mark.touch()
            asked = running.client.prefill(OTHER_TURNS) if process == "prefill" else running.ask(handle, "guard")
            asking = asyncio.ensure_future(asked)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await is_alive(channel):  # noqa: ASYNC110  # asked over the network
                    await asyncio.sleep(0.05)
                mark.unlink()
                while not await is_alive(channel):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            asking.cancel()


async def is_alive(channel: Any) -> bool:
    """As a probe is told."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    told = await health.Check(health_pb2.HealthCheckRequest(service=LIVENESS))
    return bool(told.status == health_pb2.HealthCheckResponse.SERVING)
