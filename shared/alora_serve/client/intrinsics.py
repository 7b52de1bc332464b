"""Results of several intrinsics of one call: as they come, and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alora_serve.client.async_streams import AsyncResponseStream
from alora_serve.client.retry import Retries
from alora_serve.client.streams import ResponseStream
from alora_serve.errors import AloraServeError, UnavailableError
from alora_serve.rpc.convert import intrinsic_result_from_proto
from alora_serve.rpc.status import error_from_failure
from alora_serve.types import IntrinsicResult
from alora_serve.v1 import alora_pb2

Outcome = IntrinsicResult | AloraServeError
OpenCall = Callable[[alora_pb2.RunIntrinsicsRequest, float | None], Any]


class Outcomes:
    """What has come so far, by position; see :class:`alora_serve.client.results.Received`."""

    def __init__(self, num_intrinsics: int) -> None:
        self._found: list[Outcome | None] = [None] * num_intrinsics

    @property
    def num_tokens(self) -> int:
        """Results that have come: each is progress."""
        return sum(outcome is not None for outcome in self._found)

    @property
    def is_finished(self) -> bool:
        """Every result has come; a call for none has an error coming."""
        return bool(self._found) and None not in self._found

    def resumed(self, request: alora_pb2.RunIntrinsicsRequest) -> alora_pb2.RunIntrinsicsRequest:
        """The request for the intrinsics whose results are missing."""
        rest = alora_pb2.RunIntrinsicsRequest()
        rest.CopyFrom(request)
        rest.done.extend(index for index, outcome in enumerate(self._found) if outcome is not None)
        return rest

    def add(self, response: alora_pb2.RunIntrinsicsResponse) -> tuple[int, Outcome]:
        """Note the next response; returns its intrinsic's position and what it came to."""
        outcome: Outcome = (
            error_from_failure(response.failure)
            if response.HasField("failure")
            else intrinsic_result_from_proto(response.result)
        )
        self._found[response.index] = outcome
        return response.index, outcome

    def all(self) -> list[Outcome]:
        """One an intrinsic, in their order."""
        missing = "the stream ended before the intrinsic was finished"
        return [UnavailableError(missing) if outcome is None else outcome for outcome in self._found]


class IntrinsicsStream(ResponseStream[alora_pb2.RunIntrinsicsRequest, tuple[int, Outcome]]):
    """Results as they come, each with its intrinsic's position. One that failed brings its error."""

    def __init__(self, open_call: OpenCall, request: alora_pb2.RunIntrinsicsRequest, retries: Retries) -> None:
        self._outcomes = Outcomes(len(request.intrinsics))
        super().__init__(open_call, request, retries, self._outcomes)

    def results(self) -> list[Outcome]:
        """Read what is left and return a result, or the error it failed with, for each intrinsic in order.

        Raises:
            AloraServeError: the call as a whole failed.
        """
        for _ in self:
            pass
        return self._outcomes.all()

    def _item(self, response: alora_pb2.RunIntrinsicsResponse) -> tuple[int, Outcome]:
        return self._outcomes.add(response)


class AsyncIntrinsicsStream(AsyncResponseStream[alora_pb2.RunIntrinsicsRequest, tuple[int, Outcome]]):
    """Results as they come, each with its intrinsic's position. One that failed brings its error."""

    def __init__(self, open_call: OpenCall, request: alora_pb2.RunIntrinsicsRequest, retries: Retries) -> None:
        self._outcomes = Outcomes(len(request.intrinsics))
        super().__init__(open_call, request, retries, self._outcomes)

    async def results(self) -> list[Outcome]:
        """Read what is left and return a result, or the error it failed with, for each intrinsic in order.

        Raises:
            AloraServeError: the call as a whole failed.
        """
        async for _ in self:
            pass
        return self._outcomes.all()

    def _item(self, response: alora_pb2.RunIntrinsicsResponse) -> tuple[int, Outcome]:
        return self._outcomes.add(response)
