"""Channel and server arguments do what their reasons say."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alora_serve.rpc.channels import (
    DEFAULT_MESSAGE_BYTES,
    internal_channel,
    is_this_machine,
    message_bytes_for_context,
    public_options,
    server_options,
)
from alora_serve.rpc.health import HealthServicer

TIMEOUT_SECONDS = 30.0
_Status = health_pb2.HealthCheckResponse


async def test_a_second_server_cannot_take_the_same_port() -> None:
    first = grpc.aio.server(options=server_options())
    port = first.add_insecure_port("127.0.0.1:0")
    second = grpc.aio.server(options=server_options())
    with pytest.raises(RuntimeError):
        second.add_insecure_port(f"127.0.0.1:{port}")
    await first.stop(0)
    await second.stop(0)


async def check(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    return int(answer.status)


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a proxy in the environment, where nobody listens."""
    for variable in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    return "127.0.0.1:1"


async def test_a_proxy_in_the_environment_never_takes_calls_to_this_machine(dead_proxy: str) -> None:
    server = grpc.aio.server(options=server_options())
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer([]), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with internal_channel(f"127.0.0.1:{port}") as channel:
        assert await check(channel) == _Status.SERVING
    for target in (f"127.0.0.1:{port}", f"localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        async with grpc.aio.insecure_channel(target, options=public_options(target)) as channel:
            assert await check(channel) == _Status.SERVING
    await server.stop(0)


async def test_a_proxy_in_the_environment_takes_users_calls_elsewhere(dead_proxy: str) -> None:
    target = "router.invalid:50051"
    async with grpc.aio.insecure_channel(target, options=public_options(target)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dead_proxy in str(caught.value.details()), "it was the proxy that was called"


@pytest.mark.parametrize(
    ("target", "is_this"),
    [
        ("localhost:50051", True),
        ("LocalHost", True),
        ("dns:///localhost:50051", True),
        ("dns://8.8.8.8/localhost:50051", True),
        ("127.0.0.1:50051", True),
        ("127.8.9.1:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("ipv6:[::1]:50051", True),
        ("unix:/run/router.sock", True),
        ("unix:///run/router.sock", True),
        ("unix-abstract:router", True),
        ("router:50051", False),
        ("localhost.example:50051", False),
        ("127.0.0.1.example:50051", False),
        ("dns:///router.example:50051", False),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:50051", False),
        ("2001:db8::1", False),
    ],
)
def test_this_machine_is_told_from_others(target: str, is_this: bool) -> None:
    assert is_this_machine(target) is is_this


async def test_a_users_calls_go_to_all_routers_of_a_name_and_then_to_those_that_are_left() -> None:
    servers, ports = [], []
    for serving in (True, False):  # so that answers tell who gave them
        server = grpc.aio.server(options=server_options())
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer([], serving=serving), server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        servers.append(server)
        await server.start()
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    try:
        async with grpc.aio.insecure_channel(target, options=public_options(target)) as channel:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while len({await check(channel) for _ in range(2)}) < 2:  # one connection may come later than the other
                    pass
            await servers[0].stop(0)
            assert {await check(channel) for _ in range(4)} == {_Status.NOT_SERVING}
    finally:
        for server in servers:
            await server.stop(0)


async def _codes_of_a_server_that_stands_still(seconds: float, options: list[tuple[str, int | str]]) -> set[str]:
    server = grpc.aio.server(options=options)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer([]), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def code_of_one_call(_: int) -> str:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                call: Any = error
                return str(call.code().name)
            return "OK"

    with ThreadPoolExecutor(4) as threads:
        codes = [asyncio.wrap_future(threads.submit(code_of_one_call, number)) for number in range(4)]
        # gRPC's own threads receive the calls; this one, which would take them up, does not run.
        time.sleep(seconds)  # noqa: ASYNC251
        try:
            return set(await asyncio.gather(*codes))
        finally:
            await server.stop(0)


async def test_grpc_does_not_cancel_calls_that_a_busy_server_comes_to_late() -> None:
    name = "grpc.server_max_unrequested_time_in_server"
    # Where the limit is shorter than the server's standstill, the calls that wait are cancelled: gRPC knows the name.
    impatient = list({**dict(server_options()), name: 1}.items())
    assert "CANCELLED" in await _codes_of_a_server_that_stands_still(2.5, impatient)
    assert await _codes_of_a_server_that_stands_still(2.5, server_options()) == {"OK"}


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client says first, with an empty SETTINGS frame (RFC 9113, 3.4)."""
PING, GOAWAY, ACK = 6, 7, 1


async def test_a_client_that_pings_many_times_in_a_row_keeps_its_connection() -> None:
    """As gRPC's own do after they were too busy to read what came."""
    server = grpc.aio.server(options=server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(PREFACE)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            for number in range(20):
                writer.write(bytes((0, 0, 8, PING, 0, 0, 0, 0, 0)) + number.to_bytes(8))
                header = b""
                while header[3:5] != bytes((PING, ACK)):
                    header = await reader.readexactly(9)
                    await reader.readexactly(int.from_bytes(header[:3]))
                    assert header[3] != GOAWAY, f"the server ends the connection, and all its calls, at ping {number}"
    finally:
        writer.close()
        await server.stop(0)


def test_a_connection_outlives_every_stream_that_it_began() -> None:
    options = dict(server_options())
    assert int(options["grpc.max_connection_age_grace_ms"]) > int(options["grpc.max_connection_age_ms"])


def test_the_message_limit_follows_the_context() -> None:
    tokens = 131_072
    assert message_bytes_for_context(8_192) < message_bytes_for_context(tokens) <= DEFAULT_MESSAGE_BYTES
    assert message_bytes_for_context(tokens) > 4 * 2 * tokens, "a handle and the text of as many tokens fit"


@pytest.mark.parametrize("tokens", [8_192, 131_072, 1_000_000, 10_000_000])
def test_grpc_takes_every_request_that_a_model_takes(tokens: int) -> None:
    received = int(dict(server_options())["grpc.max_receive_message_length"])
    assert message_bytes_for_context(tokens) <= received
    assert received >= 4 * DEFAULT_MESSAGE_BYTES, "what is refused for its size can still be told by what"
