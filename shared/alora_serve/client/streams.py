"""Streams of :class:`alora_serve.client.Client`: iterated, put together, cancelled."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from alora_serve.client.results import FanOutTranscript, GenerationResult, Transcript
from alora_serve.client.retry import Retries
from alora_serve.errors import AloraServeError
from alora_serve.rpc.convert import event_from_proto
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import StreamEvent
from alora_serve.v1 import alora_pb2

RequestT = TypeVar("RequestT")
ItemT = TypeVar("ItemT")


class ResponseStream(ABC, Generic[RequestT, ItemT]):
    """A running call. Iterate it; :meth:`close` it, or leave its context, to cancel what is not read."""

    def __init__(self, open_call: Callable[[RequestT, float | None], Any], request: RequestT, retries: Retries) -> None:
        """Begin the call that ``open_call`` makes of a request and a time-out in seconds."""
        self._open_call = open_call
        self._request = request
        self._retries = retries
        self._tokens_before = 0
        self._closed = False
        self._call = open_call(request, retries.remaining_seconds())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        while not self._closed:
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                self._recover(error_from_rpc(error))
                continue
            item = self._item(response)
            if item is not None:
                return item
        raise StopIteration

    def close(self) -> None:
        """Cancel the call; the server stops working on it."""
        self._closed = True
        self._call.cancel()

    def _recover(self, error: AloraServeError) -> None:
        """Go on with another call, from what was received, if the policy allows it."""
        if self._closed:
            return
        if self._num_tokens() > self._tokens_before:
            self._retries.got_further()
            self._tokens_before = self._num_tokens()
        time.sleep(self._retries.pause_after(error))
        self._call = self._open_call(self._rest(), self._retries.remaining_seconds())

    @abstractmethod
    def _item(self, response: Any) -> ItemT | None:
        """What a response holds, taken into account for the result; None if nothing new."""

    @abstractmethod
    def _rest(self) -> RequestT:
        """The request for what has not been received."""

    @abstractmethod
    def _num_tokens(self) -> int:
        """Tokens received."""


class GenerationStream(ResponseStream[alora_pb2.GenerateRequest, StreamEvent]):
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

    def result(self) -> GenerationResult:
        """Read what is left and return the whole.

        Raises:
            AloraServeError: the generation failed, or was closed before its end.
        """
        for _ in self:
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


class FanOutStream(ResponseStream[alora_pb2.FanOutRequest, tuple[int, StreamEvent | AloraServeError]]):
    """Events of all targets as they come, each with its target's index. A target that failed ends with its error."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.FanOutRequest, float | None], Any],
        request: alora_pb2.FanOutRequest,
        retries: Retries,
    ) -> None:
        super().__init__(open_call, request, retries)
        self._transcript = FanOutTranscript(len(request.targets))

    def results(self) -> list[GenerationResult | AloraServeError]:
        """Read what is left and return a result, or the error it failed with, for each target in order.

        Raises:
            AloraServeError: the call as a whole failed.
        """
        for _ in self:
            pass
        return self._transcript.results()

    def _item(self, response: alora_pb2.FanOutResponse) -> tuple[int, StreamEvent | AloraServeError] | None:
        return self._transcript.add(response)

    def _rest(self) -> alora_pb2.FanOutRequest:
        return self._transcript.resumed(self._request)

    def _num_tokens(self) -> int:
        return self._transcript.num_tokens
