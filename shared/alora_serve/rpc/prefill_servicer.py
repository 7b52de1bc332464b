"""``BasePrefillService``: protobuf in, protobuf out; what happens between is the prefiller's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final, Protocol

import grpc.aio

from alora_serve.metrics import RequestMetrics
from alora_serve.rpc.convert import endpoint_status_to_proto, prefill_from_proto, prefill_result_to_internal_proto
from alora_serve.rpc.server import Service
from alora_serve.rpc.watch import watch_status
from alora_serve.telemetry import note, usage_attributes
from alora_serve.types import EndpointStatus, PrefillResult, Prompt
from alora_serve.v1 import base_prefill_pb2, base_prefill_pb2_grpc

SERVICE: Final = "alora_serve.v1.BasePrefillService"


class Prefills(Protocol):
    """Prefills prompts: see :class:`alora_serve.engine.prefiller.Prefiller`, which is one."""

    async def prefill(self, prompt: Prompt, *, tokenize_only: bool, tenant: str, skip_store: bool) -> PrefillResult:
        """Make a prompt's KV fetchable and name it."""


class BasePrefillServicer(base_prefill_pb2_grpc.BasePrefillServiceServicer):
    """Serves one prefiller, of a base prefill service or of a decode worker that stands in for one.

    ``status`` says how busy the process is, ``is_alive`` whether its engine does anything at all.
    """

    def __init__(
        self,
        prefiller: Prefills,
        status: Callable[[], EndpointStatus],
        is_alive: Callable[[], bool],
        metrics: RequestMetrics,
    ) -> None:
        self._prefiller = prefiller
        self._status = status
        self._is_alive = is_alive
        self._metrics = metrics

    def service(self) -> Service:
        """What a server registers."""
        return Service(SERVICE, partial(base_prefill_pb2_grpc.add_BasePrefillServiceServicer_to_server, self))

    async def Prefill(
        self,
        request: base_prefill_pb2.BasePrefillServicePrefillRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> base_prefill_pb2.BasePrefillServicePrefillResponse:
        """See the proto."""
        result = await self._prefiller.prefill(
            prefill_from_proto(request),
            tokenize_only=request.tokenize_only,
            tenant=request.tenant,
            skip_store=request.skip_store,
        )
        self._metrics.record(result.usage, result.timings)
        note(lambda: usage_attributes(result.usage))
        return prefill_result_to_internal_proto(result)

    async def WatchStatus(
        self,
        request: base_prefill_pb2.BasePrefillServiceWatchStatusRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> AsyncIterator[base_prefill_pb2.BasePrefillServiceWatchStatusResponse]:
        """See the proto."""
        async for status in watch_status(self._status, self._is_alive):
            yield base_prefill_pb2.BasePrefillServiceWatchStatusResponse(status=endpoint_status_to_proto(status))
