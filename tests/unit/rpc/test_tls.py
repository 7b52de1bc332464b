"""Servers and clients speak TLS from files, ask each other who they are, and take renewed certificates up."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve.errors import ConfigError
from alora_serve.rpc.channels import internal_channel
from alora_serve.rpc.health import HealthServicer
from alora_serve.rpc.tls import ClientTls, ServerTls
from redis_servers import Certificates, make_certificates


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path)


async def serve(tls: ServerTls) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer([]), server)
    port = server.add_secure_port("127.0.0.1:0", tls.credentials())
    await server.start()
    return server, f"127.0.0.1:{port}"


async def is_answered(address: str, tls: ClientTls | None) -> bool:
    async with internal_channel(address, tls=tls) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.aio.AioRpcError:
            return False
        return True


async def test_a_server_is_known_by_its_authority_and_nobody_speaks_plainly(
    files: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = make_certificates(tmp_path / "other")
    server, address = await serve(ServerTls(str(files.server_file), str(files.server_file)))
    assert await is_answered(address, ClientTls(str(files.ca_file)))
    assert await is_answered(address, ClientTls(str(files.ca_file), server_name="localhost"))
    assert not await is_answered(address, ClientTls(str(files.ca_file), server_name="elsewhere"))
    assert not await is_answered(address, ClientTls(str(stranger.ca_file)))
    assert not await is_answered(address, None)
    await server.stop(None)


async def test_a_server_that_asks_lets_in_whom_its_authority_signed(files: Certificates) -> None:
    client = str(files.client_file)
    server, address = await serve(ServerTls(str(files.server_file), str(files.server_file), str(files.ca_file)))
    assert await is_answered(address, ClientTls(str(files.ca_file), client, client))
    assert not await is_answered(address, ClientTls(str(files.ca_file)))
    await server.stop(None)


async def test_a_renewed_certificate_is_used_from_the_next_connection_on(files: Certificates, tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    renewed = make_certificates(tmp_path / "next")
    server, address = await serve(ServerTls(str(files.server_file), str(files.server_file)))
    old, new = ClientTls(str(files.ca_file)), ClientTls(str(renewed.ca_file))
    assert (await is_answered(address, old), await is_answered(address, new)) == (True, False)
    before = old.versions()
    renewed.server_file.replace(files.server_file)
    assert (await is_answered(address, old), await is_answered(address, new)) == (False, True)
    assert old.versions() == before, "its own files are as they were"
    files.server_file.write_text("half a certifi")
    assert await is_answered(address, new), "a file without a certificate changes nothing"
    files.server_file.unlink()
    assert await is_answered(address, new), "a file that is gone changes nothing"
    await server.stop(None)


def test_a_server_tells_when_what_it_shows_expires_and_not_what_it_could_not_take_up(files: Certificates) -> None:
    key_file = files.server_file.with_name("key.pem")
    key_file.write_bytes(files.server_file.read_bytes())
    tls = ServerTls(str(files.server_file), str(key_file))
    first = tls.expires_at()
    assert first > time.time()
    key_file.rename(key_file.with_suffix(".away"))
    files.expired_file.replace(files.server_file)
    assert tls.expires_at() == first, "without its key the new certificate is not in use"
    key_file.with_suffix(".away").rename(key_file)
    assert tls.expires_at() < time.time()


def test_a_file_that_cannot_be_read_is_named(files: Certificates, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match="absent"):
        ServerTls(absent, str(files.server_file)).credentials()
    with pytest.raises(ConfigError, match="absent"):
        ClientTls(absent).credentials()
    assert ClientTls(absent).versions() != ClientTls(str(files.ca_file)).versions()
