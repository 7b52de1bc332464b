"""``grpc.health.v1`` for one process: its services all serve until it drains, and then none does.

The servicer of grpcio-health-checking drops the wake-up of every watcher of a service when one of them leaves, so the
others would never hear of the drain; this one tells them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs

_Status = health_pb2.HealthCheckResponse

OVERALL = ""
"""The name that asks about the process as a whole."""


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving from its construction until :meth:`shut_down`. Belongs to one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        """``services`` are full names, as in ``alora_serve.v1.AloraService``."""
        self._services = frozenset([OVERALL, *services])
        self._shutting_down = False
        self._changed = asyncio.Condition()

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
        while True:
            status = self._status(request.service)
            yield _Status(status=status)
            async with self._changed:
                while self._status(request.service) == status:
                    await self._changed.wait()

    async def shut_down(self) -> None:
        """From now on nothing is serving."""
        async with self._changed:
            self._shutting_down = True
            self._changed.notify_all()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.NOT_SERVING if self._shutting_down else _Status.SERVING
