"""The client that commands use."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from alora_serve.client import Client
from alora_serve.errors import InvalidRequestError

_NO_PROXY: Final = ("no_grpc_proxy", "no_proxy")
"""Variables that gRPC reads, the first that is set, spelt as it spells them."""


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the router at ``address``, closed afterwards.

    Raises:
        InvalidRequestError: ``address`` is not ``host:port``.
    """
    bypass_proxy(address)
    with Client(address) as client:
        yield client


def bypass_proxy(address: str) -> None:
    """Keep gRPC from sending calls to this machine through a proxy that the environment names for the internet.

    Raises:
        InvalidRequestError: ``address`` is not ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError.of("address", f"{address!r} is not host:port (IPv6 goes in brackets: [::1]:50051)")
    host = host.strip("[]")
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if is_local:
        listed = next((value for name in _NO_PROXY if (value := os.environ.get(name))), "")
        os.environ[_NO_PROXY[0]] = ",".join(filter(None, [listed, host]))
