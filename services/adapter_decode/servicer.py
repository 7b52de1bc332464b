"""``AdapterDecodeService``: protobuf in, protobuf out; what happens between is the decoder's and the registry's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from time import monotonic

import grpc.aio

from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.engine.decoder import Decoder
from alora_serve.engine.scorer import Scorer
from alora_serve.metrics import RequestMetrics, TokenTimes
from alora_serve.rpc.convert import (
    adapter_name_from_proto,
    adapter_to_proto,
    decode_from_proto,
    endpoint_status_to_proto,
    event_to_proto,
    score_from_proto,
    score_result_to_internal_proto,
)
from alora_serve.rpc.watch import changed_adapters, watch_status
from alora_serve.telemetry import answer_attributes, note, request_attributes, started_attributes, usage_attributes
from alora_serve.types import AdapterInfo, EndpointStatus, Finished, Started, TokenChunk
from alora_serve.v1 import adapter_decode_pb2 as pb
from alora_serve.v1 import adapter_decode_pb2_grpc

_Context = grpc.aio.ServicerContext[object, object]


class AdapterDecodeServicer(adapter_decode_pb2_grpc.AdapterDecodeServiceServicer):
    """Serves one decoder and its adapters.

    ``status`` says how busy the process is, ``is_alive`` whether its engine does anything at all.
    """

    def __init__(
        self,
        decoder: Decoder,
        scorer: Scorer,
        adapters: AdapterRegistry,
        status: Callable[[], EndpointStatus],
        is_alive: Callable[[], bool],
        metrics: RequestMetrics,
    ) -> None:
        self._decoder = decoder
        self._scorer = scorer
        self._adapters = adapters
        self._status = status
        self._is_alive = is_alive
        self._metrics = metrics
        self._model_name = status().model.name

    async def Decode(self, request: pb.DecodeRequest, context: _Context) -> AsyncIterator[pb.DecodeResponse]:
        """See the proto."""
        times = TokenTimes(self._metrics, monotonic())
        wanted = decode_from_proto(request)
        first_index = len(wanted.resume.generated_tokens) if wanted.resume else 0
        note(lambda: {**request_attributes(wanted, self._model_name), "alora.attempt": request.attempt})
        # Closed at once when the call ends early, so that the sequence leaves the batch at the next step.
        async with aclosing(self._decoder.decode(wanted)) as events:
            async for event in events:
                if isinstance(event, TokenChunk):
                    times.passed(len(event.token_ids))
                if isinstance(event, Started):
                    note(partial(started_attributes, event, first_index))
                if isinstance(event, Finished):
                    note(partial(answer_attributes, event.usage, event.finish_reason.value))
                    # Before it is told: whoever reads it may be gone before we are asked to go on.
                    self._metrics.record(event.usage, event.timings)
                yield pb.DecodeResponse(event=event_to_proto(event, attempt=request.attempt, first_index=first_index))
                if isinstance(event, TokenChunk):
                    first_index += len(event.token_ids)

    async def Score(
        self, request: pb.AdapterDecodeServiceScoreRequest, context: _Context
    ) -> pb.AdapterDecodeServiceScoreResponse:
        """See the proto."""
        result = await self._scorer.score(score_from_proto(request))
        note(lambda: usage_attributes(result.usage))
        self._metrics.record(result.usage, result.timings)
        return score_result_to_internal_proto(result)

    async def ListAdapters(
        self, request: pb.AdapterDecodeServiceListAdaptersRequest, context: _Context
    ) -> pb.AdapterDecodeServiceListAdaptersResponse:
        """See the proto."""
        await asyncio.to_thread(self._adapters.refresh)
        listed = self._adapters.list_adapters()
        return pb.AdapterDecodeServiceListAdaptersResponse(adapters=[adapter_to_proto(adapter) for adapter in listed])

    async def LoadAdapter(
        self, request: pb.AdapterDecodeServiceLoadAdapterRequest, context: _Context
    ) -> pb.AdapterDecodeServiceLoadAdapterResponse:
        """See the proto."""
        loaded = await asyncio.to_thread(self._adapters.load, adapter_name_from_proto(request))
        return pb.AdapterDecodeServiceLoadAdapterResponse(adapter=adapter_to_proto(loaded))

    async def UnloadAdapter(
        self, request: pb.AdapterDecodeServiceUnloadAdapterRequest, context: _Context
    ) -> pb.AdapterDecodeServiceUnloadAdapterResponse:
        """See the proto."""
        was_resident = await asyncio.to_thread(self._adapters.unload, adapter_name_from_proto(request))
        return pb.AdapterDecodeServiceUnloadAdapterResponse(was_resident=was_resident)

    async def GetIntrinsic(
        self, request: pb.AdapterDecodeServiceGetIntrinsicRequest, context: _Context
    ) -> pb.AdapterDecodeServiceGetIntrinsicResponse:
        """See the proto."""
        io_yaml = await asyncio.to_thread(self._adapters.definition, adapter_name_from_proto(request))
        return pb.AdapterDecodeServiceGetIntrinsicResponse(io_yaml=io_yaml)

    async def WatchStatus(
        self, request: pb.AdapterDecodeServiceWatchStatusRequest, context: _Context
    ) -> AsyncIterator[pb.AdapterDecodeServiceWatchStatusResponse]:
        """See the proto."""
        told: tuple[AdapterInfo, ...] | None = None
        async for status in watch_status(self._status, self._is_alive):
            changed = changed_adapters(told, status.adapters)
            if request.accept_partial_adapters:
                told = status.adapters
            yield pb.AdapterDecodeServiceWatchStatusResponse(
                status=endpoint_status_to_proto(status if changed is None else replace(status, adapters=changed)),
                partial_adapters=changed is not None,
            )
