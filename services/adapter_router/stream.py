"""One generation as its client sees it, whichever workers run it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from opentelemetry.trace import INVALID_SPAN, Span

from adapter_router.dispatch import Call, Retries, peer_errors, peer_failure
from adapter_router.endpoints.pool import Lease
from adapter_router.policy import Demand
from adapter_router.usage import merged_timings, merged_usage
from alora_serve.errors import AdapterRefusedError, AloraServeError, UnavailableError
from alora_serve.metrics import RequestMetrics, TokenTimes
from alora_serve.rpc.convert import (
    decode_to_proto,
    finish_reason_name,
    pack_token_ids,
    timings_from_proto,
    timings_to_proto,
    unpack_token_ids,
    usage_from_proto,
    usage_to_proto,
)
from alora_serve.rpc.tracing import client_span
from alora_serve.telemetry import answer_attributes, child_span, current, fail, request_attributes
from alora_serve.types import AdapterDigest, GenerateRequest, PrefillResult, Resume, TokenIds, Usage
from alora_serve.v1 import types_pb2

if TYPE_CHECKING:
    from adapter_router.endpoints.endpoint import Endpoint
    from adapter_router.peers import Workers, WorkerStub
    from alora_serve.v1 import adapter_decode_pb2 as decode_pb2

DECODE: Final = "/alora_serve.v1.AdapterDecodeService/Decode"

HEARTBEAT_SECONDS: Final = 1.0
"""While a stream waits for another worker, its reader hears from the router as often as from an engine."""

SILENT_STEPS: Final = 3.0
"""An engine says something between steps: one whose longest step takes seconds may be silent for as many of those."""


class DecodeStream:
    """Runs one generation on a worker and, when that one is lost, on another from the tokens delivered so far.

    Its reader sees one stream without a gap or a repeat. A worker is lost when its call fails, or says nothing for
    ``silence_seconds``: an engine that is alive says so every second, or between steps that take longer.

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
        silence_seconds: float,
        resume_wait_seconds: float,
        metrics: RequestMetrics,
        charge: Callable[[Usage], None],
    ) -> None:
        """Prepare; nothing runs before :meth:`events` is iterated.

        Args:
            workers: who may run it.
            request: what to run, with its seed; where it resumes a stream, that stream's tokens count as delivered.
            demand: what it needs of a worker.
            call: the public call.
            prefill: what preparing the conversation cost, if this stream's usage and timings say so.
            max_attempts: workers to try in a row that deliver nothing.
            silence_seconds: after so long without an event a worker is lost; three of its longest steps, if they take
                longer.
            resume_wait_seconds: longest wait for a worker that can go on with what was begun.
            metrics: told of the first token, and what the finished stream cost.
            charge: told what the stream cost beside the prefill, finished or not; of one that is not, what a prompt
                that nothing but its worker can compute may have cost.
        """
        self.delivered = bytearray(pack_token_ids(request.resume.generated_tokens) if request.resume else b"")
        self.started: types_pb2.Started | None = None
        self._workers = workers
        self._request = request
        self._demand = demand
        self._call = call
        self._prefill = prefill
        self._max_attempts = max_attempts
        self._silence_seconds = silence_seconds
        self._resume_wait_seconds = resume_wait_seconds
        self._metrics = metrics
        self._charge = charge
        self._is_charged = False
        self._times = TokenTimes(metrics, call.arrived_seconds)
        self._span: Span = INVALID_SPAN

    async def events(self) -> AsyncGenerator[types_pb2.GenerationEvent, None]:
        """The stream's events, to be iterated once and closed, which cancels the worker's call.

        Raises:
            UnavailableError: no worker could take it, or go on with it; says how many tokens were delivered.
            AloraServeError: what the worker answered.
        """
        self._span = child_span("generation")
        if self._span.is_recording():
            digests = self._demand.model_digests
            name = next((model.name for model in self._workers.models() if model.model_digest in digests), "")
            self._span.set_attributes(request_attributes(self._request, name))
        try:
            async with aclosing(self._attempts()) as events:
                async for event in events:
                    yield event
        except AloraServeError as error:
            fail(self._span, error.status)
            if self.delivered:
                error.metadata["delivered_tokens"] = str(len(self._tokens()))
            raise
        finally:
            if not self._is_charged:
                self._charge(self._known_usage())
            self._span.end()

    async def _attempts(self) -> AsyncGenerator[types_pb2.GenerationEvent, None]:
        retries = Retries(self._workers, self._demand, self._max_attempts)
        while True:
            has_begun = bool(self.delivered) or self.started is not None
            wait_seconds = self._resume_wait_seconds if has_begun else None
            taking = self._workers.lease(self._demand, avoid=retries.failed, wait_seconds=wait_seconds)
            async with AsyncExitStack() as held:
                entering = asyncio.create_task(held.enter_async_context(taking))
                try:
                    while not (await asyncio.wait((entering,), timeout=HEARTBEAT_SECONDS))[0]:
                        if self.started is None:  # nothing was said yet: what fails now has a status of its own
                            continue
                        yield types_pb2.GenerationEvent(attempt=retries.attempt, heartbeat=types_pb2.Heartbeat())
                finally:
                    entering.cancel()
                lease = entering.result()
                before = len(self.delivered)
                facts = {"alora.attempt": retries.attempt, "alora.tokens.resumed": len(self._tokens())}
                try:
                    with client_span(DECODE, lease.endpoint.address, facts, parent=self._span) as span:
                        async with aclosing(self._attempt(lease, retries.attempt, span)) as events:
                            async for event in events:
                                yield event
                    return
                except AloraServeError as error:
                    if len(self.delivered) > before:
                        retries.got_further()
                    # Of workers with different files under one name, another may have those that the stream began with.
                    changed = isinstance(error, AdapterRefusedError) and bool(self.delivered)
                    retries.after(lease.endpoint, error, elsewhere=changed)
                    if self.delivered:
                        self._workers.note_resume()

    async def _attempt(
        self, lease: Lease[WorkerStub], attempt: int, span: Span
    ) -> AsyncGenerator[types_pb2.GenerationEvent, None]:
        worker, began, waiting = lease.endpoint, time.monotonic(), True
        request = decode_to_proto(self._resumed(), attempt=attempt)
        with current(span):
            rpc = worker.stub.Decode(request, timeout=self._call.remaining_seconds(), metadata=self._call.metadata)
        responses = aiter(rpc)
        try:
            with peer_errors(self._workers.service, worker.address):
                while (response := await self._next(responses, worker)) is not None:
                    event = response.event
                    event.attempt = attempt
                    if waiting and event.HasField("chunk"):
                        waiting = False
                        self._workers.note_first_token(lease, time.monotonic() - began)
                    if self._is_news(event):
                        yield event
                    if event.HasField("finished"):
                        # Its end: cancelled before, the worker would count an answer as given up.
                        with suppress(TimeoutError):
                            async with asyncio.timeout(self._silence_seconds):
                                await rpc.code()
                        return
        finally:
            rpc.cancel()
        cause = "it ended its stream before the generation was done"
        raise peer_failure(UnavailableError, self._workers.service, worker.address, cause)

    async def _next(
        self, responses: AsyncIterator[decode_pb2.DecodeResponse], worker: Endpoint[WorkerStub]
    ) -> decode_pb2.DecodeResponse | None:
        longest_step_seconds = worker.status.longest_step_seconds if worker.status else 0.0
        silence_seconds = max(self._silence_seconds, SILENT_STEPS * longest_step_seconds)
        try:
            async with asyncio.timeout(silence_seconds):
                return await anext(responses, None)
        except TimeoutError:
            cause = f"no sign of life for {silence_seconds:g} s"
        raise peer_failure(UnavailableError, self._workers.service, worker.address, cause)

    def _resumed(self) -> GenerateRequest:
        """The request as it goes on from what was delivered. Whoever said that it started had taken it in."""
        started = self.started
        if started is None:
            return self._request
        if not self.delivered:
            return replace(self._request, is_taken_over=True)
        resume = Resume(
            generated_tokens=self._tokens(),
            invocation_start=started.invocation_start if started.HasField("invocation_start") else None,
            adapter_digest=AdapterDigest(started.adapter_digest),
            model_digest=started.model_digest,
        )
        return replace(self._request, resume=resume, is_taken_over=True)

    def _known_usage(self) -> Usage:
        """What a stream without its end may have cost: no prefill has paid for a prompt that its worker computes."""
        computed = self.started.prompt_tokens if self.started is not None and self._demand.computed_tokens else 0
        return Usage(computed_tokens=computed, generated_tokens=len(self._tokens()))

    def _tokens(self) -> TokenIds:
        return unpack_token_ids(bytes(self.delivered), "delivered")

    def _is_news(self, event: types_pb2.GenerationEvent) -> bool:
        """Account for an event and say whether the client should see it."""
        match event.WhichOneof("event"):
            case "started":
                # Said here as well: while workers of two versions run, a stream taken over starts as it did.
                event.started.model_digest = self._request.handle.model_digest
                repeated = self.started == event.started
                self.started = event.started
                return not repeated
            case "chunk":
                self.delivered += event.chunk.token_ids
                self._times.passed(len(unpack_token_ids(event.chunk.token_ids, "chunk")))
            case "finished":
                self._complete(event.finished)
        return True

    def _complete(self, finished: types_pb2.Finished) -> None:
        """Replace the worker's figures by those of the whole request."""
        total_seconds = self._call.elapsed_seconds()
        used = usage_from_proto(finished.usage)
        self._charge(used)
        self._is_charged = True
        usage = merged_usage(self._prefill, used)
        timings = merged_timings(
            self._prefill,
            timings_from_proto(finished.timings),
            first_token_seconds=total_seconds if self._times.first_seconds is None else self._times.first_seconds,
            total_seconds=total_seconds,
        )
        self._metrics.record(usage, timings)
        if self._span.is_recording():
            self._span.set_attributes(answer_attributes(usage, finish_reason_name(finished.finish_reason)))
        finished.usage.CopyFrom(usage_to_proto(usage))
        finished.timings.CopyFrom(timings_to_proto(timings))
