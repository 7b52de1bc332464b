"""What real services say about themselves: health, reflection, status streams, metrics, models and adapters."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from alora_serve.client import AsyncClient, RetryPolicy, TokenChunk
from alora_serve.errors import UnavailableError
from alora_serve.kv.fingerprints import STRIDE_TOKENS
from alora_serve.rpc.channels import internal_channel
from deployment import ANSWER_TOKENS, BLOCK_TOKENS, PATIENCE_SECONDS, TINY_CONTEXT_TOKENS, WORKER, Deployed, lone_router

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

SERVICES = {
    "router": "alora_serve.v1.AloraService",
    "prefill": "alora_serve.v1.BasePrefillService",
    WORKER: "alora_serve.v1.AdapterDecodeService",
}
MANY = TINY_CONTEXT_TOKENS // 2
"""Tokens that nobody here waits for."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("process", SERVICES)
async def test_reflection_lists_the_service_and_describes_its_messages(tiny: Deployed, process: str) -> None:
    async def requests() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[process])

    async with internal_channel(tiny.local.processes[process].address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, described = [answer async for answer in stub.ServerReflectionInfo(requests())]
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICES[process], "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("process", SERVICES)
async def test_health_answers_check_and_watch_for_the_process_and_its_service(tiny: Deployed, process: str) -> None:
    async with internal_channel(tiny.local.processes[process].address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICES[process]):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(request)).status == SERVING
            watch = health.Watch(request)
            assert (await watch.read()).status == SERVING
            watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_router_serves_while_there_is_a_worker_and_again_when_it_is_back(tiny: Deployed) -> None:
    health: Any = health_pb2_grpc.HealthStub(tiny.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICES["router"]))
    assert (await watch.read()).status == SERVING
    await tiny.local.kill(WORKER)
    assert (await watch.read()).status == NOT_SERVING
    assert (await watch.read()).status == SERVING
    watch.cancel()
    await tiny.local.wait_ready()


