"""Runs one service: binds, reports its addresses, serves, drains on a signal, cleans up."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]  # nor has this one

from alora_serve.config import ServerSettings, run_with_settings
from alora_serve.errors import AloraServeError, ConfigError
from alora_serve.logging import configure_logging
from alora_serve.metrics import CertificateMetrics
from alora_serve.rpc.certificates import watch_client_certificates
from alora_serve.rpc.channels import server_options
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.interceptors import Authorize, CallInterceptor, CallObserver, LoadReports
from alora_serve.rpc.listening import end_on_signals, host_and_port, listens_with_tls, stop_on_signals
from alora_serve.rpc.monitoring import Monitoring
from alora_serve.rpc.tls import ServerTls
from alora_serve.telemetry import tracing

FINAL_GRACE_SECONDS: Final = 0.5
"""After the drain, for the last answers to leave; status streams end with it."""

FAILED_START_EXIT_CODE: Final = 2

SettingsT = TypeVar("SettingsT", bound=ServerSettings)
log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """One gRPC service of the process.

    Attributes:
        full_name: as in the proto, ``alora_serve.v1.AloraService``: its name in health and reflection.
        register: adds the servicer to a server: ``partial(add_XServicer_to_server, servicer)``.
    """

    full_name: str
    register: Callable[[grpc.aio.Server], None]


async def serve(
    name: str,
    settings: ServerSettings,
    services: Sequence[Service],
    *,
    monitoring: Monitoring,
    observer: CallObserver,
    max_message_bytes: Callable[[], int],
    on_drain: Callable[[], None] = lambda: None,
    may_recover: Callable[[], bool] = lambda: True,
    cleanup: Sequence[Callable[[], Awaitable[None]]] = (),
    essential: Sequence[asyncio.Future[Any]] = (),
    authorize: Authorize | None = None,
    load_reports: LoadReports | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain and clean up; returns the process's exit status.

    Once calls are taken, health says so, and one JSON line goes to standard output for whoever started the process:
    ``{"event": "listening", "service": name, "address": "host:port", "metrics_address": "host:port"}``, and with
    ``settings.health_listen`` its address as ``health_address``.

    Drain: health says NOT_SERVING and ``on_drain`` is called, new calls are UNAVAILABLE, running ones may go on for
    ``settings.drain_seconds``, then what is left is cancelled. A second signal ends the process at once.

    Args:
        name: of the service, for the line above and the log.
        settings: where to listen and how to end.
        services: what to serve, besides health and reflection.
        monitoring: how the process is watched already; its health names these services.
        observer: counts calls.
        max_message_bytes: the largest request taken now; a larger one is INVALID_ARGUMENT.
        on_drain: called when the drain begins, to tell routers.
        may_recover: whether what hangs in it, if anything does, may go on yet; else it says that it is not alive.
        cleanup: run one after the other at the end, also after a failure.
        essential: what the service can't do without, such as its engine: when one ends, so does the process.
        authorize: says who may call what; unset: everybody may.
        load_reports: tells callers in trailing metadata how busy the service is; unset: they are not told.

    Returns:
        0 after a signal, 1 when something essential ended.

    Raises:
        ConfigError: an address cannot be bound.
    """
    stop = stop_on_signals()
    in_flight, health = InFlightCalls(), monitoring.health
    health.live_while(may_recover)
    interceptor = CallInterceptor(
        observer,
        in_flight,
        max_message_bytes=max_message_bytes,
        write_timeout_seconds=settings.write_timeout_seconds,
        read_timeout_seconds=settings.read_timeout_seconds,
        authorize=authorize,
        load_reports=load_reports,
    )
    server = grpc.aio.server(interceptors=[interceptor], options=server_options())
    for service in services:
        service.register(server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        names = [service.full_name for service in services]
        reflection.enable_server_reflection([*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], server)
    try:
        tls, certificates = _tls(settings), CertificateMetrics(monitoring.registry)
        if tls is not None:
            certificates.watch("server", tls.expires_at)
        watch_client_certificates(settings, certificates)
        addresses = {"address": _bind(server, settings, tls), **monitoring.addresses}
        try:
            await server.start()
            health.start()
            print(json.dumps({"event": "listening", "service": name, **addresses}), flush=True)
            log.info("listening", **addresses)
            failed = await _first(stop, essential)
            health.shut_down()
            on_drain()
            log.info("draining", seconds=settings.drain_seconds)
            left = await in_flight.drain(settings.drain_seconds)
            if left:
                log.warning("drain_cut_short", calls=left)
        finally:
            await server.stop(FINAL_GRACE_SECONDS)
    finally:
        await _clean_up(cleanup)
    log.info("stopped")
    return int(failed)


def run_service(
    name: str, settings_class: type[SettingsT], main: Callable[[SettingsT], Coroutine[Any, Any, int]]
) -> None:
    """A service's ``__main__``: read settings, set up logging and traces, run ``main``, and exit with its status.

    A wrong setting, or any other error of ours before or while serving, is printed and ends the process with status 2.
    Until it serves, SIGTERM and SIGINT end it at once.
    """
    end_on_signals()
    settings = run_with_settings(settings_class)
    configure_logging(name, level=settings.log_level, log_format=settings.log_format)
    try:
        with tracing(name):
            status = asyncio.run(main(settings))
    except AloraServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED_START_EXIT_CODE)
    sys.exit(status)


async def _first(stop: asyncio.Event, essential: Sequence[asyncio.Future[Any]]) -> bool:
    """Wait for a signal, or for the end of something essential: then True."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([stopping, *essential], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    ended = [future for future in essential if future.done()]
    for future in ended:
        log.error("essential_ended", exc_info=None if future.cancelled() else future.exception())
    return bool(ended) and not stop.is_set()


def _bind(server: grpc.aio.Server, settings: ServerSettings, tls: ServerTls | None) -> str:
    """The address with the port that was taken."""
    address = settings.listen
    try:
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise ConfigError(f"listen={address}: cannot be bound: in use, or not an address of this machine") from error
    return f"{host_and_port(address)[0]}:{port}"


def _tls(settings: ServerSettings) -> ServerTls | None:
    if not listens_with_tls(settings):
        return None
    return ServerTls(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)


async def _clean_up(hooks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all hooks, whatever the others do."""
    for hook in hooks:
        try:
            await hook()
        except Exception:
            log.exception("cleanup_failed")
