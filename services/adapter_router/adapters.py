"""Adapters over all workers: listed, found, loaded where they will be used, unloaded everywhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from adapter_router.affinity import adapter_key
from adapter_router.catalog import find_adapter, merged_adapters
from adapter_router.dispatch import Call, call_endpoint, peer_errors, unless_silent
from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.policy import Demand
from alora_serve.errors import AdapterNotFoundError, UnavailableError
from alora_serve.rpc.convert import adapter_from_proto
from alora_serve.rpc.tracing import client_span
from alora_serve.telemetry import current
from alora_serve.types import AdapterInfo
from alora_serve.v1 import adapter_decode_pb2 as decode_pb2

if TYPE_CHECKING:
    from adapter_router.peers import Workers, WorkerStub

LOAD: Final = "/alora_serve.v1.AdapterDecodeService/LoadAdapter"
UNLOAD: Final = "/alora_serve.v1.AdapterDecodeService/UnloadAdapter"


class AdapterDirectory:
    """The adapters that the workers report."""

    def __init__(self, workers: Workers, *, max_attempts: int) -> None:
        """``max_attempts`` bounds the workers tried for one load."""
        self._workers = workers
        self._max_attempts = max_attempts
        self._log = structlog.get_logger(__name__)

    def list(self) -> list[AdapterInfo]:
        """Every adapter of the workers that answer now, by name."""
        return merged_adapters(worker for worker in self._workers.snapshots() if worker.healthy)

    def find(self, name: str) -> AdapterInfo | None:
        """The adapter of that name; None for the empty name, which is the base model.

        Raises:
            AdapterNotFoundError: no worker knows it.
            AdapterRefusedError: it cannot be served.
            UnavailableError: no worker has reported yet.
        """
        return self.get(name) if name else None

    def get(self, name: str) -> AdapterInfo:
        """As :meth:`find`, of a name that must be an adapter's."""
        return find_adapter(name, self._workers.snapshots())

    async def load(self, name: str, call: Call) -> AdapterInfo:
        """Read its weights into the memory of the worker that requests for it will go to.

        Raises:
            AloraServeError: as :meth:`find`, or what the worker answered.
        """

        async def invoke(
            worker: Endpoint[WorkerStub],
        ) -> decode_pb2.AdapterDecodeServiceLoadAdapterResponse:
            return await worker.stub.LoadAdapter(request, timeout=call.remaining_seconds(), metadata=call.metadata)

        request = decode_pb2.AdapterDecodeServiceLoadAdapterRequest(name=name)
        self.get(name)
        models = {worker.model_digest for worker in self._workers.snapshots() if worker.model_digest}
        demand = Demand(adapter_key(name), models, name)
        response = await call_endpoint(self._workers, demand, invoke, method=LOAD, max_attempts=self._max_attempts)
        return adapter_from_proto(response.adapter)

    async def unload(self, name: str, call: Call) -> bool:
        """Drop its weights from the memory of every worker; whether one held them.

        One that is gone holds nothing, and one that falls silent is as good as gone.

        Raises:
            AloraServeError: as :meth:`find`, or what a worker answered; the other workers are asked all the same.
        """
        self.get(name)
        workers = [worker for worker in self._workers.members() if worker.healthy]
        outcomes = await asyncio.gather(
            *(self._unload_from(worker, name, call) for worker in workers), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return any(outcomes)

    async def _unload_from(self, worker: Endpoint[WorkerStub], name: str, call: Call) -> bool:
        request = decode_pb2.AdapterDecodeServiceUnloadAdapterRequest(name=name)
        try:
            with (
                client_span(UNLOAD, worker.address) as span,
                current(span),
                peer_errors(self._workers.service, worker.address),
            ):
                calling = worker.stub.UnloadAdapter(request, timeout=call.remaining_seconds(), metadata=call.metadata)
                response = await unless_silent(worker, calling, self._workers.service)
            return response.was_resident
        except UnavailableError:
            self._workers.mark_unreachable(worker)
        except AdapterNotFoundError as error:
            # Workers learn of a changed adapter root at different times.
            self._log.info("adapter unknown to worker", adapter=name, address=worker.address, error=str(error))
        return False
