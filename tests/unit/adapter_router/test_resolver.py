"""From configured targets to addresses."""

from __future__ import annotations

import re
import socket

import grpc
import pytest

from adapter_router.endpoints.resolver import resolve_target, split_target
from alora_serve.errors import ConfigError, UnavailableError


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("10.0.0.1:50051", ("10.0.0.1", 50051)),
        ("[::1]:50051", ("::1", 50051)),
        ("workers.serving.svc:1", ("workers.serving.svc", 1)),
        ("dns:///workers:1", ("workers", 1)),
    ],
)
def test_targets_are_split(target: str, parts: tuple[str, int]) -> None:
    assert split_target(target) == parts


@pytest.mark.parametrize(
    "target",
    ["", "workers", "workers:", ":1", "::1:1", "workers:99999", "workers:x", "a/b:1", "u@h:1", "unix:/x", "[::1"],
)
def test_what_is_no_target_is_refused_by_name(target: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port") as caught:
        split_target(target)
    assert repr(target) in str(caught.value)


async def test_addresses_stand_for_themselves() -> None:
    assert await resolve_target("127.0.0.1:5") == {"127.0.0.1:5"}
    assert await resolve_target("[::1]:5") == {"[::1]:5"}


async def test_a_name_gives_its_addresses() -> None:
    assert "127.0.0.1:5" in await resolve_target("localhost:5")


async def test_a_name_without_addresses_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"nowhere\.invalid:5"):
        await resolve_target("nowhere.invalid:5")


@pytest.mark.parametrize("host", ["decode..svc", "d" * 64])
async def test_a_host_that_cannot_be_a_name_is_refused_by_name(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{re.escape(host)}:5' has a host that is no name"):
        await resolve_target(f"{host}:5")


async def test_an_ipv6_address_can_be_connected_to() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    server = grpc.aio.server()
    port = server.add_insecure_port("[::1]:0")
    await server.start()
    (address,) = await resolve_target(f"[::1]:{port}")
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
    await server.stop(None)
