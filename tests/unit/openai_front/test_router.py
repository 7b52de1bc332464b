"""The connection to the router outlives its certificates' replacement, also when that takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from alora_serve.errors import ConfigError
from alora_serve.rpc.tls import ClientTls
from openai_front.config import Settings
from openai_front.router import Router


async def test_certificates_that_are_gone_for_a_moment_fail_no_request(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_text("first")
    router = Router("127.0.0.1:1", ClientTls(str(authority)))

    def channel() -> object:
        return router.as_caller(None, "id")._channel

    before = channel()
    assert channel() is before
    authority.unlink()
    with capture_logs() as logs:
        assert channel() is before
        assert channel() is before
    assert [line["log_level"] for line in logs] == ["error"], "complained about once"
    authority.write_text("second")
    assert channel() is not before
    await router.close()


async def test_a_router_whose_certificates_never_were_there_is_a_wrong_setting(tmp_path: Path) -> None:
    tls = Settings(router_tls_ca_file=str(tmp_path / "ca.crt")).router_tls()
    with pytest.raises(ConfigError, match=r"^router_tls_ca_file"):
        Router("127.0.0.1:1", tls)
