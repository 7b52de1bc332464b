"""Requests that look at tokens and generate none: ``Tokenize`` and ``Score``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.convert.events import timings_from_proto, timings_to_proto, usage_from_proto, usage_to_proto
from alora_serve.rpc.convert.names import check_adapter_name
from alora_serve.rpc.convert.prompt import handle_from_proto, handle_to_proto, prompt_to_proto, read_prompt
from alora_serve.rpc.convert.requests import check_turn_to_answer
from alora_serve.rpc.convert.text import sendable_texts
from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids
from alora_serve.rpc.convert.violations import Violations
from alora_serve.types import ContinuationScore, PrefixHandle, Prompt, ScoreRequest, ScoreResult, TokenizedPrompt
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, types_pb2

MAX_CONTINUATIONS: Final = 256


@dataclass(frozen=True, slots=True)
class Scoring:
    """A prompt and the texts to score after it, by an adapter or, where that is empty, the base model."""

    prompt: Prompt
    adapter: str
    continuations: tuple[str, ...]


def tokenize_to_proto(prompt: Prompt) -> alora_pb2.TokenizeRequest:
    """The public request."""
    return alora_pb2.TokenizeRequest(prompt=prompt_to_proto(prompt))


def tokenized_to_proto(handle: PrefixHandle) -> alora_pb2.TokenizeResponse:
    """The public answer: what a handle says of its tokens."""
    return alora_pb2.TokenizeResponse(
        prefix_token_ids=pack_token_ids(handle.prefix_tokens),
        generation_prompt_token_ids=pack_token_ids(handle.generation_prompt_tokens),
    )


def tokenized_from_proto(response: alora_pb2.TokenizeResponse) -> TokenizedPrompt:
    """What a client is told.

    Raises:
        InvalidRequestError: tokens that are malformed.
    """
    return TokenizedPrompt(
        prefix_tokens=unpack_token_ids(response.prefix_token_ids, "prefix_token_ids"),
        generation_prompt_tokens=unpack_token_ids(response.generation_prompt_token_ids, "generation_prompt_token_ids"),
    )


@sendable_texts("adapter")
def scoring_to_proto(scoring: Scoring) -> alora_pb2.ScoreRequest:
    """The public request."""
    request = alora_pb2.ScoreRequest(prompt=prompt_to_proto(scoring.prompt), adapter=scoring.adapter)
    with sendable_texts("continuations"):
        request.continuations.extend(scoring.continuations)
    return request


def scoring_from_proto(request: alora_pb2.ScoreRequest) -> Scoring:
    """What to score.

    Raises:
        InvalidRequestError: with every bad field of the request.
    """
    violations = Violations()
    prompt = read_prompt(request.prompt, violations, field="prompt")
    check_adapter_name(request.adapter, violations, "adapter")
    check_turn_to_answer(prompt, [request.adapter], violations)
    _check_continuations(request.continuations, violations)
    violations.raise_if_any()
    return Scoring(prompt, request.adapter, tuple(request.continuations))


def score_to_proto(request: ScoreRequest) -> adapter_decode_pb2.AdapterDecodeServiceScoreRequest:
    """The request to a worker."""
    return adapter_decode_pb2.AdapterDecodeServiceScoreRequest(
        handle=handle_to_proto(request.handle),
        adapter=request.adapter,
        continuations=request.continuations,
        request_id=request.request_id,
        tenant=request.tenant,
        skip_store=request.skip_store,
    )


def score_from_proto(request: adapter_decode_pb2.AdapterDecodeServiceScoreRequest) -> ScoreRequest:
    """What a worker is to score.

    Raises:
        InvalidRequestError: a malformed handle, a name that no adapter has, or none or too many continuations.
    """
    violations = Violations()
    check_adapter_name(request.adapter, violations, "adapter")
    _check_continuations(request.continuations, violations)
    violations.raise_if_any()
    return ScoreRequest(
        handle=handle_from_proto(request.handle),
        adapter=request.adapter,
        continuations=tuple(request.continuations),
        request_id=request.request_id,
        tenant=request.tenant,
        skip_store=request.skip_store,
    )


def _check_continuations(continuations: Sequence[str], violations: Violations) -> None:
    count = len(continuations)
    violations.require(
        1 <= count <= MAX_CONTINUATIONS, "continuations", f"{count} continuations are not 1 to {MAX_CONTINUATIONS}"
    )
    for index, text in enumerate(continuations[:MAX_CONTINUATIONS]):
        violations.require(bool(text), f"continuations[{index}]", "is empty")


def score_result_to_proto(result: ScoreResult) -> alora_pb2.ScoreResponse:
    """The public answer."""
    return alora_pb2.ScoreResponse(
        scores=map(_score_to_proto, result.scores),
        usage=usage_to_proto(result.usage),
        timings=timings_to_proto(result.timings),
    )


def score_result_to_internal_proto(result: ScoreResult) -> adapter_decode_pb2.AdapterDecodeServiceScoreResponse:
    """A worker's answer."""
    return adapter_decode_pb2.AdapterDecodeServiceScoreResponse(
        scores=map(_score_to_proto, result.scores),
        usage=usage_to_proto(result.usage),
        timings=timings_to_proto(result.timings),
    )


def score_result_from_proto(
    response: alora_pb2.ScoreResponse | adapter_decode_pb2.AdapterDecodeServiceScoreResponse,
) -> ScoreResult:
    """The answer, public or a worker's.

    Raises:
        InvalidRequestError: tokens that are malformed, or as many as their log-probabilities are not.
    """
    return ScoreResult(
        scores=tuple(_score_from_proto(score, f"scores[{index}]") for index, score in enumerate(response.scores)),
        usage=usage_from_proto(response.usage),
        timings=timings_from_proto(response.timings),
    )


def _score_to_proto(score: ContinuationScore) -> types_pb2.ContinuationScore:
    return types_pb2.ContinuationScore(token_ids=pack_token_ids(score.token_ids), logprobs=score.logprobs)


def _score_from_proto(message: types_pb2.ContinuationScore, field: str) -> ContinuationScore:
    tokens = unpack_token_ids(message.token_ids, f"{field}.token_ids")
    if len(tokens) != len(message.logprobs):
        raise InvalidRequestError.of(field, f"{len(message.logprobs)} log-probabilities for {len(tokens)} tokens")
    return ContinuationScore(tokens, tuple(message.logprobs))
