"""Becomes the front door: the command line may not import a service, and need not outlive its start."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NoReturn

from alora_serve.cli.options import (
    TLS_CA_FILE_VARIABLE,
    TLS_CERT_FILE_VARIABLE,
    TLS_KEY_FILE_VARIABLE,
    TLS_SERVER_NAME_VARIABLE,
)
from alora_serve.config import FrontDoorSettings, ServerSettings, flag_name, load_settings
from alora_serve.errors import ConfigError

_TLS_SETTINGS = {
    TLS_CA_FILE_VARIABLE: "router_tls_ca_file",
    TLS_CERT_FILE_VARIABLE: "router_tls_cert_file",
    TLS_KEY_FILE_VARIABLE: "router_tls_key_file",
    TLS_SERVER_NAME_VARIABLE: "router_tls_server_name",
}
"""How the command line reaches a router is how the front door does, unless its own settings say otherwise."""


class _Settings(ServerSettings, FrontDoorSettings):
    """What a front door can be told."""


def become_front_door(address: str | None, listen: str | None, *, log_format: str | None) -> NoReturn:
    """Replace this process by a front door at ``listen`` before the router at ``address``.

    None leaves a setting to the environment, the settings file and the default; logs are then for people.

    Raises:
        ConfigError: what it needs is not installed, or its settings are wrong.
    """
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        raise ConfigError("the HTTP front door is not installed: pip install 'alora-serve[http]'")
    otherwise = {setting: os.environ.get(variable) for variable, setting in _TLS_SETTINGS.items()}
    otherwise |= {"log_format": "console"}
    said = load_settings(_Settings, []).model_fields_set
    named = {"router_address": address, "listen": listen, "log_format": log_format}
    given = {name: value for name, value in named.items() if value is not None}
    given |= {name: value for name, value in otherwise.items() if value and name not in said | given.keys()}
    flags = [part for name, value in given.items() for part in (flag_name(name), value)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "openai_front", *flags])
