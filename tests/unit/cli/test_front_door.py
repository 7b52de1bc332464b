"""`alora-serve http` becomes the front door, told what the command line knows of the router."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from alora_serve.cli.front_door import become_front_door
from alora_serve.errors import ConfigError


class Became(Exception):
    """Instead of another process."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments that a process would have become."""
    seen: list[str] = []

    def execute(_: str, arguments: list[str]) -> None:
        seen.extend(arguments)
        raise Became

    monkeypatch.setattr(os, "execv", execute)
    for name in list(os.environ):
        if name.startswith("ALORA_"):
            monkeypatch.delenv(name)
    return seen


def flags(arguments: list[str]) -> dict[str, str]:
    given = arguments[arguments.index("openai_front") + 1 :]
    return dict(zip(given[::2], given[1::2], strict=True))


def test_it_is_told_the_router_and_where_to_listen(became: list[str]) -> None:
    with pytest.raises(Became):
        become_front_door("router:50051", "127.0.0.1:0", log_format="json")
    assert flags(became) == {
        "--router-address": "router:50051",
        "--listen": "127.0.0.1:0",
        "--log-format": "json",
    }


@pytest.mark.parametrize(("variables", "told"), [({}, {"--log-format": "console"}), ({"ALORA_LOG_FORMAT": "json"}, {})])
def test_what_nobody_said_is_left_to_the_settings(
    became: list[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: dict[str, str]
) -> None:
    """A flag would win over variables and the settings file."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Became):
        become_front_door(None, None, log_format=None)
    assert flags(became) == told


def test_what_the_settings_file_says_is_left_to_it(
    became: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("log_format: json\nrouter_tls_ca_file: file.pem\n")
    monkeypatch.setenv("ALORA_CONFIG", str(file))
    monkeypatch.setenv("ALORA_CLIENT_TLS_CA_FILE", "ca.pem")
    with pytest.raises(Became):
        become_front_door("router:50051", None, log_format=None)
    assert flags(became) == {"--router-address": "router:50051"}


def test_it_reaches_the_router_as_the_command_line_does_unless_told_otherwise(
    became: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALORA_CLIENT_TLS_CA_FILE", "ca.pem")
    monkeypatch.setenv("ALORA_CLIENT_TLS_CERT_FILE", "cert.pem")
    monkeypatch.setenv("ALORA_CLIENT_TLS_SERVER_NAME", "alora.example.com")
    monkeypatch.setenv("ALORA_ROUTER_TLS_CERT_FILE", "own.pem")
    with pytest.raises(Became):
        become_front_door("router:50051", "127.0.0.1:0", log_format="json")
    assert flags(became)["--router-tls-ca-file"] == "ca.pem"
    assert flags(became)["--router-tls-server-name"] == "alora.example.com"
    assert "--router-tls-cert-file" not in flags(became)


def test_what_is_missing_is_told(became: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    with pytest.raises(ConfigError, match=r"alora-serve\[http\]"):
        become_front_door("router:50051", "127.0.0.1:0", log_format="json")
    assert became == []
