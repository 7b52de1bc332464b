"""Two routers behind Envoy, configured as users are told to: one dies, and no call through our client fails."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from prometheus_client import CollectorRegistry

from alora_serve.cli.local.process import RestartPolicy
from alora_serve.client import AsyncClient, ChatMessage, SamplingParams
from alora_serve.errors import DeadlinePassedError, InvalidRequestError, UnauthenticatedError, UnavailableError
from alora_serve.metrics import RpcMetrics
from alora_serve.rpc.channels import public_options
from alora_serve.rpc.convert import Target, generate_to_proto
from alora_serve.rpc.health import HealthServicer
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.interceptors import CallInterceptor
from alora_serve.types import Prompt
from alora_serve.v1 import alora_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceServicer, AloraServiceStub, add_AloraServiceServicer_to_server
from counted_calls import Counted, kill_in_the_middle, make_calls, read_raw
from deployment import Deployed, another_router
from envoy_proxy import CONFIGURATIONS, Envoy, envoy_in_front_of, envoy_program
from guarded_router import Guarded

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1800)]

CALLS = int(os.environ.get("ALORA_TEST_INTEROP_CALLS", "100"))
REPLACED_AFTER = 20
CALL_SECONDS = 60.0
TURNS = (ChatMessage("user", "The river is wide and slow, and boats go down it. Is it wide?"),)
ASKED = {
    "guard": SamplingParams(max_tokens=24, ignore_eos=True),
    "answer": SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=11),
    "": SamplingParams(max_tokens=24, ignore_eos=True, presence_penalty=0.4),
}
"""What streams ask of whom."""

Call = Callable[[int], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two routers behind Envoy.

    Attributes:
        second: address and process of the one that is killed.
        answers: what each adapter answers, by its name.
        prefix: the tokens of the conversation's handle.
        adapters: the names of all.
    """

    envoy: Envoy
    second: tuple[str, int]
    answers: dict[str, tuple[int, ...]]
    prefix: tuple[int, ...]
    adapters: tuple[str, ...]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(
    serving: Deployed, slow_return: RestartPolicy, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    local, client = serving.local, serving.client
    workers = [local.processes[name].address for name in ("worker-1", "worker-2")]
    answers = {
        adapter: (await client.generate(TURNS, adapter=adapter, sampling=sampling).result()).token_ids
        for adapter, sampling in ASKED.items()
    }
    prefix = (await client.prefill(TURNS)).handle.prefix_tokens
    adapters = tuple(adapter.name for adapter in await client.list_adapters())
    async with another_router([local.processes["prefill"].address], workers, policy=slow_return) as second:
        backends = [local.router_address, second.address]
        async with envoy_in_front_of("routers", backends, tmp_path_factory.mktemp("envoy")) as envoy:
            yield Pair(envoy, (second.address, second.pid), answers, prefix, adapters)


def of_our_client(client: AsyncClient, pair: Pair) -> Call:
    async def call(number: int) -> str:
        adapter = list(ASKED)[number % len(ASKED)]
        match number % 4:
            case 0:
                found: Any = (await client.prefill(TURNS, timeout_seconds=CALL_SECONDS)).handle.prefix_tokens
                return _difference("Prefill", found, pair.prefix)
            case 1:
                found = tuple(listed.name for listed in await client.list_adapters(timeout_seconds=CALL_SECONDS))
                return _difference("ListAdapters", found, pair.adapters)
            case _:
                stream = client.generate(TURNS, adapter=adapter, sampling=ASKED[adapter], timeout_seconds=CALL_SECONDS)
                return _difference(adapter, (await stream.result()).token_ids, pair.answers[adapter])

    return call


def of_a_raw_stub(stub: Any, pair: Pair) -> Call:
    async def call(number: int) -> str:
        adapter = list(ASKED)[number % len(ASKED)]
        request = generate_to_proto(Prompt(messages=TURNS), Target(adapter, ASKED[adapter]))
        match number % 4:
            case 0:
                prefill = alora_pb2.PrefillRequest(prompt=request.prompt)
                packed = (await stub.Prefill(prefill, timeout=CALL_SECONDS)).handle.prefix_token_ids
                return _difference("Prefill", len(packed), 4 * len(pair.prefix))
            case 1:
                response = await stub.ListAdapters(alora_pb2.ListAdaptersRequest(), timeout=CALL_SECONDS)
                return _difference("ListAdapters", tuple(one.name for one in response.adapters), pair.adapters)
            case _:
                found = await read_raw(stub.Generate(request, timeout=CALL_SECONDS))
                return _difference(adapter, found, pair.answers[adapter])

    return call


def _difference(what: str, found: object, expected: object) -> str:
    return "" if found == expected else f"{what or 'base'}: {found} instead of {expected}"


async def test_a_killed_router_fails_no_call_of_ours_and_breaks_only_streams_that_had_begun(
    pair: Pair, record_testsuite_property: Callable[[str, object], None]
) -> None:
    address, pid = pair.second
    async with (
        AsyncClient(pair.envoy.address) as client,
        grpc.aio.insecure_channel(pair.envoy.address, public_options(pair.envoy.address)) as channel,
    ):
        stub: Any = AloraServiceStub(channel)
        ours, others, _ = await asyncio.gather(
            make_calls(of_our_client(client, pair), CALLS),
            make_calls(of_a_raw_stub(stub, pair), CALLS),
            kill_in_the_middle(
                pair.envoy,
                address,
                pid,
                after_calls=CALLS,
                knock=lambda: stub.ListAdapters(alora_pb2.ListAdaptersRequest(), timeout=CALL_SECONDS),
            ),
        )
    record_testsuite_property("routers", f"our client: {ours}; raw stub: {others}")
    assert ours.bad == others.bad == []
    assert (ours.right, ours.cut) == (CALLS, 0)
    assert others.right + others.cut == CALLS
    assert others.cut <= 4, "more than were running"
    assert await pair.envoy.count("upstream_rq_retry_success") > 0
    # Until the new process serves, and not only until Envoy says so: it may not have noticed yet that the old one died.
    async with AsyncClient(address) as direct:
        await direct.wait_ready()
    await pair.envoy.wait_for(lambda backends: backends[address].is_healthy)


class Refusing(AloraServiceServicer):
    """A router that has begun to drain, before health checks have asked it."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.refused = 0

    def look(self) -> None:
        if self.refuses:
            self.refused += 1
            raise UnavailableError("draining")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[alora_pb2.GenerateResponse]:  # noqa: N802
        self.look()
        yield alora_pb2.GenerateResponse()

    async def ListAdapters(self, request: Any, context: Any) -> alora_pb2.ListAdaptersResponse:  # noqa: N802
        self.look()
        return alora_pb2.ListAdaptersResponse()


async def test_what_a_leaving_router_refuses_is_asked_of_the_other(tmp_path: Path) -> None:
    servicers = Refusing(refuses=True), Refusing(refuses=False)
    async with AsyncExitStack() as stack:
        addresses = []
        for servicer in servicers:
            server = grpc.aio.server(interceptors=[CallInterceptor(RpcMetrics(CollectorRegistry()), InFlightCalls())])
            add_AloraServiceServicer_to_server(servicer, server)
            add_HealthServicer_to_server(HealthServicer(["alora_serve.v1.AloraService"]), server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, None)
        envoy = await stack.enter_async_context(envoy_in_front_of("routers", addresses, tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(envoy.address))
        stub: Any = AloraServiceStub(channel)
        for _ in range(20):
            await stub.ListAdapters(alora_pb2.ListAdaptersRequest())
            assert len([response async for response in stub.Generate(alora_pb2.GenerateRequest())]) == 1
    assert servicers[0].refused > 0


async def test_a_router_that_is_replaced_breaks_nothing_of_anybody(serving: Deployed, pair: Pair) -> None:
    async with grpc.aio.insecure_channel(pair.envoy.address, public_options(pair.envoy.address)) as channel:

        async def replace_it() -> None:
            await pair.envoy.wait_for_calls(REPLACED_AFTER)
            await serving.local.restart("router")

        others, _ = await asyncio.gather(
            make_calls(of_a_raw_stub(AloraServiceStub(channel), pair), 4 * REPLACED_AFTER), replace_it()
        )
    assert others == Counted(right=4 * REPLACED_AFTER)


async def test_ids_deadlines_and_refusals_pass_as_they_are(pair: Pair) -> None:
    async with (
        AsyncClient(pair.envoy.address) as client,
        grpc.aio.insecure_channel(pair.envoy.address, public_options(pair.envoy.address)) as channel,
    ):
        stub: Any = AloraServiceStub(channel)
        call = stub.ListAdapters(alora_pb2.ListAdaptersRequest(), metadata=(("x-request-id", "of-the-client"),))
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "of-the-client"
        with pytest.raises(InvalidRequestError) as refused:
            await client.generate(TURNS, top_p=0).result()
        assert [violation.field for violation in refused.value.violations] == ["sampling.top_p"]
        with pytest.raises(DeadlinePassedError):
            await client.generate(TURNS, max_tokens=1500, ignore_eos=True, timeout_seconds=0.3).result()


async def test_tls_as_documented_on_both_sides(guarded: Guarded, tmp_path: Path) -> None:
    page = (CONFIGURATIONS.parents[1] / "docs" / "envoy.md").read_text()
    for name, file in {
        "tls.crt": guarded.server_file,
        "tls.key": guarded.server_file,
        "ca.crt": guarded.ca_file,
    }.items():
        page = page.replace(f"/etc/envoy/{name}", str(file))
    to_clients, to_routers = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))

    def add_tls(listener: Any, cluster: Any) -> None:
        listener["filter_chains"][0] |= to_clients
        cluster |= to_routers

    async with envoy_in_front_of("routers", [guarded.address], tmp_path, add_tls) as envoy:
        behind = replace(guarded, address=envoy.address)
        async with behind.client("user") as client:
            answer = await client.generate(TURNS, adapter="guard", sampling=ASKED["guard"]).result()
            assert len(answer.token_ids) == ASKED["guard"].max_tokens
        async with behind.client() as nobody:
            with pytest.raises(UnauthenticatedError):
                await nobody.list_adapters()


@pytest.mark.parametrize("name", ["routers", "workers"])
async def test_envoy_takes_the_files_as_they_are(name: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(envoy_program(), "--mode", "validate", "--config-path", CONFIGURATIONS / f"{name}.yaml"),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    _, told = await process.communicate()
    assert process.returncode == 0, told.decode()
    assert "deprecated" not in told.decode().lower()
