"""The public API on real processes: everything that can be asked gives the tokens of stock PEFT, in fp32."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from alora_serve.client import ChatMessage, GenerationResult, Target
from alora_serve.errors import AdapterNotFoundError
from alora_serve.rpc.convert import event_from_proto, prompt_to_proto
from alora_serve.types import Finished, FinishReason, Heartbeat, Prompt, Started, TokenChunk
from alora_serve.v1 import alora_pb2, types_pb2
from deployment import ANSWER_TOKENS, GREEDY, Deployed, ServedModel

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]


def conversation(subject: str) -> list[ChatMessage]:
    """A conversation that no other test has."""
    return [
        ChatMessage("user", f"The {subject} is deep and salt, and ships go over it. Is it deep?"),
        ChatMessage("assistant", "Yes."),
        ChatMessage("user", "And is it salt, as I was told?"),
    ]


def adapter_of(model: ServedModel, kind: str) -> str:
    return getattr(model, kind) if kind != "base" else ""


async def whole(running: Deployed, messages: list[ChatMessage], adapter: str, **more: Any) -> GenerationResult:
    stream = running.client.generate(messages, adapter=adapter, sampling=GREEDY, **more)
    return await stream.result()


@pytest.mark.parametrize("kind", ["base", "appended", "answering"])
async def test_base_and_alora_compute_the_conversation_once_and_then_only_what_follows_it(
    running: Deployed, kind: str
) -> None:
    # Of these conversations the answers are others when an adapter turns on one token early or late.
    adapter, messages = adapter_of(running.model, kind), conversation(f"{kind} ocean")
    cold = await whole(running, messages, adapter)
    prefilled = await running.client.prefill(messages)
    warm = await running.ask(prefilled.handle, adapter)

    prompt, suffix = running.model.prompt(prefilled.handle, adapter), running.model.suffix(prefilled.handle, adapter)
    assert cold.token_ids == warm.token_ids == running.model.cold_tokens(adapter, prompt)
    start = len(prefilled.handle.prefix_tokens) if adapter else None
    assert {cold.usage.invocation_start, warm.usage.invocation_start} == {start}
    for usage in (cold.usage, warm.usage):
        assert usage.prompt_tokens == len(prompt) == usage.cached_tokens + usage.computed_tokens
        assert usage.generated_tokens == ANSWER_TOKENS
        assert not usage.store_drops
    # Conversations share their first tokens, so not all of this one need have been new.
    assert cold.usage.computed_tokens > len(suffix)
    assert cold.usage.fetched_bytes > 0, "the worker has the conversation from the store"
    assert cold.usage.stored_bytes > 0
    assert prefilled.usage.computed_tokens == 0
    assert prefilled.usage.cached_tokens == prefilled.usage.prompt_tokens == len(prefilled.handle.prefix_tokens)
    assert warm.usage.fetched_bytes == 0, "it is resident"
    # A base turn leaves its full blocks behind, and one may reach into what follows the conversation.
    assert warm.usage.computed_tokens == len(suffix) if adapter else warm.usage.computed_tokens <= len(suffix)
    assert (cold.handle is None) == bool(adapter)


async def test_a_plain_lora_computes_everything_and_stores_nothing(running: Deployed) -> None:
    messages = conversation("plain sea")
    handle = (await running.client.prefill(messages)).handle
    for result in (
        await whole(running, messages, running.model.plain),
        await running.ask(handle, running.model.plain),
    ):
        prompt = running.model.prompt(handle, running.model.plain)
        assert result.token_ids == running.model.cold_tokens(running.model.plain, prompt)
        usage = result.usage
        assert (usage.computed_tokens, usage.cached_tokens) == (len(prompt), 0)
        assert (usage.fetched_bytes, usage.stored_bytes, usage.invocation_start) == (0, 0, None)


async def test_a_stream_is_started_then_tokens_in_order_then_finished(tiny: Deployed) -> None:
    request = alora_pb2.GenerateRequest(
        prompt=prompt_to_proto(Prompt(messages=tuple(conversation("streamed sea")))),
        adapter=tiny.model.appended,
        sampling=types_pb2.SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=True, seed=3),
    )
    events = [response.event async for response in tiny.stub.Generate(request)]
    first, *middle, last = [event_from_proto(event) for event in events]
    assert isinstance(first, Started)
    assert first.seed == 3
    assert first.adapter_digest == next(
        adapter.digest for adapter in await tiny.client.list_adapters() if adapter.name == tiny.model.appended
    )
    assert isinstance(last, Finished)
    assert last.finish_reason is FinishReason.LENGTH
    assert (last.usage.prompt_tokens, last.usage.invocation_start) == (first.prompt_tokens, first.invocation_start)
    chunks = [event for event in middle if not isinstance(event, Heartbeat)]
    assert all(isinstance(chunk, TokenChunk) for chunk in chunks)
    counted = 0
    for event in events:
        assert event.attempt == 0
        if event.HasField("chunk"):
            assert event.chunk.first_index == counted
            counted += len(event.chunk.token_ids) // 4
            assert len(event.chunk.logprobs) == len(event.chunk.token_ids) // 4
            assert all(logprob <= 0 for logprob in event.chunk.logprobs)
    assert counted == ANSWER_TOKENS == last.usage.generated_tokens
    assert 0 < last.timings.first_token_seconds <= last.timings.total_seconds


async def test_a_fan_out_tags_results_by_target_and_one_failure_disturbs_no_other(running: Deployed) -> None:
    model, messages = running.model, conversation("fanned sea")
    targets = [model.appended, "guarb", model.answering, model.plain, ""]
    stream = running.client.fanout(messages, [Target(name, GREEDY) for name in targets])
    seen = [index async for index, _ in stream]
    assert set(seen) == set(range(len(targets)))
    results = await stream.results()
    failure = results[1]
    assert isinstance(failure, AdapterNotFoundError)
    assert "nearest: " in str(failure)
    handle = (await running.client.prefill(messages)).handle
    for index, adapter in enumerate(targets):
        result = results[index]
        if index == 1:
            continue
        assert isinstance(result, GenerationResult)
        assert result.token_ids == model.cold_tokens(adapter, model.prompt(handle, adapter)), adapter
    # One prefill, charged to one target; the others compute what is their own.
    charged, answering, _, base = (results[index].usage for index in (0, 2, 3, 4))
    assert charged.computed_tokens > len(model.suffix(handle, model.appended))
    assert answering.computed_tokens == len(model.suffix(handle, model.answering))
    assert base.computed_tokens == len(handle.generation_prompt_tokens)


async def test_a_base_turn_is_stored_and_the_next_prefill_has_it_with_the_assistants_turn(tiny: Deployed) -> None:
    messages = conversation("answered sea")
    turn = await whole(tiny, messages, "")
    assert turn.handle is not None
    follow_up = [ChatMessage("user", "Why?")]
    prefilled = await tiny.client.prefill(follow_up, handle=turn.handle)
    # All of the turn but the last token, which was chosen and never run.
    answered = turn.usage.prompt_tokens + ANSWER_TOKENS
    assert prefilled.handle.prefix_tokens[:answered] == turn.handle.prefix_tokens
    assert prefilled.usage.cached_tokens == answered - 1
    for adapter in (tiny.model.appended, ""):
        result = await tiny.client.generate(follow_up, handle=turn.handle, adapter=adapter, sampling=GREEDY).result()
        assert result.token_ids == tiny.model.cold_tokens(adapter, tiny.model.prompt(prefilled.handle, adapter))
        assert result.usage.computed_tokens <= len(tiny.model.suffix(prefilled.handle, adapter))


async def test_raw_tokens_are_taken_as_they_are_and_the_last_invocation_counts(tiny: Deployed) -> None:
    guard = tiny.model.invocations["guard"]
    prompt = tuple(b"before") + guard + tuple(b"between, and then ") + guard + tuple(b"after")
    result = await tiny.client.generate(token_ids=prompt, adapter="guard", sampling=GREEDY).result()
    assert result.token_ids == tiny.model.cold_tokens("guard", prompt)
    assert result.usage.invocation_start == len(prompt) - len(b"after") - len(guard)
    assert result.usage.prompt_tokens == len(prompt)


async def test_requests_of_all_kinds_at_once_get_the_tokens_they_get_alone(tiny: Deployed) -> None:
    asked = [("guard", 1), ("answer", 4), ("plain", 2), ("", 6), ("guard", 9), ("", 3)]
    conversations = [
        [ChatMessage("user", f"Sea number {number}. " * length)] for number, (_, length) in enumerate(asked)
    ]
    together = await asyncio.gather(
        *(whole(tiny, turns, adapter) for turns, (adapter, _) in zip(conversations, asked, strict=True))
    )
    for turns, (adapter, _), result in zip(conversations, asked, together, strict=True):
        handle = (await tiny.client.prefill(turns)).handle
        assert result.token_ids == tiny.model.cold_tokens(adapter, tiny.model.prompt(handle, adapter))


async def test_a_stop_string_ends_the_text_before_it_and_a_seed_repeats_a_draw(tiny: Deployed) -> None:
    handle = (await tiny.client.prefill(conversation("drawn sea"))).handle
    drawn = [await tiny.ask(handle, "answer", temperature=1.0, seed=seed, max_tokens=40) for seed in (11, 11, 12)]
    assert drawn[0].token_ids == drawn[1].token_ids != drawn[2].token_ids
    stop = drawn[0].text[5:7]
    stopped = await tiny.ask(handle, "answer", temperature=1.0, seed=11, max_tokens=40, stop=[stop])
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.stop_string == stop
    assert stopped.text == drawn[0].text[: drawn[0].text.index(stop)]
