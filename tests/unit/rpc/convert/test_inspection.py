"""What Tokenize and Score say crosses the wire as it was, and nothing else does."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc import convert
from alora_serve.types import (
    ChatMessage,
    ContinuationScore,
    PrefixHandle,
    Prompt,
    PromptKind,
    ScoreRequest,
    ScoreResult,
    Timings,
    TokenizedPrompt,
    Usage,
)
from alora_serve.v1 import adapter_decode_pb2, alora_pb2

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=6).map(tuple)
texts = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5).map(tuple)
logprob = st.floats(-100, 0, width=32)
HANDLE = PrefixHandle(bytes(32), bytes(32), (1, 2), (3,), PromptKind.CONVERSATION, "user", False, 5, bytes(32))
scores = st.lists(logprob, max_size=5).map(lambda values: ContinuationScore(tuple(range(len(values))), tuple(values)))


@given(tokens, tokens)
def test_tokens_come_back(prefix: tuple[int, ...], generation_prompt: tuple[int, ...]) -> None:
    handle = dataclasses.replace(HANDLE, prefix_tokens=prefix, generation_prompt_tokens=generation_prompt)
    told = convert.tokenized_from_proto(convert.tokenized_to_proto(handle))
    assert told == TokenizedPrompt(prefix, generation_prompt)


@given(texts, st.text(max_size=5))
def test_what_to_score_comes_back(continuations: tuple[str, ...], adapter: str) -> None:
    scoring = convert.Scoring(Prompt(messages=(ChatMessage("user", "Hi"),)), adapter, continuations)
    assert convert.scoring_from_proto(convert.scoring_to_proto(scoring)) == scoring
    request = ScoreRequest(HANDLE, adapter, continuations, "id", "tenant", skip_store=True)
    assert convert.score_from_proto(convert.score_to_proto(request)) == request


@given(st.lists(scores, max_size=4))
def test_scores_come_back(told: list[ContinuationScore]) -> None:
    result = ScoreResult(tuple(told), Usage(prompt_tokens=3, cached_tokens=2), Timings(total_seconds=0.5))
    assert convert.score_result_from_proto(convert.score_result_to_proto(result)) == result
    assert convert.score_result_from_proto(convert.score_result_to_internal_proto(result)) == result


def test_a_worker_is_asked_for_something_and_says_as_many_figures_as_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="0 continuations are not 1 to 256"):
        convert.score_from_proto(adapter_decode_pb2.AdapterDecodeServiceScoreRequest())
    answer = convert.score_result_to_proto(ScoreResult((ContinuationScore((1,), (-1.0, -2.0)),), Usage(), Timings()))
    with pytest.raises(InvalidRequestError, match="2 log-probabilities for 1 tokens"):
        convert.score_result_from_proto(answer)
    with pytest.raises(InvalidRequestError, match="not whole packed tokens"):
        convert.tokenized_from_proto(alora_pb2.TokenizeResponse(prefix_token_ids=b"abc"))
