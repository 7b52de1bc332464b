"""Turns configured targets into addresses by asking the system's resolver, A and AAAA alike.

grpc's own resolver does not see a new address of a name for a long time (none in 45 s), so the router asks again and
again and keeps one channel an address.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from alora_serve.errors import ConfigError, UnavailableError

Resolver = Callable[[str], Awaitable[frozenset[str]]]
"""Maps a target to the addresses it stands for now; raises :class:`UnavailableError` when it cannot tell."""


def split_target(target: str) -> tuple[str, int]:
    """Host (a name or an address, without brackets) and port of ``host:port``, ``[v6]:port`` or ``dns:///host:port``.

    Raises:
        ConfigError: not of that form.
    """
    problem = f"endpoint {target!r} is not host:port or dns:///host:port (IPv6 goes in brackets: [::1]:50051)"
    authority = target.removeprefix("dns:///")
    try:
        parts = urlsplit(f"//{authority}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(problem) from error
    if not host or not port or parts.netloc != authority or "@" in target:
        raise ConfigError(problem)
    return host, port


async def resolve_target(target: str) -> frozenset[str]:
    """Every address ``target`` stands for now, as ``1.2.3.4:port`` or ``[v6]:port``.

    Raises:
        ConfigError: ``target`` is not ``host:port``, or its host cannot be a name.
        UnavailableError: the name has no address now, or the resolver does not answer.
    """
    host, port = split_target(target)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"{target}: {error}") from error
    except UnicodeError as error:  # of the codec that names are asked for in
        raise ConfigError(f"endpoint {target!r} has a host that is no name: {error}") from error
    return frozenset(_format(family, address[0], port) for family, _, _, _, address in found)


def _format(family: socket.AddressFamily, host: str | int, port: int) -> str:
    return f"[{host}]:{port}" if family is socket.AF_INET6 else f"{host}:{port}"
