"""Runs the HTTP server: binds, reports its addresses, serves, drains on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
import ssl
import sys
from collections.abc import Iterator
from typing import Final

import structlog
import uvicorn
from fastapi import FastAPI

from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import ConfigError
from alora_serve.metrics import CertificateMetrics
from alora_serve.rpc.certificates import expiry_seconds, watch_client_certificates
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.listening import host_and_port, listens_with_tls, stop_on_signals
from alora_serve.rpc.monitoring import Monitoring
from openai_front.config import Settings

NAME: Final = "openai-front"
SERVICE: Final = "openai_front"
"""What probes ask for: it serves until the drain begins, whatever becomes of the router."""

LONGEST_TCP_TIMEOUT_MILLISECONDS: Final = 2**31 - 1

log = structlog.stdlib.get_logger(__name__)


async def serve(app: FastAPI, settings: Settings, monitoring: Monitoring, in_flight: InFlightCalls) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns the process's exit status.

    The line on standard output, and the drain, are those of :func:`alora_serve.rpc.server.serve`.

    Raises:
        ConfigError: an address cannot be bound, or a certificate read.
    """
    stop = stop_on_signals()
    certificates = CertificateMetrics(monitoring.registry)
    tls = _tls(settings, certificates) if listens_with_tls(settings) else None
    watch_client_certificates(settings, certificates)
    with bound_socket(settings) as bound:
        address = f"{host_and_port(settings.listen)[0]}:{bound.getsockname()[1]}"
        addresses = {"address": address, **monitoring.addresses}
        server = http_server(app, settings, tls)
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        monitoring.health.start()
        print(json.dumps({"event": "listening", "service": NAME, **addresses}), flush=True)
        log.info("listening", **addresses)
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([stopping, serving], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        monitoring.health.shut_down()
        log.info("draining", seconds=settings.drain_seconds)
        if left := await in_flight.drain(settings.drain_seconds):
            log.warning("drain_cut_short", requests=left)
        server.should_exit = True
        await serving
        failed = not stop.is_set()
    log.info("stopped")
    return int(failed)


class HttpServer(uvicorn.Server):
    """Leaves signals to us: a drain comes before the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def http_server(app: FastAPI, settings: Settings, tls: ssl.SSLContext | None = None) -> HttpServer:
    """The server, to be run on a bound socket; ends once ``should_exit`` is set."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what else it says, we say
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.http_idle_seconds),
        timeout_graceful_shutdown=1,
        ssl_context_factory=None if tls is None else lambda config, default: tls,
    )
    return HttpServer(config)


@contextlib.contextmanager
def bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """The socket to serve on, closed in the end.

    Raises:
        ConfigError: ``listen`` cannot be bound.
    """
    address = settings.listen
    host, port = host_and_port(address)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        bound = socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"listen={address}: cannot be bound: {error}") from error
    with bound:
        if sys.platform == "linux":
            # Connections inherit it. A server that closes one waits until the client has taken what was written, which
            # a client that stopped reading never does; the kernel gives up that wait.
            milliseconds = math.ceil(min(settings.write_timeout_seconds * 1000, LONGEST_TCP_TIMEOUT_MILLISECONDS))
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        yield bound


def _tls(settings: Settings, metrics: CertificateMetrics) -> ssl.SSLContext:
    """What connections are made by. Each new one sees the certificate as the files say it then."""
    files = (settings.tls_cert_file, settings.tls_key_file)

    def read() -> tuple[ssl.SSLContext, float]:
        return _context(settings), expiry_seconds("tls_cert_file", settings.tls_cert_file)

    identity = Reloaded([*files, settings.tls_client_ca_file], read)
    metrics.watch("server", lambda: identity.content[1])

    def renew(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = identity.content[0]

    context = _context(settings)
    context.sni_callback = renew  # called for every connection, with or without a name
    return context


def _context(settings: Settings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
        if settings.tls_client_ca_file:
            context.load_verify_locations(settings.tls_client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert_file {settings.tls_cert_file}: {error}") from error
    return context
