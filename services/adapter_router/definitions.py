"""What defines adapters as intrinsics: asked of a worker once, and kept by digest."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from adapter_router.dispatch import Call, peer_errors, unless_silent
from alora_serve.errors import IntrinsicUndefinedError, UnavailableError
from alora_serve.intrinsics import FILE_NAME, IntrinsicDefinition, parse_definition
from alora_serve.rpc.tracing import client_span
from alora_serve.telemetry import current
from alora_serve.types import AdapterInfo
from alora_serve.v1.adapter_decode_pb2 import AdapterDecodeServiceGetIntrinsicRequest

if TYPE_CHECKING:
    from adapter_router.endpoints.endpoint import Endpoint
    from adapter_router.peers import Workers, WorkerStub

GET_INTRINSIC: Final = "/alora_serve.v1.AdapterDecodeService/GetIntrinsic"

MAX_KEPT: Final = 1024
"""Definitions; those longest unused go first. A file has at most 64 KiB, the published ones have two."""


class Definitions:
    """The definitions that the workers' adapters have."""

    def __init__(self, workers: Workers) -> None:
        """Keep whom to ask."""
        self._workers = workers
        self._kept: OrderedDict[str, IntrinsicDefinition] = OrderedDict()

    async def of(self, adapter: AdapterInfo, call: Call) -> IntrinsicDefinition:
        """The adapter's.

        Raises:
            IntrinsicUndefinedError: it has none.
            AdapterRefusedError: this release does not understand it.
            UnavailableError: no worker that has it answers.
            AloraServeError: what the worker answered.
        """
        if not adapter.intrinsic_digest:
            raise IntrinsicUndefinedError(
                f"adapter {adapter.name!r} has no {FILE_NAME} that would say what to ask it; use Generate, or add one"
            )
        kept = self._kept.get(adapter.intrinsic_digest)
        if kept is not None:
            self._kept.move_to_end(adapter.intrinsic_digest)
            return kept
        raw = await self._fetch(adapter, call)
        definition = await asyncio.to_thread(parse_definition, raw)  # a large file takes seconds
        # Of these very bytes: the file may have changed since the worker told of it.
        self._kept[hashlib.sha256(raw).hexdigest()] = definition
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return definition

    async def _fetch(self, adapter: AdapterInfo, call: Call) -> bytes:
        request = AdapterDecodeServiceGetIntrinsicRequest(name=adapter.name)
        for worker in self._holders(adapter):
            try:
                with (
                    client_span(GET_INTRINSIC, worker.address) as span,
                    current(span),
                    peer_errors(self._workers.service, worker.address),
                ):
                    calling = worker.stub.GetIntrinsic(
                        request, timeout=call.remaining_seconds(), metadata=call.metadata
                    )
                    response = await unless_silent(worker, calling, self._workers.service)
                return response.io_yaml
            except UnavailableError:
                self._workers.mark_unreachable(worker)
        raise UnavailableError(f"no worker that has the {FILE_NAME} of adapter {adapter.name!r} answers; retry later")

    def _holders(self, adapter: AdapterInfo) -> list[Endpoint[WorkerStub]]:
        """Workers whose adapter of that name has that definition; they know the RPC."""
        return [
            worker
            for worker in self._workers.members()
            if worker.healthy
            and (known := worker.adapters.get(adapter.name)) is not None
            and known.intrinsic_digest == adapter.intrinsic_digest
        ]
