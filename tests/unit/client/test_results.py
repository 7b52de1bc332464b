"""Events put together."""

from __future__ import annotations

import grpc
import pytest

from alora_serve.client.results import FanOutTranscript, Transcript
from alora_serve.errors import OverloadedError, UnavailableError
from alora_serve.rpc.convert import event_to_proto
from alora_serve.rpc.status import failure_to_proto
from alora_serve.types import (
    AdapterDigest,
    Finished,
    FinishReason,
    Heartbeat,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from alora_serve.v1 import alora_pb2

LIKELY = (TokenLogprob(1, -0.5, b"H"), TokenLogprob(9, -2.0, b"\xc3"))
EVENTS: list[StreamEvent] = [
    Started(AdapterDigest("ab"), 3, 42, 5),
    TokenChunk((1, 2), "Hel", (-0.5, -0.25), (b"H", b"el"), (LIKELY, LIKELY)),
    Heartbeat(),
    TokenChunk((3,), "lo", (-1.0,), (b"lo",), (LIKELY[:1],)),
    Finished(FinishReason.STOP, Usage(5, generated_tokens=3), Timings(total_seconds=1.0), text="!", stop_string="\n"),
]


def test_a_result_is_the_whole_of_its_events() -> None:
    transcript = Transcript()
    for event in EVENTS:
        transcript.add(event)
    result = transcript.result()
    assert (result.text, result.token_ids, result.logprobs) == ("Hello!", (1, 2, 3), (-0.5, -0.25, -1.0))
    assert (result.finish_reason, result.stop_string, result.handle) == (FinishReason.STOP, "\n", None)
    assert (result.token_bytes, result.top_logprobs) == ((b"H", b"el", b"lo"), (LIKELY, LIKELY, LIKELY[:1]))
    assert [token.text for token in LIKELY] == ["H", "\ufffd"]
    assert (result.adapter_digest, result.seed) == ("ab", 42)
    assert (result.usage.prompt_tokens, result.timings.total_seconds) == (5, 1.0)


def test_a_stream_that_did_not_finish_has_no_result() -> None:
    transcript = Transcript()
    for event in EVENTS[:-1]:
        transcript.add(event)
    assert transcript.text == "Hello"
    with pytest.raises(UnavailableError):
        transcript.result()


def test_a_fan_outs_results_stand_in_the_order_of_its_targets() -> None:
    transcript = FanOutTranscript(3)
    for event in EVENTS:
        assert transcript.add(alora_pb2.FanOutResponse(index=2, event=event_to_proto(event))) == (2, event)
    full = OverloadedError("full", retry_after_seconds=2)
    index, failure = transcript.add(alora_pb2.FanOutResponse(index=0, failure=failure_to_proto(full)))
    assert index == 0
    assert isinstance(failure, OverloadedError)
    failed, unfinished, finished = transcript.results()
    assert failed is failure
    assert failure.retry_after_seconds == 2
    assert isinstance(unfinished, UnavailableError)
    assert not isinstance(finished, Exception)
    assert finished.text == "Hello!"
    assert grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] == 8  # the code that the failure carried
