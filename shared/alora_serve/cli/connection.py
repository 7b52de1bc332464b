"""The client that commands use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from alora_serve.cli.options import (
    API_KEY_VARIABLE,
    TLS_CA_FILE_VARIABLE,
    TLS_CERT_FILE_VARIABLE,
    TLS_KEY_FILE_VARIABLE,
    TLS_SERVER_NAME_VARIABLE,
)
from alora_serve.client import Client, RetryPolicy
from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.tls import ClientTls

_TLS_VARIABLES: Final = (
    TLS_CA_FILE_VARIABLE,
    TLS_CERT_FILE_VARIABLE,
    TLS_KEY_FILE_VARIABLE,
    TLS_SERVER_NAME_VARIABLE,
)

AT_A_TERMINAL: Final = RetryPolicy(begin_seconds=3.0)
"""Who mistyped an address is told soon."""


@contextmanager
def connected(address: str, retry: RetryPolicy = AT_A_TERMINAL) -> Iterator[Client]:
    """A client of the router at ``address``, closed afterwards.

    Raises:
        InvalidRequestError: ``address`` is not ``host:port``.
        ConfigError: a certificate cannot be read.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError.of("address", f"{address!r} is not host:port (IPv6 goes in brackets: [::1]:50051)")
    tls = ClientTls(*(os.environ.get(name, "") for name in _TLS_VARIABLES), settings="client_tls")
    with Client(
        address,
        credentials=tls.credentials() if tls.ca_file else None,
        server_name=tls.server_name,
        retry=retry,
        api_key=os.environ.get(API_KEY_VARIABLE),
    ) as client:
        yield client
