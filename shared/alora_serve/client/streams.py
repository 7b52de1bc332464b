"""Streams of :class:`alora_serve.client.Client`: iterated, put together, cancelled."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from alora_serve.client.silence import SilenceWatch, fell_silent, shows_life
from alora_serve.errors import AloraServeError
from alora_serve.rpc.convert import event_from_proto
from alora_serve.types import StreamEvent
from alora_serve.v1 import alora_pb2

ItemT = TypeVar("ItemT")


class ResponseStream(ABC, Generic[RequestT, ItemT]):
    """A running call. Iterate it; :meth:`close` it, or leave its context, to cancel what is not read."""

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
        self._watch: SilenceWatch | None = None
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
                with self._watch.waiting() if self._watch else nullcontext():
                    response = next(self._call)
            except grpc.RpcError as error:
                self._recover(self._failure(error))
                continue
            except StopIteration:
                self._unwatch()
                raise
            if self._watch is None and shows_life(response):
                self._watch_call()
            item = self._item(response)
            if item is not None:
                return item
        raise StopIteration

    def close(self) -> None:
        """Cancel the call; the server stops working on it."""
        self._closed = True
        self._call.cancel()
        self._unwatch()

    def _watch_call(self) -> None:
        seconds = self._retries.silence_seconds
        if seconds is not None and not self._closed:
            self._watch = SilenceWatch(seconds, self._call.cancel)
            weakref.finalize(self, self._watch.end)  # else its thread would keep the call of a forgotten stream

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.end()

    def _failure(self, error: grpc.RpcError) -> AloraServeError:
        """Why the call failed."""
        self._unwatch()
        watch, self._watch = self._watch, None
        seconds = self._retries.silence_seconds
        return fell_silent(seconds) if seconds is not None and watch and watch.has_cancelled else failure_of(error)

    def _recover(self, error: AloraServeError) -> None:
        """Go on with another call, from what was received, if the policy allows it."""
        if self._received.is_finished:  # all has come but the end of the call
            self._closed = True
        if self._closed:
            return
        self._retries.received(self._received.num_tokens)
        self._retries.wait_after(error)
        if self._closed:  # meanwhile
            return
        self._call = self._open_call(self._received.resumed(self._request), self._retries.remaining_seconds())

    @abstractmethod
    def _item(self, response: Any) -> ItemT | None:
        """What a response holds, taken into account for the result; None if nothing new."""


class GenerationStream(ResponseStream[alora_pb2.GenerateRequest, StreamEvent]):
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


class SampleStream(ResponseStream[alora_pb2.GenerateRequest, tuple[int, StreamEvent]]):
    """Events of all samples of a prompt as they come, each with its sample's index."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.GenerateRequest, float | None], Any],
        request: alora_pb2.GenerateRequest,
        retries: Retries,
    ) -> None:
        self._transcript = SampleTranscript(request.sampling.n)
        super().__init__(open_call, request, retries, self._transcript)

    def results(self) -> list[GenerationResult]:
        """Read what is left and return a result for each sample in order.

        Raises:
            AloraServeError: the generation failed, or was closed before its end.
        """
        for _ in self:
            pass
        return self._transcript.results()

    def _item(self, response: alora_pb2.GenerateResponse) -> tuple[int, StreamEvent] | None:
        return self._transcript.add(response)


class FanOutStream(ResponseStream[alora_pb2.FanOutRequest, tuple[int, StreamEvent | AloraServeError]]):
    """Events of all targets as they come, each with its target's index. A target that failed ends with its error."""

    def __init__(
        self,
        open_call: Callable[[alora_pb2.FanOutRequest, float | None], Any],
        request: alora_pb2.FanOutRequest,
        retries: Retries,
    ) -> None:
        self._transcript = FanOutTranscript(len(request.targets))
        super().__init__(open_call, request, retries, self._transcript)

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
