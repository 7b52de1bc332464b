"""``grpc.health.v1`` for one process: its services all serve, or none does, and none after the drain began.

The servicer of grpcio-health-checking drops the wake-up of every watcher of a service when one of them leaves, so the
others would never hear of the drain; this one tells them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs

_Status = health_pb2.HealthCheckResponse

OVERALL = ""
"""The name that asks about the process as a whole."""

LIVENESS = "liveness"
"""The name that asks whether the process is of use at all: it is, while it loads and whatever it serves, as long as it
answers and nothing in it hangs for good. Told when asked for; who watches hears of it with the next change of something
else."""

STARTUP = "startup"
"""The name that asks whether the process has loaded and takes calls, whatever it has lost since."""


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving until :meth:`shut_down`, except while it is told otherwise. Belongs to one event loop."""

    def __init__(self, services: Iterable[str], *, serving: bool = True, started: bool = True) -> None:
        """Begin; the process as a whole and all its services have one status.

        Args:
            services: full names, as in ``alora_serve.v1.AloraService``.
            serving: False until the process has what it needs of others to answer.
            started: False until it takes calls: see :meth:`start`.
        """
        self._services = frozenset([OVERALL, LIVENESS, STARTUP, *services])
        self._serving = serving
        self._started = started
        self._shutting_down = False
        self._is_alive: Callable[[], bool] = lambda: True
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:80]!r} here")
        return _Status(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and after every change."""
        told = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                told = status
                yield _Status(status=status)
            await changed.wait()

    def start(self) -> None:
        """The process has loaded, and takes calls."""
        self._started = True
        self._tell()

    def set_serving(self, serving: bool) -> None:
        """The process has, or has lost, what it needs to answer. Nothing serves again after :meth:`shut_down`."""
        self._serving = serving
        self._tell()

    def live_while(self, is_alive: Callable[[], bool]) -> None:
        """The process is of no use once this is false, and should be ended by whoever asks for :data:`LIVENESS`."""
        self._is_alive = is_alive

    def shut_down(self) -> None:
        """From now on nothing is serving."""
        self._shutting_down = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        if service == LIVENESS:
            return _Status.SERVING if self._is_alive() else _Status.NOT_SERVING
        if service == STARTUP:
            return _Status.SERVING if self._started else _Status.NOT_SERVING
        serves = self._started and self._serving and not self._shutting_down
        return _Status.SERVING if serves else _Status.NOT_SERVING
