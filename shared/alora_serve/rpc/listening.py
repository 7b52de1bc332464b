"""Where a process listens and when it ends, whatever it speaks: signals, addresses, the rule on plain text."""

from __future__ import annotations

import asyncio
import os
import signal
from types import FrameType
from typing import Final

from alora_serve.config import ServerSettings
from alora_serve.errors import ConfigError
from alora_serve.rpc.channels import is_this_machine

_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def end_on_signals() -> None:
    """From now on SIGTERM and SIGINT end the process, also one that is the first of a container.

    The kernel spares that one what it has no handler for, so it would go on loading until it is killed.
    """
    for number in _ENDING:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container is still there


def stop_on_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        stop.set()
        for number in _ENDING:
            loop.remove_signal_handler(number)
        end_on_signals()

    for number in _ENDING:
        loop.add_signal_handler(number, on_signal)
    return stop


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts; an IPv6 host keeps its brackets.

    Raises:
        ConfigError: it has not both.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not host:port; write IPv6 as [::1]:8080")
    return host, int(port)


def listens_with_tls(settings: ServerSettings) -> bool:
    """Whether the server of ``settings`` shows a certificate. Plain text is for loopback, or where it is allowed.

    Raises:
        ConfigError: half of a certificate is given, or plain text would leave this machine.
    """
    if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
        raise ConfigError("tls_cert_file and tls_key_file go together")
    if settings.tls_client_ca_file and not settings.tls_cert_file:
        raise ConfigError("tls_client_ca_file needs tls_cert_file: clients show certificates over TLS alone")
    if not (settings.tls_cert_file or settings.allow_insecure or is_this_machine(settings.listen)):
        raise ConfigError(
            f"listen={settings.listen}: anyone on the network could read and change what is said there; set "
            "tls_cert_file and tls_key_file, or allow_insecure where something else protects it"
        )
    return bool(settings.tls_cert_file)
