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
from alora_serve.config import env_name, flag_name
from alora_serve.errors import ConfigError

_TLS_SETTINGS = {
    TLS_CA_FILE_VARIABLE: "router_tls_ca_file",
    TLS_CERT_FILE_VARIABLE: "router_tls_cert_file",
    TLS_KEY_FILE_VARIABLE: "router_tls_key_file",
    TLS_SERVER_NAME_VARIABLE: "router_tls_server_name",
}
"""How the command line reaches a router is how the front door does, unless its own settings say otherwise."""


def become_front_door(address: str | None, listen: str | None, *, log_format: str | None) -> NoReturn:
    """Replace this process by a front door at ``listen`` before the router at ``address``.

    None leaves a setting to the environment, the settings file and the default; logs are then for people.

    Raises:
        ConfigError: what it needs is not installed.
    """
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        raise ConfigError("the HTTP front door is not installed: pip install 'alora-serve[http]'")
    if log_format is None and env_name("log_format") not in os.environ:
        log_format = "console"
    named = {"router_address": address, "listen": listen, "log_format": log_format}
    given = {name: value for name, value in named.items() if value is not None}
    given |= {
        setting: os.environ[variable]
        for variable, setting in _TLS_SETTINGS.items()
        if os.environ.get(variable) and env_name(setting) not in os.environ
    }
    flags = [part for name, value in given.items() for part in (flag_name(name), value)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "openai_front", *flags])
