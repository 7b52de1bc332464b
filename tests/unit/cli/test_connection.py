from __future__ import annotations

import os

import pytest

from alora_serve.cli.connection import bypass_proxy, connected
from alora_serve.errors import AloraServeError, InvalidRequestError

NO_GRPC_PROXY, NO_PROXY = "no_grpc_proxy", "no_proxy"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NO_GRPC_PROXY, NO_PROXY):
        monkeypatch.setenv(name, "")  # set, so that it is restored


@pytest.mark.parametrize(
    ("address", "host"), [("127.0.0.1:5", "127.0.0.1"), ("localhost:5", "localhost"), ("[::1]:5", "::1")]
)
def test_calls_to_this_machine_go_through_no_proxy(address: str, host: str) -> None:
    os.environ[NO_PROXY] = "internal.example"
    bypass_proxy(address)
    assert os.environ[NO_GRPC_PROXY] == f"internal.example,{host}"


def test_calls_elsewhere_keep_the_proxy_they_have() -> None:
    bypass_proxy("router.example:50051")
    assert os.environ[NO_GRPC_PROXY] == ""


@pytest.mark.parametrize("address", ["router", "router:", ":5", "router:http"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not host:port"), connected(address):
        pass


def test_a_proxy_in_the_environment_does_not_see_calls_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard, grpc says that it failed to connect to the proxy, and not to the address."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(AloraServeError, match=r"127\.0\.0\.1:1\b"), connected("127.0.0.1:1") as client:
        client.get_model(timeout_seconds=1)
