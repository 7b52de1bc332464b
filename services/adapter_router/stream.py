"""One generation as its client sees it, whichever worker runs it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from adapter_router.dispatch import Call, Retries, peer_errors, peer_failure
from adapter_router.endpoints.pool import Lease
from adapter_router.policy import Demand
from adapter_router.usage import merged_timings, merged_usage
from alora_serve.errors import AloraServeError, UnavailableError
from alora_serve.metrics import RequestMetrics
from alora_serve.rpc.convert import (
    decode_to_proto,
    timings_from_proto,
    timings_to_proto,
    usage_from_proto,
    usage_to_proto,
)
from alora_serve.types import GenerateRequest, PrefillResult
from alora_serve.v1 import types_pb2

if TYPE_CHECKING:
    from adapter_router.peers import Workers, WorkerStub


class DecodeStream:
    """Runs one generation on a worker and, while no token was delivered, on another when that one dies.

    Attributes:
        delivered: tokens forwarded so far, packed, in order: what any continuation elsewhere has to start from.
        started: facts of the stream as the client knows them; None before the first event.
    """

    def __init__(
        self,
        workers: Workers,
        request: GenerateRequest,
        demand: Demand,
        *,
        call: Call,
        prefill: PrefillResult | None,
        max_attempts: int,
        metrics: RequestMetrics,
    ) -> None:
        """Prepare; nothing runs before :meth:`events` is iterated.

        Args:
            workers: who may run it.
            request: what to run, with its seed.
            demand: what it needs of a worker.
            call: the public call.
            prefill: what preparing the conversation cost, charged to this stream; None charges nothing.
            max_attempts: workers to try in all.
            metrics: told of the first token, and what the finished stream cost.
        """
        self.delivered = bytearray()
        self.started: types_pb2.Started | None = None
        self._workers = workers
        self._request = request
        self._demand = demand
        self._call = call
        self._prefill = prefill
        self._max_attempts = max_attempts
        self._metrics = metrics
        self._first_token_seconds: float | None = None

    async def events(self) -> AsyncGenerator[types_pb2.GenerationEvent, None]:
        """The stream's events, to be iterated once and closed, which cancels the worker's call.

        Raises:
            UnavailableError: no worker could take it, or the one that had it died after a token was delivered.
            AloraServeError: what the worker answered.
        """
        retries = Retries(self._workers, self._demand, self._max_attempts)
        while True:
            async with self._workers.lease(self._demand, avoid=retries.failed) as lease:
                try:
                    async with aclosing(self._attempt(lease, retries.attempt)) as events:
                        async for event in events:
                            yield event
                    return
                except AloraServeError as error:
                    retries.after(lease.endpoint, error, may_repeat=not self.delivered)

    async def _attempt(self, lease: Lease[WorkerStub], attempt: int) -> AsyncGenerator[types_pb2.GenerationEvent, None]:
        worker, began, waiting = lease.endpoint, time.monotonic(), True
        request = decode_to_proto(self._request, attempt=attempt)
        rpc = worker.stub.Decode(request, timeout=self._call.remaining_seconds(), metadata=self._call.metadata)
        try:
            with peer_errors(self._workers.service, worker.address):
                async for response in rpc:
                    event = response.event
                    event.attempt = attempt
                    if waiting and event.HasField("chunk"):
                        waiting = False
                        self._workers.note_first_token(lease, time.monotonic() - began)
                    if self._is_news(event):
                        yield event
                    if event.HasField("finished"):
                        await rpc.code()  # its end: cancelled before, the worker would count an answer as given up
                        return
        finally:
            rpc.cancel()
        cause = "it ended its stream before the generation was done"
        raise peer_failure(UnavailableError, self._workers.service, worker.address, cause)

    def _is_news(self, event: types_pb2.GenerationEvent) -> bool:
        """Account for an event and say whether the client should see it."""
        match event.WhichOneof("event"):
            case "started":
                repeated = self.started == event.started
                self.started = event.started
                return not repeated
            case "chunk":
                if self._first_token_seconds is None:
                    self._first_token_seconds = self._call.elapsed_seconds()
                    self._metrics.first_token(self._first_token_seconds)
                self.delivered += event.chunk.token_ids
            case "finished":
                self._complete(event.finished)
        return True

    def _complete(self, finished: types_pb2.Finished) -> None:
        """Replace the worker's figures by those of the whole request."""
        total_seconds = self._call.elapsed_seconds()
        usage = merged_usage(self._prefill, usage_from_proto(finished.usage))
        timings = merged_timings(
            self._prefill,
            timings_from_proto(finished.timings),
            first_token_seconds=total_seconds if self._first_token_seconds is None else self._first_token_seconds,
            total_seconds=total_seconds,
        )
        self._metrics.record(usage, timings)
        finished.usage.CopyFrom(usage_to_proto(usage))
        finished.timings.CopyFrom(timings_to_proto(timings))
