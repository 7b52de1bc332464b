"""Who prefills: base prefill endpoints and, where that is allowed, decode workers while none of those can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from adapter_router.dispatch import Call, call_endpoint
from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.policy import Demand, EndpointSnapshot
from alora_serve.errors import UnavailableError
from alora_serve.types import ModelInfo
from alora_serve.v1.base_prefill_pb2 import BasePrefillServicePrefillRequest, BasePrefillServicePrefillResponse
from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceStub

if TYPE_CHECKING:
    from adapter_router.peers import Prefills, PrefillStub, Workers, WorkerStub

PREFILL: Final = "/alora_serve.v1.BasePrefillService/Prefill"


class Prefilling:
    """Calls whoever prefills."""

    def __init__(self, prefills: Prefills, workers: Workers, *, max_attempts: int, workers_prefill: bool) -> None:
        """Keep who may be asked.

        Args:
            prefills: base prefill endpoints.
            workers: decode workers.
            max_attempts: calls for one prompt, of either kind of endpoint.
            workers_prefill: the workers serve prefills too, and are asked when no base prefill can take one.
        """
        self._prefills = prefills
        self._workers = workers
        self._max_attempts = max_attempts
        self._workers_prefill = workers_prefill

    def snapshots(self) -> Sequence[EndpointSnapshot]:
        """What is known now of all that may prefill."""
        return [*self._prefills.snapshots(), *(self._workers.snapshots() if self._workers_prefill else ())]

    def models(self) -> Sequence[ModelInfo]:
        """Their base models."""
        return [*self._prefills.models(), *(self._workers.models() if self._workers_prefill else ())]

    async def prefill(
        self, demand: Demand, request: BasePrefillServicePrefillRequest, call: Call, on_sent: Callable[[], object]
    ) -> BasePrefillServicePrefillResponse:
        """Have one prompt prefilled.

        Args:
            on_sent: called before the first endpoint is asked, and perhaps again.

        Raises:
            UnavailableError: nobody could take it.
            AloraServeError: what the endpoint answered.
        """

        async def at_base_prefill(endpoint: Endpoint[PrefillStub]) -> BasePrefillServicePrefillResponse:
            return await ask(endpoint.stub)

        async def at_worker(endpoint: Endpoint[WorkerStub]) -> BasePrefillServicePrefillResponse:
            return await ask(BasePrefillServiceStub(endpoint.channel))

        async def ask(stub: PrefillStub) -> BasePrefillServicePrefillResponse:
            timeout_seconds = call.remaining_seconds()
            on_sent()
            return await stub.Prefill(request, timeout=timeout_seconds, metadata=call.metadata)

        try:
            return await call_endpoint(
                self._prefills,
                demand,
                at_base_prefill,
                method=PREFILL,
                max_attempts=self._max_attempts,
                wait_seconds=0 if self._workers_prefill else None,  # who waits for a restart, and who need not
            )
        except UnavailableError:
            if not self._workers_prefill:
                raise
        return await call_endpoint(self._workers, demand, at_worker, method=PREFILL, max_attempts=self._max_attempts)
