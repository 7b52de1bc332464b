"""Plain text stays on this machine, on both sides of the front door, unless it is allowed to leave."""

from __future__ import annotations

import pytest

from alora_serve.errors import ConfigError
from alora_serve.rpc.listening import listens_with_tls
from alora_serve.rpc.tls import ClientTls
from openai_front.config import Settings

ELSEWHERE = "192.0.2.1:50051"


def test_listening_elsewhere_needs_a_certificate_or_a_word() -> None:
    with pytest.raises(ConfigError, match="listen"):
        listens_with_tls(Settings(listen="0.0.0.0:8000"))
    assert not listens_with_tls(Settings(listen="0.0.0.0:8000", allow_insecure=True))
    assert not listens_with_tls(Settings())
    assert listens_with_tls(Settings(listen="0.0.0.0:8000", tls_cert_file="c", tls_key_file="k"))


def test_calling_elsewhere_needs_a_certificate_or_a_word() -> None:
    with pytest.raises(ConfigError, match="router_address"):
        Settings(router_address=ELSEWHERE).router_tls()
    assert Settings(router_address=ELSEWHERE, allow_insecure=True).router_tls() is None
    assert Settings().router_tls() is None
    assert Settings(router_address=ELSEWHERE, router_tls_ca_file="ca").router_tls() == ClientTls(
        "ca", settings="router_tls"
    )


@pytest.mark.parametrize("half", [{"router_tls_cert_file": "c"}, {"router_tls_key_file": "k"}])
def test_half_of_a_certificate_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="together"):
        Settings(router_tls_ca_file="ca", **half).router_tls()


def test_a_certificate_is_shown_over_tls_alone() -> None:
    with pytest.raises(ConfigError, match="router_tls_ca_file"):
        Settings(router_tls_cert_file="c", router_tls_key_file="k").router_tls()
