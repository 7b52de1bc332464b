"""What spans say of a request: names, counts and reasons."""

from __future__ import annotations

import dataclasses

import pytest

from alora_serve.telemetry import answer_attributes, request_attributes, started_attributes
from alora_serve.types import (
    AdapterDigest,
    GenerateRequest,
    PrefixHandle,
    PromptKind,
    SamplingParams,
    Started,
    Usage,
)

HANDLE = PrefixHandle(b"m" * 32, b"s" * 32, (11, 12, 13), (14,), PromptKind.CONVERSATION, "user", False, 0)
REQUEST = GenerateRequest(HANDLE, "guard", SamplingParams(max_tokens=5, stop=("secret",)), tenant="acme")


def test_a_request_is_told_by_its_adapter_and_never_by_what_was_said_or_for_whom() -> None:
    told = request_attributes(REQUEST, "llama")
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "alora_serve",
        "gen_ai.request.model": "guard",
        "gen_ai.request.max_tokens": 5,
        "alora.base_model": "llama",
        "alora.adapter": "guard",
    }


@pytest.mark.parametrize(
    ("kind", "operation"), [(PromptKind.TOKENS, "text_completion"), (PromptKind.CONVERSATION, "chat")]
)
def test_without_an_adapter_the_base_model_answers(kind: PromptKind, operation: str) -> None:
    handle = dataclasses.replace(HANDLE, kind=kind)
    told = request_attributes(dataclasses.replace(REQUEST, adapter="", handle=handle), "llama")
    assert (told["gen_ai.request.model"], told["gen_ai.operation.name"]) == ("llama", operation)
    assert "alora.adapter" not in told


def test_an_answer_is_told_with_where_its_tokens_came_from_and_what_the_store_lacked() -> None:
    usage = Usage(
        prompt_tokens=20,
        cached_tokens=16,
        fetched_tokens=8,
        computed_tokens=4,
        generated_tokens=3,
        fetched_bytes=800,
        stored_bytes=400,
        store_misses={"absent": 2, "corrupt": 1},
        store_drops={"full": 5},
    )
    assert answer_attributes(usage, "stop") == {
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "alora.tokens.fetched": 8,
        "alora.tokens.computed": 4,
        "alora.bytes.fetched": 800,
        "alora.bytes.stored": 400,
        "alora.misses.absent": 2,
        "alora.misses.corrupt": 1,
        "alora.drops.full": 5,
    }


def test_a_beginning_is_told_with_the_adapters_version_where_there_is_one() -> None:
    assert started_attributes(Started(AdapterDigest("d1"), 7, 1, 20), 3) == {
        "alora.adapter.digest": "d1",
        "alora.invocation_start": 7,
        "alora.tokens.resumed": 3,
    }
    assert started_attributes(Started(AdapterDigest(""), None, 1, 20), 0) == {"alora.tokens.resumed": 0}