async def test_a_router_that_knows_no_model_does_not_serve_and_says_so_at_once(tiny: Deployed) -> None:
    async with lone_router(prefill=tiny.local.processes["prefill"].address) as address:
        async with internal_channel(address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:
            for call in (client.generate("Hello?").result(), client.prefill("Hello?"), client.get_model()):
                with pytest.raises(UnavailableError, match="retry later"):
                    await call
            assert await client.list_adapters() == []


async def test_metrics_count_what_each_service_did(tiny: Deployed) -> None:
    def samples() -> dict[str, Any]:
        decoded, prefilled = "/alora_serve.v1.AdapterDecodeService/Decode", "/alora_serve.v1.BasePrefillService/Prefill"
        generated = "/alora_serve.v1.AloraService/Generate"
        return {
            "router ok": ("router", "alora_rpc_handled_total", {"method": generated, "code": "OK"}),
            "router generated": ("router", "alora_tokens_total", {"source": "generated"}),
            "router computed": ("router", "alora_tokens_total", {"source": "computed"}),
            "router requests": ("router", "alora_router_requests_total", {"adapter": "guard"}),
            "router first tokens": ("router", "alora_time_to_first_token_seconds_count", {}),
            "prefill ok": ("prefill", "alora_rpc_handled_total", {"method": prefilled, "code": "OK"}),
            "prefill stored": ("prefill", "alora_stored_bytes_total", {}),
            "prefill put": ("prefill", "alora_store_bytes_total", {"operation": "put"}),
            "worker ok": (WORKER, "alora_rpc_handled_total", {"method": decoded, "code": "OK"}),
            "worker ended": (WORKER, "alora_rpc_handled_total", {"method": decoded}),
            "worker generated": (WORKER, "alora_tokens_total", {"source": "generated"}),
            "worker first tokens": (WORKER, "alora_time_to_first_token_seconds_count", {}),
            "worker fetched": (WORKER, "alora_fetched_bytes_total", {}),
            "worker steps": (WORKER, "alora_engine_step_seconds_count", {}),
        }

    async def read() -> dict[str, float]:
        return {key: await tiny.metric(process, name, **labels) for key, (process, name, labels) in samples().items()}

    count = 12
    before = await read()
    results = [
        await tiny.client.generate(
            f"What is counted number {number}?", adapter="guard", max_tokens=ANSWER_TOKENS, ignore_eos=True
        ).result()
        for number in range(count)
    ]
    moved = _difference(before, await read())
    async with asyncio.timeout(PATIENCE_SECONDS):
        while moved["worker ended"] < count:  # a service counts a call after it has answered it
            moved = _difference(before, await read())
    first_tokens = ("router first tokens", "worker first tokens")
    for one_a_request in ("router ok", "router requests", *first_tokens, "prefill ok", "worker ok"):
        assert moved[one_a_request] == count, one_a_request
    assert moved["router generated"] == moved["worker generated"] == count * ANSWER_TOKENS
    assert moved["router computed"] == sum(result.usage.computed_tokens for result in results)
    assert moved["prefill stored"] == sum(result.usage.stored_bytes for result in results)
    assert moved["prefill put"] > moved["prefill stored"], "records have headers"
    assert moved["worker fetched"] == sum(result.usage.fetched_bytes for result in results)
    assert moved["worker steps"] >= count * ANSWER_TOKENS


@pytest.mark.parametrize("process", ["router", WORKER])
async def test_the_first_token_of_an_answer_that_is_not_waited_for_counts(tiny: Deployed, process: str) -> None:
    before = await tiny.metric(process, "alora_time_to_first_token_seconds_count")
    async with tiny.client.generate("Hello?", adapter="guard", max_tokens=MANY, ignore_eos=True) as stream:
        async for event in stream:
            if isinstance(event, TokenChunk):
                break
    await tiny.wait_for_load(running=0)
    assert await tiny.metric(process, "alora_time_to_first_token_seconds_count") == before + 1


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {key: after[key] - before[key] for key in before}


async def test_a_worker_tells_routers_how_busy_it_is(tiny: Deployed) -> None:
    model = await tiny.client.get_model()
    assert (model.architecture, model.dtype, model.block_tokens) == ("LlamaForCausalLM", "float32", BLOCK_TOKENS)
    assert model.context_tokens == TINY_CONTEXT_TOKENS
    async with asyncio.timeout(PATIENCE_SECONDS), aclosing(tiny.statuses()) as statuses:
        status = await anext(statuses)
        assert status.model == model
        assert [adapter.name for adapter in status.adapters] == ["answer", "guard", "plain"]
        assert status.max_running == 8
        assert (status.running, status.queued, status.draining) == (0, 0, False)
        assert (await anext(statuses)).model == model, "told again while nothing changes"
        async with tiny.client.generate("Are you busy?", max_tokens=1500, ignore_eos=True) as stream:
            await anext(stream)
            while (status := await anext(statuses)).running != 1:
                pass
        while (status := await anext(statuses)).running:
            pass
    assert status.step_seconds > 0
    assert status.kv_bytes > 0


async def test_a_worker_tells_routers_what_it_measured_and_which_prefixes_it_holds(tiny: Deployed) -> None:
    handle = (await tiny.client.prefill("Which prefixes are in memory? " * 20)).handle
    assert len(handle.prefix_tokens) > STRIDE_TOKENS
    await tiny.client.generate(handle=handle, adapter="answer", max_tokens=4, ignore_eos=True).result()
    async with asyncio.timeout(PATIENCE_SECONDS), aclosing(tiny.statuses()) as statuses:
        while not (status := await anext(statuses)).resident_prefixes.fingerprints:
            pass
    assert status.resident_prefixes.stride_tokens == STRIDE_TOKENS
    assert status.fetch_bytes_per_second > 0
    assert status.adapter_load_seconds > 0
    assert status.sequence_seconds > 0
    assert status.pending_prefill_tokens == 0


async def test_adapters_are_loaded_and_unloaded_and_reported_by_the_router(tiny: Deployed) -> None:
    async def residency() -> dict[str, bool]:
        return {adapter.name: adapter.resident for adapter in await tiny.client.list_adapters()}

    async def wait_until_resident(*, resident: bool) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await residency())["plain"] is not resident:  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.05)

    loaded = await tiny.client.load_adapter("plain")
    assert (loaded.kind, loaded.rank, loaded.resident) == ("lora", 8, True)
    await wait_until_resident(resident=True)
    await tiny.client.unload_adapter("plain")
    await wait_until_resident(resident=False)
    guard = next(adapter for adapter in await tiny.client.list_adapters() if adapter.name == "guard")
    assert guard.invocation_tokens == tiny.model.invocations["guard"]
    assert guard.target_modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
