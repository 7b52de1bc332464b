"""Streams of :class:`alora_serve.client.AsyncClient`: iterated, put together, cancelled."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from alora_serve.client.results import FanOutTranscript, GenerationResult, Transcript
from alora_serve.client.retry import Retries
from alora_serve.errors import AloraServeError, RequestCancelledError
from alora_serve.rpc.convert import event_from_proto
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import StreamEvent
from alora_serve.v1 import alora_pb2

RequestT = TypeVar("RequestT")
ItemT = TypeVar("ItemT")


class AsyncResponseStream(ABC, Generic[RequestT, ItemT]):
    """A running call. Iterate it; :meth:`close` it, or leave its context, to cancel what is not read."""

    def __init__(self, open_call: Callable[[RequestT, float | None], Any], request: RequestT, retries: Retries) -> None:
        """Begin the call that ``open_call`` makes of a request and a time-out in seconds."""
        self._open_call = open_call
        self._request = request
        self._retries = retries
        self._tokens_before = 0
        self._closed = False
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
        while not self._closed:
            try:
                response = await anext(self._responses)
            except grpc.aio.AioRpcError as error:
                await self._recover(error_from_rpc(error))
                continue
            except asyncio.CancelledError:
                self._explain_cancellation()
                break
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
        if self._closed:
            return
        if self._num_tokens() > self._tokens_before:
            self._retries.got_further()
            self._tokens_before = self._num_tokens()
        await asyncio.sleep(self._retries.pause_after(error))
        self._call = self._open_call(self._rest(), self._retries.remaining_seconds())
        self._responses = aiter(self._call)

    @abstractmethod
    def _item(self, response: Any) -> ItemT | None:
        """What a response holds, taken into account for the result; None if nothing new."""

    @abstractmethod
    def _rest(self) -> RequestT:
        """The request for what has not been received."""

    @abstractmethod
    def _num_tokens(self) -> int:
        """Tokens received."""


class AsyncGenerationStream(AsyncResponseStream[alora_pb2.GenerateRequest, StreamEvent]):
    """The events of one generation: ``Started``, chunks and heartbeats, ``Finished``."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.GenerateRequest, float | None], Any],
        request: alora_pb2.GenerateRequest,
        retries: Retries,
    ) -> None:
        super().__init__(open_call, request, retries)
        self._transcript = Transcript()

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

    def _rest(self) -> alora_pb2.GenerateRequest:
        rest = alora_pb2.GenerateRequest()
        rest.CopyFrom(self._request)
        if (resume := self._transcript.resume()) is not None:
            rest.resume.CopyFrom(resume)
        return rest

    def _num_tokens(self) -> int:
        return self._transcript.num_tokens


class AsyncFanOutStream(AsyncResponseStream[alora_pb2.FanOutRequest, tuple[int, StreamEvent | AloraServeError]]):
    """Events of all targets as they come, each with its target's index. A target that failed ends with its error."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.FanOutRequest, float | None], Any],
        request: alora_pb2.FanOutRequest,
        retries: Retries,
    ) -> None:
        super().__init__(open_call, request, retries)
        self._transcript = FanOutTranscript(len(request.targets))

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

    def _rest(self) -> alora_pb2.FanOutRequest:
        return self._transcript.resumed(self._request)

    def _num_tokens(self) -> int:
        return self._transcript.num_tokens
