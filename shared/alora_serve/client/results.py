"""Puts a stream's events together. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from alora_serve.errors import AloraServeError, UnavailableError
from alora_serve.rpc.convert import event_from_proto, resume_to_proto
from alora_serve.rpc.status import error_from_failure
from alora_serve.types import (
    AdapterDigest,
    Finished,
    FinishReason,
    PrefixHandle,
    Resume,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    TokenIds,
    TokenLogprob,
    Usage,
)
from alora_serve.v1 import alora_pb2, types_pb2

RequestT = TypeVar("RequestT")


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished generation.

    Attributes:
        text: the whole answer.
        token_ids: its tokens, in order.
        finish_reason: why it ended.
        usage: where tokens came from, over all services.
        timings: where time went, in seconds, as the router measured.
        handle: for a base turn, names prompt and answer: pass it with the next messages. None with an adapter.
        stop_string: the stop string that ended it, if one did.
        logprobs: one natural-log probability a token; empty unless asked for.
        token_bytes: of each token; empty unless log-probabilities are asked for.
        top_logprobs: for each token, the most likely ones in its place, likeliest first; empty unless asked for.
        adapter_digest: the adapter that answered; empty for the base model.
        seed: the seed in use; pass it again, with the same prompt, to draw the same.
    """

    text: str
    token_ids: TokenIds
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    handle: PrefixHandle | None
    stop_string: str
    logprobs: tuple[float, ...]
    adapter_digest: AdapterDigest
    seed: int
    token_bytes: tuple[bytes, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()


class Received(Protocol[RequestT]):
    """What a call has brought so far."""

    @property
    def num_tokens(self) -> int:
        """Tokens that have come."""

    @property
    def is_finished(self) -> bool:
        """Nothing is missing."""

    def resumed(self, request: RequestT) -> RequestT:
        """The request for what is missing."""


class Transcript:
    """The events of one generation so far. ``text`` is the answer as far as it has come."""

    def __init__(self) -> None:
        self.text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._token_bytes: list[bytes] = []
        self._top_logprobs: list[tuple[TokenLogprob, ...]] = []
        self._started: Started | None = None
        self._finished: Finished | None = None

    def add(self, event: StreamEvent) -> bool:
        """Note the next event; whether it is news. A stream that goes on elsewhere says again how it started."""
        match event:
            case Started():
                repeated, self._started = event == self._started, event
                return not repeated
            case TokenChunk():
                self.text += event.text
                self._token_ids += event.token_ids
                self._logprobs += event.logprobs
                self._token_bytes += event.token_bytes
                self._top_logprobs += event.top_logprobs
            case Finished():
                self.text += event.text
                self._finished = event
        return True

    @property
    def num_tokens(self) -> int:
        """Tokens that have come."""
        return len(self._token_ids)

    @property
    def is_finished(self) -> bool:
        """Its last event has come."""
        return self._finished is not None

    def resumed(self, request: alora_pb2.GenerateRequest) -> alora_pb2.GenerateRequest:
        """See :class:`Received`."""
        rest = alora_pb2.GenerateRequest()
        rest.CopyFrom(request)
        if (resume := self.resume()) is not None:
            rest.resume.CopyFrom(resume)
        else:
            self.pin_seed(rest.sampling)
        return rest

    def pin_seed(self, sampling: types_pb2.SamplingParams) -> None:
        """Draw again as was said at the start: a stream that begins anew before its first token is no other stream."""
        if self._started is not None:
            sampling.seed = self._started.seed

    def resume(self) -> types_pb2.Resume | None:
        """From where another router can go on; None before the first token, when it can as well begin."""
        started = self._started
        if started is None or not self._token_ids:
            return None
        resume = Resume(tuple(self._token_ids), started.invocation_start, started.adapter_digest, started.model_digest)
        return resume_to_proto(resume, started.seed)

    def result(self) -> GenerationResult:
        """The generation as a whole.

        Raises:
            UnavailableError: the stream ended before it was finished.
        """
        finished = self._finished
        if finished is None:
            raise UnavailableError("the stream ended before the generation was finished")
        return GenerationResult(
            text=self.text,
            token_ids=tuple(self._token_ids),
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            timings=finished.timings,
            handle=finished.handle,
            stop_string=finished.stop_string,
            logprobs=tuple(self._logprobs),
            token_bytes=tuple(self._token_bytes),
            top_logprobs=tuple(self._top_logprobs),
            adapter_digest=self._started.adapter_digest if self._started else AdapterDigest(""),
            seed=self._started.seed if self._started else 0,
        )


class FanOutTranscript:
    """The events of all targets of a fan-out so far."""

    def __init__(self, num_targets: int) -> None:
        self._targets: list[Transcript | AloraServeError] = [Transcript() for _ in range(num_targets)]

    @property
    def num_tokens(self) -> int:
        """Tokens that have come, of all targets."""
        return sum(target.num_tokens for target in self._targets if isinstance(target, Transcript))

    @property
    def is_finished(self) -> bool:
        """Every target has ended; a call for none has an error coming."""
        ended = [isinstance(target, AloraServeError) or target.is_finished for target in self._targets]
        return bool(ended) and all(ended)

    def resumed(self, request: alora_pb2.FanOutRequest) -> alora_pb2.FanOutRequest:
        """See :class:`Received`. Each target goes on from where it stood; those that have ended are skipped."""
        rest = alora_pb2.FanOutRequest()
        rest.CopyFrom(request)
        for target, wanted in zip(self._targets, rest.targets, strict=True):
            if isinstance(target, AloraServeError) or target.is_finished:
                wanted.skip = True
            elif (resume := target.resume()) is not None:
                wanted.resume.CopyFrom(resume)
            else:
                target.pin_seed(wanted.sampling if wanted.HasField("sampling") else rest.sampling)
        return rest

    def add(self, response: alora_pb2.FanOutResponse) -> tuple[int, StreamEvent | AloraServeError] | None:
        """Note the next response; returns its target's index and what happened to it, or None for nothing new."""
        index = response.index
        if response.HasField("failure"):
            failure = error_from_failure(response.failure)
            self._targets[index] = failure
            return index, failure
        event = event_from_proto(response.event)
        target = self._targets[index]
        if isinstance(target, Transcript) and not target.add(event):
            return None
        return index, event

    def results(self) -> list[GenerationResult | AloraServeError]:
        """A result or a failure a target, in their order."""
        return [_outcome(target) for target in self._targets]


class SampleTranscript:
    """The events of all samples of a prompt so far."""

    def __init__(self, num_samples: int) -> None:
        self._samples = [Transcript() for _ in range(num_samples)]

    @property
    def num_tokens(self) -> int:
        """Tokens that have come, of all samples."""
        return sum(sample.num_tokens for sample in self._samples)

    @property
    def is_finished(self) -> bool:
        """Every sample has ended; a call for none has an error coming."""
        return bool(self._samples) and all(sample.is_finished for sample in self._samples)

    def resumed(self, request: alora_pb2.GenerateRequest) -> alora_pb2.GenerateRequest:
        """See :class:`Received`. Each sample goes on from where it stood; those that have ended are skipped."""
        rest = alora_pb2.GenerateRequest()
        rest.CopyFrom(request)
        for sample in self._samples:
            sample.pin_seed(rest.sampling)  # all have one
            rest.interrupted_samples.add(resume=sample.resume(), skip=sample.is_finished)
        return rest

    def add(self, response: alora_pb2.GenerateResponse) -> tuple[int, StreamEvent] | None:
        """Note the next response; its sample's index and what happened to it, or None for nothing new."""
        index, event = response.event.sample_index, event_from_proto(response.event)
        return (index, event) if self._samples[index].add(event) else None

    def results(self) -> list[GenerationResult]:
        """A result a sample, in their order.

        Raises:
            UnavailableError: the stream ended before all were finished.
        """
        return [sample.result() for sample in self._samples]


def _outcome(target: Transcript | AloraServeError) -> GenerationResult | AloraServeError:
    if isinstance(target, AloraServeError):
        return target
    try:
        return target.result()
    except UnavailableError as error:
        return error
