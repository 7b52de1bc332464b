"""The client that commands use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc

from alora_serve.cli.options import (
    API_KEY_VARIABLE,
    TLS_CA_FILE_VARIABLE,
    TLS_CERT_FILE_VARIABLE,
    TLS_KEY_FILE_VARIABLE,
)
from alora_serve.client import Client, RetryPolicy
from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.tls import ClientTls

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
    key = os.environ.get(API_KEY_VARIABLE)
    with Client(address, retry=retry, credentials=_credentials(), api_key=key) as client:
        yield client


def _credentials() -> grpc.ChannelCredentials | None:
    ca_file = os.environ.get(TLS_CA_FILE_VARIABLE, "")
    if not ca_file:
        return None
    mine = (os.environ.get(name, "") for name in (TLS_CERT_FILE_VARIABLE, TLS_KEY_FILE_VARIABLE))
    return ClientTls(ca_file, *mine).credentials()
