from __future__ import annotations

from types import SimpleNamespace

import pytest

from alora_serve.cli.connection import connected
from alora_serve.errors import InvalidRequestError, UnavailableError


@pytest.mark.parametrize("address", ["router", "router:", ":5", "router:http"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not host:port"), connected(address):
        pass


def test_who_mistyped_an_address_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: 1000.0 + sum(slept))
    monkeypatch.setattr("alora_serve.client.synchronous.time", clock)
    monkeypatch.setattr("alora_serve.client.retry.time", clock)
    with connected("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.get_model()
    assert 1 < sum(slept) < 6
