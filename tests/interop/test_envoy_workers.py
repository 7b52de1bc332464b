"""Decode workers behind Envoy, balanced by the load they report: one dies, and streams go on at the other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from alora_serve.client import ChatMessage, RetryPolicy, SamplingParams
from alora_serve.client.async_streams import AsyncGenerationStream
from alora_serve.client.retry import Retries
from alora_serve.rpc.channels import internal_channel
from alora_serve.rpc.convert import Target, generate_to_proto
from alora_serve.types import Prompt
from alora_serve.v1 import adapter_decode_pb2 as pb
from alora_serve.v1 import alora_pb2
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceStub
from counted_calls import Counted, kill_in_the_middle, make_calls, read_raw
from deployment import Deployed
from envoy_proxy import Backend, Envoy, envoy_in_front_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1800)]

CALLS = int(os.environ.get("ALORA_TEST_INTEROP_CALLS", "100"))
CALL_SECONDS = 60.0
TURNS = (ChatMessage("user", "Bread is made of flour, water, salt and time. What is it made of?"),)
SAMPLING = {
    "guard": SamplingParams(max_tokens=24, ignore_eos=True, seed=1),
    "answer": SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=11),
    "": SamplingParams(max_tokens=24, ignore_eos=True, presence_penalty=0.4, seed=2),
}
HELD_SEQUENCES = 24
"""Streams that keep a worker busy: nearly all of its batch."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Two workers behind Envoy.

    Attributes:
        stub: of AdapterDecodeService, through Envoy.
        requests: what is asked of each adapter, as routers would be asked: by the handle of one conversation.
        answers: what each answers.
    """

    envoy: Envoy
    stub: Any
    requests: dict[str, alora_pb2.GenerateRequest]
    answers: dict[str, tuple[int, ...]]

    def decode(self, request: alora_pb2.GenerateRequest, timeout_seconds: float | None) -> Any:
        """A worker's stream for a request to a router: how an expert makes the client's streams run on workers."""
        return self.stub.Decode(decode_request(request), timeout=timeout_seconds)

    async def list_adapters(self) -> Any:
        return await self.stub.ListAdapters(pb.AdapterDecodeServiceListAdaptersRequest(), timeout=CALL_SECONDS)


def decode_request(request: alora_pb2.GenerateRequest) -> pb.DecodeRequest:
    resume = request.resume if request.HasField("resume") else None
    return pb.DecodeRequest(
        handle=request.prompt.handle, adapter=request.adapter, sampling=request.sampling, resume=resume
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def workers(serving: Deployed, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Workers]:
    backends = [serving.local.processes[name].address for name in ("worker-1", "worker-2")]
    handle = (await serving.client.prefill(TURNS)).handle
    requests = {
        adapter: generate_to_proto(Prompt(handle=handle), Target(adapter, sampling))
        for adapter, sampling in SAMPLING.items()
    }
    answers = {
        adapter: (await serving.client.generate(handle=handle, adapter=adapter, sampling=sampling).result()).token_ids
        for adapter, sampling in SAMPLING.items()
    }
    async with (
        envoy_in_front_of("workers", backends, tmp_path_factory.mktemp("envoy")) as envoy,
        internal_channel(envoy.address) as channel,
    ):
        yield Workers(envoy, AdapterDecodeServiceStub(channel), requests, answers)


async def test_envoy_gives_a_busy_worker_less(
    serving: Deployed, workers: Workers, record_testsuite_property: Callable[[str, object], None]
) -> None:
    busy, idle = (serving.local.processes[name].address for name in ("worker-1", "worker-2"))
    longest = alora_pb2.GenerateRequest()
    longest.CopyFrom(workers.requests["guard"])
    longest.sampling.max_tokens = 1500
    async with internal_channel(busy) as channel:
        direct: Any = AdapterDecodeServiceStub(channel)
        held = [direct.Decode(decode_request(longest), timeout=CALL_SECONDS) for _ in range(HELD_SEQUENCES)]
        try:
            await asyncio.gather(*(stream.read() for stream in held))
            weighted = await asyncio.wait_for(_asked_until_weighted(workers, busy, idle), CALL_SECONDS)
            before = await workers.envoy.backends()
            await make_calls(_short(workers), 60)
            after = await workers.envoy.backends()
        finally:
            for stream in held:
                stream.cancel()
    shares = {name: after[place].calls - before[place].calls for name, place in (("busy", busy), ("idle", idle))}
    record_testsuite_property("weights", f"{weighted[busy].weight} busy, {weighted[idle].weight} idle; calls {shares}")
    assert weighted[idle].weight > weighted[busy].weight
    assert shares["idle"] > 2 * shares["busy"]


async def _asked_until_weighted(workers: Workers, busy: str, idle: str) -> dict[str, Backend]:
    """Make calls until Envoy prefers the idle worker. A worker is weighed by the reports that its answers carry."""
    while True:
        counted = await make_calls(_short(workers), 8)
        assert counted.bad == []
        backends = await workers.envoy.backends()
        if backends[idle].weight > backends[busy].weight:
            return backends


def _short(workers: Workers) -> Callable[[int], Awaitable[str]]:
    request = alora_pb2.GenerateRequest()
    request.CopyFrom(workers.requests["guard"])
    request.sampling.max_tokens = 2

    async def call(number: int) -> str:
        return "" if await read_raw(workers.decode(request, CALL_SECONDS)) else "no token"

    return call


async def test_a_killed_worker_fails_no_call_of_ours_and_breaks_only_streams_that_had_begun(
    serving: Deployed, workers: Workers, record_testsuite_property: Callable[[str, object], None]
) -> None:
    second = serving.local.processes["worker-2"]

    async def of_ours(number: int) -> str:
        adapter = list(SAMPLING)[number % len(SAMPLING)]
        retries = Retries(RetryPolicy(), CALL_SECONDS)
        found = await AsyncGenerationStream(workers.decode, workers.requests[adapter], retries).result()
        return _difference(adapter, found.token_ids)

    async def of_a_raw_stub(number: int) -> str:
        if number % 4 == 0:
            names = {adapter.name for adapter in (await workers.list_adapters()).adapters}
            return "" if names == set(SAMPLING) - {""} | {"plain"} else f"listed {names}"
        adapter = list(SAMPLING)[number % len(SAMPLING)]
        return _difference(adapter, await read_raw(workers.decode(workers.requests[adapter], CALL_SECONDS)))

    def _difference(adapter: str, found: tuple[int, ...]) -> str:
        expected = workers.answers[adapter]
        return "" if found == expected else f"{adapter or 'base'}: {found} instead of {expected}"

    ours, others, _ = await asyncio.gather(
        make_calls(of_ours, CALLS),
        make_calls(of_a_raw_stub, CALLS),
        kill_in_the_middle(workers.envoy, second.address, second.pid, after_calls=CALLS, knock=workers.list_adapters),
    )
    record_testsuite_property("workers", f"our client: {ours}; raw stub: {others}")
    assert ours == Counted(right=CALLS)
    assert others.bad == []
    assert others.right + others.cut == CALLS
    assert others.cut <= 4, "more than were running"
    assert await workers.envoy.count("upstream_rq_retry_success") > 0
