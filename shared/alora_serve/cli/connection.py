"""The client that commands use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alora_serve.client import Client
from alora_serve.errors import InvalidRequestError


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the router at ``address``, closed afterwards.

    Raises:
        InvalidRequestError: ``address`` is not ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError.of("address", f"{address!r} is not host:port (IPv6 goes in brackets: [::1]:50051)")
    with Client(address) as client:
        yield client
