"""What a stream answers: its events, and where tokens came from and time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from alora_serve.errors import AloraServeError
from alora_serve.rpc.convert.prompt import handle_from_proto, handle_to_proto
from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids
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
from alora_serve.v1 import types_pb2

_FINISH_REASONS: Final[Mapping[FinishReason, types_pb2.FinishReason.ValueType]] = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}
_FINISH_REASONS_FROM_PROTO: Final = {number: reason for reason, number in _FINISH_REASONS.items()}


def event_to_proto(event: StreamEvent, *, attempt: int = 0, first_index: int = 0) -> types_pb2.GenerationEvent:
    """The event as sent; ``first_index`` is the place of a chunk's first token among the generated ones."""
    match event:
        case Started():
            return types_pb2.GenerationEvent(
                attempt=attempt,
                started=types_pb2.Started(
                    adapter_digest=event.adapter_digest,
                    invocation_start=event.invocation_start,
                    seed=event.seed,
                    prompt_tokens=event.prompt_tokens,
                    model_digest=event.model_digest,
                ),
            )
        case TokenChunk():
            return types_pb2.GenerationEvent(
                attempt=attempt,
                chunk=types_pb2.TokenChunk(
                    token_ids=pack_token_ids(event.token_ids),
                    text=event.text,
                    logprobs=event.logprobs,
                    first_index=first_index,
                    top_logprobs=map(_top_to_proto, event.top_logprobs),
                    token_bytes=event.token_bytes,
                ),
            )
        case Finished():
            return types_pb2.GenerationEvent(attempt=attempt, finished=_finished_to_proto(event))
        case Heartbeat():
            return types_pb2.GenerationEvent(attempt=attempt, heartbeat=types_pb2.Heartbeat())


def event_from_proto(message: types_pb2.GenerationEvent) -> StreamEvent:
    """The event; ``attempt``, ``sample_index`` and ``first_index`` stay in the message.

    An event that this version does not know shows, like a heartbeat, only that the stream is alive.

    Raises:
        InvalidRequestError: tokens that are not packed tokens.
        AloraServeError: a finish reason that this version does not know.
    """
    match message.WhichOneof("event"):
        case "started":
            return Started(
                adapter_digest=AdapterDigest(message.started.adapter_digest),
                invocation_start=message.started.invocation_start
                if message.started.HasField("invocation_start")
                else None,
                seed=message.started.seed,
                prompt_tokens=message.started.prompt_tokens,
                model_digest=message.started.model_digest,
            )
        case "chunk":
            return TokenChunk(
                token_ids=unpack_token_ids(message.chunk.token_ids, "event.chunk.token_ids"),
                text=message.chunk.text,
                logprobs=tuple(message.chunk.logprobs),
                token_bytes=tuple(message.chunk.token_bytes),
                top_logprobs=tuple(map(_top_from_proto, message.chunk.top_logprobs)),
            )
        case "finished":
            return _finished_from_proto(message.finished)
        case _:
            return Heartbeat()


def finish_reason_name(number: int) -> str:
    """Why a stream ended, in a word; of a reason that this version does not know, its number."""
    known = _FINISH_REASONS_FROM_PROTO.get(number)  # type: ignore[call-overload]
    return known.value if known is not None else str(number)


def _top_to_proto(tokens: tuple[TokenLogprob, ...]) -> types_pb2.TopLogprobs:
    return types_pb2.TopLogprobs(
        tokens=[
            types_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob, token_bytes=token.token_bytes)
            for token in tokens
        ]
    )


def _top_from_proto(message: types_pb2.TopLogprobs) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token.token_id, token.logprob, token.token_bytes) for token in message.tokens)


def _finished_to_proto(event: Finished) -> types_pb2.Finished:
    return types_pb2.Finished(
        finish_reason=_FINISH_REASONS[event.finish_reason],
        text=event.text,
        stop_string=event.stop_string,
        usage=usage_to_proto(event.usage),
        timings=timings_to_proto(event.timings),
        handle=handle_to_proto(event.handle) if event.handle else None,
    )


def _finished_from_proto(message: types_pb2.Finished) -> Finished:
    finish_reason = _FINISH_REASONS_FROM_PROTO.get(message.finish_reason)
    if finish_reason is None:
        raise AloraServeError(f"the stream finished for reason {message.finish_reason}, unknown to this version")
    return Finished(
        finish_reason=finish_reason,
        usage=usage_from_proto(message.usage),
        timings=timings_from_proto(message.timings),
        text=message.text,
        stop_string=message.stop_string,
        handle=handle_from_proto(message.handle) if message.HasField("handle") else None,
    )


def usage_to_proto(usage: Usage) -> types_pb2.Usage:
    """Counts of tokens and bytes."""
    return types_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        fetched_tokens=usage.fetched_tokens,
        computed_tokens=usage.computed_tokens,
        generated_tokens=usage.generated_tokens,
        fetched_bytes=usage.fetched_bytes,
        stored_bytes=usage.stored_bytes,
        invocation_start=usage.invocation_start,
        store_misses=usage.store_misses,
        store_drops=usage.store_drops,
    )


def usage_from_proto(message: types_pb2.Usage) -> Usage:
    """Counts of tokens and bytes."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        fetched_tokens=message.fetched_tokens,
        computed_tokens=message.computed_tokens,
        generated_tokens=message.generated_tokens,
        fetched_bytes=message.fetched_bytes,
        stored_bytes=message.stored_bytes,
        invocation_start=message.invocation_start if message.HasField("invocation_start") else None,
        store_misses=dict(message.store_misses),
        store_drops=dict(message.store_drops),
    )


def timings_to_proto(timings: Timings) -> types_pb2.Timings:
    """Seconds."""
    return types_pb2.Timings(
        queue_seconds=timings.queue_seconds,
        fetch_seconds=timings.fetch_seconds,
        prefill_seconds=timings.prefill_seconds,
        adapter_load_seconds=timings.adapter_load_seconds,
        first_token_seconds=timings.first_token_seconds,
        decode_seconds=timings.decode_seconds,
        total_seconds=timings.total_seconds,
    )


def timings_from_proto(message: types_pb2.Timings) -> Timings:
    """Seconds."""
    return Timings(
        queue_seconds=message.queue_seconds,
        fetch_seconds=message.fetch_seconds,
        prefill_seconds=message.prefill_seconds,
        adapter_load_seconds=message.adapter_load_seconds,
        first_token_seconds=message.first_token_seconds,
        decode_seconds=message.decode_seconds,
        total_seconds=message.total_seconds,
    )
