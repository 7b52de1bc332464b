"""Channel and server arguments do what their reasons say."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alora_serve.rpc.channels import (
    DEFAULT_MESSAGE_BYTES,
    internal_channel,
    internal_options,
    message_bytes_for_context,
    public_options,
    server_options,
)
from alora_serve.rpc.health import HealthServicer

TIMEOUT_SECONDS = 30.0


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


async def test_a_proxy_in_the_environment_takes_users_traffic_but_never_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.aio.server(options=server_options())
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer([]), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    for variable in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nobody listens there
    async with internal_channel(address) as channel:
        assert await check(channel) == health_pb2.HealthCheckResponse.SERVING
    async with grpc.aio.insecure_channel(address, options=public_options()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(0)


@pytest.mark.parametrize("client", [internal_options(), public_options()], ids=["internal", "public"])
def test_clients_ping_no_more_often_than_servers_allow(client: list[tuple[str, int | str]]) -> None:
    allowed = dict(server_options())["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert int(dict(client)["grpc.keepalive_time_ms"]) > int(allowed)


def test_a_connection_outlives_every_stream_that_it_began() -> None:
    options = dict(server_options())
    assert int(options["grpc.max_connection_age_grace_ms"]) > int(options["grpc.max_connection_age_ms"])


def test_the_message_limit_follows_the_context() -> None:
    tokens = 131_072
    assert message_bytes_for_context(8_192) < message_bytes_for_context(tokens) <= DEFAULT_MESSAGE_BYTES
    assert message_bytes_for_context(tokens) > 4 * 2 * tokens, "a handle and the text of as many tokens fit"
    limited = dict(server_options(message_bytes_for_context(8_192)))
    assert limited["grpc.max_receive_message_length"] == message_bytes_for_context(8_192)
