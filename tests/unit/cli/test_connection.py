"""The client that commands use reaches the router that the environment describes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve.cli.connection import connected
from alora_serve.errors import ConfigError, InvalidRequestError, UnavailableError


@pytest.fixture
def named_elsewhere(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server whose certificate knows a public name alone, and the file of who signed it."""
    authority, ca_file = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    issued = authority.issue_cert("alora.example.com")
    credentials = grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), b"".join(pem.bytes() for pem in issued.cert_chain_pems))]
    )
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}", ca_file
    server.stop(None)


@pytest.mark.parametrize("address", ["router", "router:", ":5", "router:http"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not host:port"), connected(address):
        pass


def test_a_certificate_may_carry_another_name_than_the_address(
    named_elsewhere: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, ca_file = named_elsewhere
    monkeypatch.setenv("ALORA_CLIENT_TLS_CA_FILE", str(ca_file))
    monkeypatch.setenv("ALORA_CLIENT_TLS_SERVER_NAME", "alora.example.com")
    with connected(address) as client:
        client.wait_ready(30)
    monkeypatch.delenv("ALORA_CLIENT_TLS_SERVER_NAME")
    with connected(address) as client, pytest.raises(UnavailableError):
        client.wait_ready(2)


def test_a_certificate_that_is_not_there_is_told_by_the_variable_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALORA_CLIENT_TLS_CA_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(ConfigError, match=r"^client_tls_ca_file"), connected("127.0.0.1:1"):
        pass


def test_who_mistyped_an_address_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr("alora_serve.client.retry.time", SimpleNamespace(monotonic=lambda: 1000.0 + sum(slept)))
    with connected("127.0.0.1:1") as client, monkeypatch.context() as pauses:
        pauses.setattr(client, "_closed", SimpleNamespace(wait=slept.append))
        with pytest.raises(UnavailableError):
            client.get_model()
    assert 1 < sum(slept) < 6
