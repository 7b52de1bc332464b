"""Streams of :class:`alora_serve.client.AsyncClient`: iterated, put together, cancelled."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from alora_serve.client.failures import failure_of
from alora_serve.client.results import (
    FanOutTranscript,
    GenerationResult,
    Received,
    RequestT,
    SampleTranscript,
    Transcript,
)
from alora_serve.client.retry import Retries
from alora_serve.client.silence import fell_silent, shows_life
from alora_serve.errors import AloraServeError, RequestCancelledError
from alora_serve.rpc.convert import event_from_proto
from alora_serve.types import StreamEvent
from alora_serve.v1 import alora_pb2

ItemT = TypeVar("ItemT")


class AsyncResponseStream(ABC, Generic[RequestT, ItemT]):
    """A running call. Iterate it; :meth:`close` it, or leave its context, to cancel what is not read.

    To cancel a read, by a time-out perhaps, is to cancel the call: later reads raise ``RequestCancelledError``.
    """

    def __init__(
        self,
        open_call: Callable[[RequestT, float | None], Any],
        request: RequestT,
        retries: Retries,
        received: Received[RequestT],
    ) -> None:
        """Begin the call that ``open_call`` makes of a request and a time-out in seconds."""
        self._open_call = open_call
        self._request = request
        self._retries = retries
        self._received = received
        self._closed = False
        self._interrupted = False
        self._silence_seconds: float | None = None
        self._call = open_call(request, retries.remaining_seconds())
        self._responses = aiter(self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # An asyncio call lives on in its own tasks when nobody refers to it any more.
        if "_call" in vars(self):
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[ItemT]:
        return self

    async def __anext__(self) -> ItemT:
        # gRPC ends the responses of a call whose read was cancelled as if all had come.
        if self._interrupted and not (self._closed or self._received.is_finished):
            raise RequestCancelledError("an earlier read of this stream was cancelled, and the call with it")
        try:
            return await self._next()
        except asyncio.CancelledError:
            self._interrupted = True
            raise

    async def _next(self) -> ItemT:
        while not self._closed:
            try:
                async with asyncio.timeout(self._silence_seconds):
                    response = await anext(self._responses)
            except TimeoutError:
                self._call.cancel()
                await self._recover(fell_silent(self._silence_seconds or 0.0))
                continue
            except grpc.aio.AioRpcError as error:
                await self._recover(failure_of(error))
                continue
            except asyncio.CancelledError:
                self._explain_cancellation()
                break
            if shows_life(response):
                self._silence_seconds = self._retries.silence_seconds
            item = self._item(response)
            if item is not None:
                return item
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancel the call; the server stops working on it."""
        self._closed = True
        self._call.cancel()

    def _explain_cancellation(self) -> None:
        """Return if :meth:`close` did it. To gRPC, a call cancelled here looks like a reading task cancelled."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        if not self._closed:
            raise RequestCancelledError("the client was closed while the call ran") from None

    async def _recover(self, error: AloraServeError) -> None:
        """Go on with another call, from what was received, if the policy allows it."""
        if self._received.is_finished:  # all has come but the end of the call
            self._closed = True
        if self._closed:
            return
        self._retries.received(self._received.num_tokens)
        await self._retries.async_wait_after(error)
        if self._closed:  # meanwhile
            return
        self._call = self._open_call(self._received.resumed(self._request), self._retries.remaining_seconds())
        self._responses = aiter(self._call)
        self._silence_seconds = None

    @abstractmethod
    def _item(self, response: Any) -> ItemT | None:
        """What a response holds, taken into account for the result; None if nothing new."""


class AsyncGenerationStream(AsyncResponseStream[alora_pb2.GenerateRequest, StreamEvent]):
    """The events of one generation: ``Started``, chunks and heartbeats, ``Finished``."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.GenerateRequest, float | None], Any],
        request: alora_pb2.GenerateRequest,
        retries: Retries,
    ) -> None:
        self._transcript = Transcript()
        super().__init__(open_call, request, retries, self._transcript)

    @property
    def text(self) -> str:
        """The answer as far as it has been read."""
        return self._transcript.text

    async def result(self) -> GenerationResult:
        """Read what is left and return the whole.

        Raises:
            AloraServeError: the generation failed, or was closed before its end.
        """
        async for _ in self:
            pass
        return self._transcript.result()

    def _item(self, response: alora_pb2.GenerateResponse) -> StreamEvent | None:
        event = event_from_proto(response.event)
        return event if self._transcript.add(event) else None


class AsyncSampleStream(AsyncResponseStream[alora_pb2.GenerateRequest, tuple[int, StreamEvent]]):
    """Events of all samples of a prompt as they come, each with its sample's index."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.GenerateRequest, float | None], Any],
        request: alora_pb2.GenerateRequest,
        retries: Retries,
    ) -> None:
        self._transcript = SampleTranscript(request.sampling.n)
        super().__init__(open_call, request, retries, self._transcript)

    async def results(self) -> list[GenerationResult]:
        """Read what is left and return a result for each sample in order.

        Raises:
            AloraServeError: the generation failed, or was closed before its end.
        """
        async for _ in self:
            pass
        return self._transcript.results()

    def _item(self, response: alora_pb2.GenerateResponse) -> tuple[int, StreamEvent] | None:
        return self._transcript.add(response)


class AsyncFanOutStream(AsyncResponseStream[alora_pb2.FanOutRequest, tuple[int, StreamEvent | AloraServeError]]):
    """Events of all targets as they come, each with its target's index. A target that failed ends with its error."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.FanOutRequest, float | None], Any],
        request: alora_pb2.FanOutRequest,
        retries: Retries,
    ) -> None:
        self._transcript = FanOutTranscript(len(request.targets))
        super().__init__(open_call, request, retries, self._transcript)

    async def results(self) -> list[GenerationResult | AloraServeError]:
        """Read what is left and return a result, or the error it failed with, for each target in order.

        Raises:
            AloraServeError: the call as a whole failed.
        """
        async for _ in self:
            pass
        return self._transcript.results()

    def _item(self, response: alora_pb2.FanOutResponse) -> tuple[int, StreamEvent | AloraServeError] | None:
        return self._transcript.add(response)
