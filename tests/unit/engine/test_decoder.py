"""A request is checked, placed, loaded, run and accounted for, by whichever worker it comes to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alora_serve.engine import decoder as decoder_module
from alora_serve.engine.core import CoreOptions
from alora_serve.engine.events import Sink
from alora_serve.engine.sequence_request import SequenceId, SequenceRequest
from alora_serve.engine.stepper import EngineLimits
from alora_serve.engine.turns import TURNS
from alora_serve.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    ContextExceededError,
    HandleExpiredError,
    HandleInvalidError,
    InvalidRequestError,
    ModelMismatchError,
    OverloadedError,
    StoreUnavailableError,
)
from alora_serve.handles import HandleSigner
from alora_serve.kv.store import Put
from alora_serve.model.loader import BaseModel
from alora_serve.types import (
    AdapterDigest,
    ChatMessage,
    Finished,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    PrefillResult,
    Prompt,
    PromptKind,
    Resume,
    SamplingParams,
    ScoreRequest,
    Started,
    TokenChunk,
    TokenIds,
)
from faulty_store import FaultyStore
from in_process import SECRET, MemoryStore, Stack, open_stack
from tiny_models import peft_generate

OPTIONS = CoreOptions(block_tokens=16)
CONVERSATION = (ChatMessage("user", "What is the capital of France? Think of the river."),)
INVOCATION = (258, 10, 258)


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
async def stack(model: BaseModel, adapters: Path, store: FaultyStore) -> AsyncIterator[Stack]:
    async with open_stack(model, store, adapters, options=OPTIONS) as opened:
        yield opened
        await opened.core.drain()
        assert sum(segment.pins for segment in opened.core.cache._names) == 0


@pytest.fixture
async def prefilled(stack: Stack) -> PrefillResult:
    return await stack.prefill(Prompt(messages=CONVERSATION))


# --- where adapters turn on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "start", "suffix_tokens"),
    [
        ("appended", 0, 3),
        ("generation-prompt", 0, 11),
        ("inside-generation-prompt", 8, 11),
        ("across-the-edge", -2, 11),
    ],
)
async def test_each_invocation_turns_on_where_peft_would(
    stack: Stack, prefilled: PrefillResult, adapters: Path, model_directory: Path,
    adapter: str, start: int, suffix_tokens: int,
) -> None:  # fmt: skip
    handle = prefilled.handle
    edge = len(handle.prefix_tokens)
    answer = await stack.generate(handle, adapter, max_tokens=8)
    usage = answer.finished.usage
    assert answer.started.invocation_start == usage.invocation_start == edge + start
    assert usage.prompt_tokens == edge + suffix_tokens
    assert usage.cached_tokens == min(edge, edge + start)
    suffix = INVOCATION if adapter == "appended" else handle.generation_prompt_tokens
    reference = peft_generate(model_directory, adapters / adapter, handle.prefix_tokens + suffix, 8)
    assert answer.tokens == reference.tokens


async def test_an_invocation_inside_the_generation_prompt_loads_no_more_than_the_prefix_has(
    stack: Stack, model: BaseModel, adapters: Path, store: FaultyStore
) -> None:
    """Base tokens go on past the prefix here; a block asked for beyond its end has no name, or that of another."""
    for length in range(20, 40):
        prefilled = await stack.prefill(Prompt(messages=(ChatMessage("user", "x" * length),)))
        records = dict(store.values)
        async with open_stack(model, store, adapters, options=OPTIONS) as cold:
            answer = await cold.generate(prefilled.handle, "inside-generation-prompt", max_tokens=2)
        assert answer.finished.usage.fetched_tokens == len(prefilled.handle.prefix_tokens)
        assert answer.finished.usage.store_misses == {}
        assert records.items() <= store.values.items()


async def test_plain_lora_reads_and_writes_no_base_kv(
    stack: Stack, prefilled: PrefillResult, store: FaultyStore
) -> None:
    calls, values = store.calls.copy(), dict(store.values)
    size = stack.core.cache.size_bytes
    usage = (await stack.generate(prefilled.handle, "lora")).finished.usage
    assert (usage.cached_tokens, usage.fetched_bytes, usage.stored_bytes) == (0, 0, 0)
    assert usage.computed_tokens == usage.prompt_tokens
    assert usage.invocation_start is None
    await stack.core.drain()
    assert (store.calls, store.values, stack.core.cache.size_bytes) == (calls, values, size)


# --- base turns -------------------------------------------------------------------------------------------------------


async def test_a_base_turn_is_stored_before_it_ends_and_its_handle_goes_on(
    stack: Stack, prefilled: PrefillResult, model: BaseModel, store: FaultyStore
) -> None:
    answer = await stack.generate(prefilled.handle, max_tokens=30)
    handle = answer.finished.handle
    assert handle is not None
    prompt = prefilled.handle.prefix_tokens + prefilled.handle.generation_prompt_tokens
    assert handle.prefix_tokens == prompt + answer.tokens
    assert (handle.kind, handle.last_role, handle.open_turn) == (PromptKind.CONVERSATION, "assistant", True)
    async with open_stack(model, store, options=OPTIONS) as other:
        usage = (await other.prefill(Prompt(handle=handle, messages=(ChatMessage("user", "Why?"),)))).usage
    # All of the answer but its last token, whose KV nobody has computed.
    assert usage.fetched_tokens == len(handle.prefix_tokens) - 1


async def test_a_base_turn_of_raw_tokens_is_raw_tokens_again(stack: Stack) -> None:
    prefilled = await stack.prefill(Prompt(token_ids=tuple(range(1, 40))))
    answer = await stack.generate(prefilled.handle, max_tokens=5)
    handle = answer.finished.handle
    assert handle is not None
    assert (handle.kind, handle.last_role, handle.open_turn) == (PromptKind.TOKENS, "", False)
    again = await stack.prefill(Prompt(handle=handle))
    assert again.handle.prefix_tokens == tuple(range(1, 40)) + answer.tokens
    assert again.usage.computed_tokens == 1


async def test_an_adapters_turn_has_no_handle(stack: Stack, prefilled: PrefillResult) -> None:
    assert (await stack.generate(prefilled.handle, "appended")).finished.handle is None


async def test_what_a_worker_had_to_compute_is_written_back(
    stack: Stack, prefilled: PrefillResult, model: BaseModel, adapters: Path, store: FaultyStore
) -> None:
    written = dict(store.values)
    store.values.clear()
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        usage = (await cold.generate(prefilled.handle, "appended")).finished.usage
        await cold.core.drain()
    assert (usage.cached_tokens, usage.computed_tokens) == (0, usage.prompt_tokens)
    assert store.values == written


async def test_what_a_worker_computed_rather_than_fetched_is_not_written_again(
    stack: Stack,
    prefilled: PrefillResult,
    model: BaseModel,
    adapters: Path,
    store: FaultyStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (lost, _), *rest = store.values.items()
    del store.values[lost]
    store.calls.clear()
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        monkeypatch.setattr(cold.core.loader, "_should_fetch", lambda _: False)
        usage = (await cold.generate(prefilled.handle, "appended")).finished.usage
        await cold.core.drain()
    assert usage.store_misses.keys() == {"slower"}
    assert (store.calls["put"], len(store.values)) == (1, 1 + len(rest))


# --- accounts ---------------------------------------------------------------------------------------------------------


async def test_a_cold_worker_fetches_and_says_so(
    stack: Stack, prefilled: PrefillResult, model: BaseModel, adapters: Path, store: FaultyStore
) -> None:
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        finished = (await cold.generate(prefilled.handle, "appended", max_tokens=5)).finished
        usage, edge = finished.usage, len(prefilled.handle.prefix_tokens)
        assert (usage.cached_tokens, usage.fetched_tokens, usage.computed_tokens) == (edge, edge, 3)
        assert usage.fetched_bytes == edge * model.layout.bytes_per_token
        assert usage.generated_tokens == 5
        timings = finished.timings
        assert timings.fetch_seconds > 0
        assert timings.first_token_seconds >= timings.fetch_seconds + timings.prefill_seconds
        assert timings.total_seconds >= timings.first_token_seconds + timings.decode_seconds
        again = (await cold.generate(prefilled.handle, "appended")).finished.usage
        assert (again.cached_tokens, again.fetched_tokens, again.fetched_bytes) == (edge, 0, 0)


async def test_a_dead_store_costs_time_and_is_named(
    stack: Stack, prefilled: PrefillResult, model: BaseModel, adapters: Path
) -> None:
    expected = await stack.generate(prefilled.handle, "appended")
    dead = FaultyStore(faults={(name, -1): StoreUnavailableError("refused") for name in ("get", "contains", "put")})
    async with open_stack(model, dead, adapters, options=OPTIONS) as cold:
        answer = await cold.generate(prefilled.handle, "appended")
        base = await cold.generate(prefilled.handle)
    assert answer.tokens == expected.tokens
    assert answer.finished.usage.store_misses["unavailable"] > 0
    assert base.finished.usage.store_drops["unavailable"] > 0


# --- what is refused --------------------------------------------------------------------------------------------------


async def test_handles_of_others_are_refused(stack: Stack, prefilled: PrefillResult) -> None:
    with pytest.raises(HandleInvalidError) as caught:
        await stack.generate(replace(prefilled.handle, prefix_tokens=(1, 2, 3)))
    assert [violation.field for violation in caught.value.violations] == ["handle"]
    foreign = HandleSigner([SECRET], b"", 3600).sign(replace(prefilled.handle, model_digest=b"x" * 32))
    with pytest.raises(ModelMismatchError):
        await stack.generate(foreign)


async def test_an_unknown_adapter_is_not_found(stack: Stack, prefilled: PrefillResult) -> None:
    with pytest.raises(AdapterNotFoundError, match="appended"):
        await stack.generate(prefilled.handle, "append")


async def test_an_answer_that_would_leave_the_context_is_refused(stack: Stack, prefilled: PrefillResult) -> None:
    room = stack.core.model.context_tokens - len(prefilled.handle.prefix_tokens) - len(INVOCATION)
    with pytest.raises(ContextExceededError, match="maximum context length is 512 tokens") as caught:
        await stack.generate(prefilled.handle, "appended", max_tokens=room + 1)
    assert [violation.field for violation in caught.value.violations] == ["sampling.max_tokens"]


async def test_an_answer_of_no_given_length_takes_what_the_context_leaves_and_as_much_when_it_goes_on(
    stack: Stack,
) -> None:
    context, room = stack.core.model.context_tokens, 5
    handle = (await stack.prefill(Prompt(token_ids=tuple(1 + index % 250 for index in range(context - room))))).handle
    whole = await stack.generate(handle, max_tokens=None)
    assert (len(whole.tokens), whole.finished.finish_reason) == (room, FinishReason.LENGTH)
    resume = Resume(whole.tokens[:3], None, AdapterDigest(""))
    rest = await stack.generate(handle, resume=resume, max_tokens=None)
    assert (whole.tokens[:3] + rest.tokens, rest.finished.finish_reason) == (whole.tokens, FinishReason.LENGTH)
    given = await stack.generate(handle, max_tokens=None, default_max_tokens=2)
    assert given.tokens == whole.tokens[:2]


async def test_an_invocation_that_leaves_no_room_for_an_answer_is_not_told_as_max_tokens(stack: Stack) -> None:
    context = stack.core.model.context_tokens
    handle = (await stack.prefill(Prompt(token_ids=tuple(1 + index % 250 for index in range(context - 1))))).handle
    with pytest.raises(ContextExceededError, match="leave no room for an answer") as caught:
        await stack.generate(handle, "appended", max_tokens=None)
    assert [violation.field for violation in caught.value.violations] == ["prompt"]


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
async def test_tokens_outside_the_vocabulary_are_refused_by_field(
    stack: Stack, prefilled: PrefillResult, field: str
) -> None:
    value = {320: 1.0} if field == "logit_bias" else (320,)
    with pytest.raises(InvalidRequestError, match="320 is outside the vocabulary") as caught:
        await stack.generate(prefilled.handle, **{field: value})
    assert [violation.field for violation in caught.value.violations] == [f"sampling.{field}"]


async def test_an_empty_prompt_is_refused(stack: Stack, prefilled: PrefillResult) -> None:
    empty = replace(prefilled.handle, prefix_tokens=(), generation_prompt_tokens=(), kind=PromptKind.TOKENS)
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        await stack.generate(HandleSigner([SECRET], b"", 3600).sign(empty))


async def test_a_refused_request_holds_nothing(stack: Stack, prefilled: PrefillResult) -> None:
    for _ in range(200):  # more than there are places
        with pytest.raises(InvalidRequestError):
            await stack.generate(prefilled.handle, "appended", max_tokens=1000)
    assert (await stack.generate(prefilled.handle, "appended", max_tokens=1)).tokens


async def test_closing_the_stream_early_frees_the_place_and_the_adapter(stack: Stack, prefilled: PrefillResult) -> None:
    request = GenerateRequest(prefilled.handle, "appended", SamplingParams(max_tokens=300, ignore_eos=True))
    for _ in range(200):
        stream = stack.decoder.decode(request)
        async for event in stream:
            if isinstance(event, TokenChunk):
                break
        await stream.aclose()
    await stack.generate(prefilled.handle, max_tokens=1)
    assert stack.core.engine.load.running == 0


# --- going on ---------------------------------------------------------------------------------------------------------


async def test_a_resume_that_another_adapter_or_boundary_would_answer_is_refused(
    stack: Stack, prefilled: PrefillResult
) -> None:
    answer = await stack.generate(prefilled.handle, "appended", max_tokens=4)
    digest, start = answer.started.adapter_digest, answer.started.invocation_start
    with pytest.raises(AdapterRefusedError, match="its files have changed"):
        await stack.generate(prefilled.handle, "appended", resume=Resume((1,), start, AdapterDigest("0" * 64)))
    with pytest.raises(AdapterRefusedError, match="start anew"):
        await stack.generate(prefilled.handle, "appended", resume=Resume((1,), 3, digest))


async def test_a_stream_is_not_gone_on_with_on_another_model(stack: Stack, prefilled: PrefillResult) -> None:
    answer = await stack.generate(prefilled.handle, max_tokens=4)
    assert answer.started.model_digest == stack.core.model.model_digest
    same = Resume(answer.tokens[:1], None, AdapterDigest(""), answer.started.model_digest)
    assert (await stack.generate(prefilled.handle, max_tokens=4, resume=same)).tokens == answer.tokens[1:]
    with pytest.raises(ModelMismatchError, match="start anew"):
        await stack.generate(prefilled.handle, max_tokens=4, resume=replace(same, model_digest=b"o" * 32))


async def test_what_a_router_takes_over_outlives_its_handle_and_what_a_client_goes_on_with_does_not(
    stack: Stack, prefilled: PrefillResult
) -> None:
    long_ago = HandleSigner([SECRET], b"", 3600, clock=lambda: time.time() - 2 * 3600)
    expired = long_ago.sign(prefilled.handle)
    resumed = GenerateRequest(
        expired, sampling=SamplingParams(max_tokens=4), resume=Resume((1,), None, AdapterDigest(""))
    )
    assert [event async for event in stack.decoder.decode(replace(resumed, is_taken_over=True))]
    for request in (resumed, replace(resumed, resume=None)):
        with pytest.raises(HandleExpiredError):
            await anext(stack.decoder.decode(request))
    forged = replace(expired, prefix_tokens=(*expired.prefix_tokens, 5))
    with pytest.raises(HandleInvalidError):
        await anext(stack.decoder.decode(replace(resumed, handle=forged, is_taken_over=True)))


@pytest.mark.parametrize("adapter", ["appended", ""])
async def test_an_answer_that_was_complete_is_only_ended(stack: Stack, prefilled: PrefillResult, adapter: str) -> None:
    """Its worker died between the last token and the end: running on would say one token too many."""
    whole = await stack.generate(prefilled.handle, adapter, max_tokens=5)
    resume = Resume(whole.tokens, whole.started.invocation_start, whole.started.adapter_digest)
    again = await stack.generate(prefilled.handle, adapter, max_tokens=5, resume=resume)
    assert (again.tokens, again.finished.finish_reason) == ((), FinishReason.LENGTH)
    assert again.finished.usage.generated_tokens == 5
    first, second = whole.finished.handle, again.finished.handle
    assert (first and first.prefix_tokens) == (second and second.prefix_tokens)
    ended = await stack.generate(
        prefilled.handle, adapter, max_tokens=9, stop_token_ids=(whole.tokens[-1],), resume=resume
    )
    assert (ended.tokens, ended.finished.finish_reason) == ((), FinishReason.STOP)


async def test_an_answer_that_ended_on_a_stop_string_is_only_ended(stack: Stack, prefilled: PrefillResult) -> None:
    letter = next(token for token in range(256) if stack.core.model.tokenizer.decode([token]) == "a")
    bias = {letter: 100.0}
    resume = Resume((letter,) * 3, None, AdapterDigest(""))
    again = await stack.generate(prefilled.handle, stop=("aaa",), logit_bias=bias, resume=resume)
    finished = again.finished
    assert isinstance(finished, Finished)
    assert (again.tokens, again.text, finished.stop_string) == ((), "", "aaa")
    assert finished.finish_reason is FinishReason.STOP
    # Not so while it still can go on: the text held back is not given twice.
    going = await stack.generate(prefilled.handle, stop=("aaaa",), logit_bias=bias, resume=resume)
    assert (going.tokens, going.text, going.finished.stop_string) == ((letter,), "", "aaaa")


async def test_the_models_own_end_counts_unless_it_is_ignored(
    stack: Stack, prefilled: PrefillResult, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = await stack.generate(prefilled.handle, max_tokens=6)
    end = free.tokens[2]
    monkeypatch.setattr(model.tokenizer, "end_of_sequence_ids", frozenset({end}))
    stopped = await stack.generate(prefilled.handle, max_tokens=6, ignore_eos=False)
    assert stopped.finished.finish_reason is FinishReason.STOP
    assert stopped.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert (await stack.generate(prefilled.handle, max_tokens=6)).tokens == free.tokens


async def test_who_may_store_no_more_is_answered_and_nothing_is_written(
    model: BaseModel, adapters: Path, prefilled: PrefillResult
) -> None:
    store = FaultyStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        for adapter in ("", "appended"):
            sampling = SamplingParams(max_tokens=20, ignore_eos=True)
            request = GenerateRequest(handle=prefilled.handle, adapter=adapter, sampling=sampling, skip_store=True)
            finished = [event async for event in cold.decoder.decode(request)][-1]
            assert isinstance(finished, Finished)
            assert finished.usage.generated_tokens == 20
            if not adapter:
                assert finished.usage.stored_bytes == 0
                assert set(finished.usage.store_drops) == {"quota"}
        scored = await cold.scorer.score(ScoreRequest(prefilled.handle, "", ("a", "b"), skip_store=True))
        assert len(scored.scores) == 2
        await cold.core.drain()
        assert not store.values
        assert store.calls["put"] == 0
        free = await cold.generate(prefilled.handle, max_tokens=20)
        assert free.finished.usage.stored_bytes > 0, "who may, stores"


@pytest.mark.parametrize("ends", ["in time", "later"])
async def test_what_is_written_for_adapters_and_scores_is_told_and_not_waited_for(
    model: BaseModel, adapters: Path, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Tenants are charged by it."""
    store, go_on = MemoryStore(), threading.Event()
    put_many = store.put_many

    def held(puts: Sequence[Put], *, timeout_seconds: float) -> None:
        assert go_on.wait(30)
        put_many(puts, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(store, "put_many", held)
    if ends == "in time":
        go_on.set()
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        finished = (await cold.generate(prefilled.handle, "appended", max_tokens=1)).finished
        longer = await cold.prefiller.prefill(Prompt(token_ids=(5, 6, 7)), tokenize_only=True)
        scored = await cold.scorer.score(ScoreRequest(longer.handle, "", ("a", "b")))
        go_on.set()
        await cold.core.drain()
    assert finished.usage.stored_bytes == len(prefilled.handle.prefix_tokens) * model.layout.bytes_per_token
    assert scored.usage.stored_bytes > 0


async def test_a_tenants_long_texts_to_score_hold_up_no_other_tenants(
    model: BaseModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, encode = threading.Semaphore(0), threading.Event(), model.tokenizer.encode_text

    def held(text: str) -> TokenIds:
        if text == "long":
            begun.release()
            assert go_on.wait(30)
        return encode(text)

    monkeypatch.setattr(model.tokenizer, "encode_text", held)
    options = replace(OPTIONS, tenant_salt=b"salt of these tests")
    async with open_stack(model, MemoryStore(), adapters, options=options) as stack:

        async def score(text: str, tenant: str) -> None:
            handle = (await stack.prefiller.prefill(Prompt(messages=CONVERSATION), tenant=tenant)).handle
            await stack.scorer.score(ScoreRequest(handle, "", (text,), tenant=tenant))

        noisy = [asyncio.create_task(score("long", "noisy")) for _ in range(40)]
        for _ in range(TURNS):
            assert await asyncio.to_thread(begun.acquire, timeout=30)
        async with asyncio.timeout(15):
            await score("short", "quiet")
        assert not begun.acquire(blocking=False)
        go_on.set()
        await asyncio.gather(*noisy)


# --- signs of life ----------------------------------------------------------------------------------------------------


async def test_a_heartbeat_comes_while_an_adapter_or_a_prefix_is_awaited(
    model: BaseModel, adapters: Path, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router would take a worker that says nothing for dead."""
    monkeypatch.setattr(decoder_module, "HEARTBEAT_SECONDS", 0.02)
    async with open_stack(model, store, adapters, options=OPTIONS) as warm:
        handle = (await warm.prefill(Prompt(messages=CONVERSATION))).handle
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        slow_get, slow_acquire = store.get_many, cold.adapters.acquire
        monkeypatch.setattr(store, "get_many", lambda *given, **also: (time.sleep(0.2), slow_get(*given, **also)))
        monkeypatch.setattr(
            cold.adapters, "acquire", lambda *given, **also: (time.sleep(0.2), slow_acquire(*given, **also))[1]
        )
        request = GenerateRequest(handle=handle, adapter="appended", sampling=SamplingParams(max_tokens=1))
        events = [event async for event in cold.decoder.decode(request)]
    started = next(index for index, event in enumerate(events) if isinstance(event, Started))
    first = next(index for index, event in enumerate(events) if isinstance(event, TokenChunk))
    assert events[:started].count(Heartbeat()) >= 3
    assert events[started:first].count(Heartbeat()) >= 3
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.fetched_tokens == len(handle.prefix_tokens)


async def test_a_request_given_up_while_it_loads_holds_nothing(
    stack: Stack, prefilled: PrefillResult, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "HEARTBEAT_SECONDS", 0.01)
    slow_acquire, leases = stack.adapters.acquire, []

    def acquire(*given: Any, **also: Any) -> Any:
        time.sleep(0.1)
        leases.append(slow_acquire(*given, **also))
        return leases[-1]

    monkeypatch.setattr(stack.adapters, "acquire", acquire)
    events = stack.decoder.decode(GenerateRequest(handle=prefilled.handle, adapter="appended"))
    assert await anext(events) == Heartbeat()
    await events.aclose()
    async with asyncio.timeout(5.0):
        while not leases or leases[0]._release is not None:  # noqa: ASYNC110  # a thread gives it, a callback takes it
            await asyncio.sleep(0.01)
    assert stack.core.engine._places.taken == 0


async def test_a_request_given_up_while_it_fetches_ends_the_fetch(
    model: BaseModel, adapters: Path, prefilled: PrefillResult, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "HEARTBEAT_SECONDS", 0.01)
    gate, began, handed = threading.Event(), threading.Event(), list[int]()

    def get_many(keys: Any, sink: Any, *, timeout_seconds: float) -> None:
        for index, key in enumerate(keys):
            began.set()
            assert gate.wait(30)
            sink(index, memoryview(store.values[key]))
            handed.append(index)

    monkeypatch.setattr(store, "get_many", get_many)
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        events = cold.decoder.decode(GenerateRequest(handle=prefilled.handle, adapter="appended"))
        while isinstance(await anext(events), Heartbeat | Started) and not began.is_set():
            pass
        await events.aclose()
        await asyncio.sleep(0.01)
        gate.set()
        async with asyncio.timeout(5.0):
            while any(segment.pins for segment in cold.core.cache._names):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert handed == []


async def test_resumes_of_clients_are_bounded_and_what_the_router_takes_over_is_not(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CoreOptions(block_tokens=16, limits=EngineLimits(max_sequences=1, max_queue=0))
    async with open_stack(model, FaultyStore(), options=options) as small, AsyncExitStack() as held:
        submitted, submit = list[SequenceRequest](), small.core.engine.submit

        def note(request: SequenceRequest, sink: Sink) -> SequenceId:
            submitted.append(request)
            return submit(request, sink)

        monkeypatch.setattr(small.core.engine, "submit", note)
        handle = (await small.prefill(Prompt(messages=CONVERSATION))).handle
        resumed = GenerateRequest(handle, resume=Resume((1,), None, AdapterDigest("")))

        async def begin(request: GenerateRequest) -> None:
            events = await held.enter_async_context(aclosing(small.decoder.decode(request)))
            async for event in events:
                if isinstance(event, TokenChunk):
                    return

        await begin(resumed)
        await begin(resumed)
        with pytest.raises(OverloadedError):
            await begin(resumed)
        await begin(replace(resumed, is_taken_over=True))
        assert [request.is_taken_over for request in submitted[1:]] == [False, False, True]


async def test_a_resume_with_tokens_of_no_vocabulary_is_refused(stack: Stack, prefilled: PrefillResult) -> None:
    beyond = Resume((stack.core.model.vocabulary_size,), None, AdapterDigest(""))
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        await stack.generate(prefilled.handle, resume=beyond)
