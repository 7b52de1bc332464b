"""A prompt becomes stored blocks and a signed handle, with an account of where each token came from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import structlog
from opentelemetry.trace import Tracer
from structlog.testing import capture_logs

from alora_serve.engine.core import CoreOptions
from alora_serve.engine.stepper import EngineLimits
from alora_serve.engine.turns import TURNS
from alora_serve.errors import (
    ContextExceededError,
    HandleInvalidError,
    InvalidRequestError,
    ModelMismatchError,
    OverloadedError,
    StoreFullError,
    StoreUnavailableError,
)
from alora_serve.handles import HandleSigner
from alora_serve.kv.keys import part_key
from alora_serve.model.chat import RenderedPrompt
from alora_serve.model.loader import BaseModel
from alora_serve.telemetry import current
from alora_serve.types import ChatMessage, Prompt, PromptKind
from faulty_store import FaultyStore
from in_process import SECRET, MemoryStore, Stack, open_stack
from recorded_spans import Recorded, recording

OPTIONS = CoreOptions(block_tokens=16)
TENANTS = replace(OPTIONS, tenant_salt=b"salt of these tests")
CONVERSATION = (ChatMessage("user", "What is the capital of France? Think of the river."),)
TOKENS = tuple(range(1, 81))
PATIENCE_SECONDS = 30.0


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
async def stack(model: BaseModel, store: FaultyStore) -> AsyncIterator[Stack]:
    async with open_stack(model, store, options=OPTIONS) as opened:
        yield opened
        assert sum(segment.pins for segment in opened.core.cache._names) == 0


async def test_a_new_conversation_is_computed_and_stored(stack: Stack, store: FaultyStore) -> None:
    result = await stack.prefill(Prompt(messages=CONVERSATION))
    usage, count = result.usage, len(result.handle.prefix_tokens)
    assert (usage.prompt_tokens, usage.computed_tokens, usage.cached_tokens, usage.fetched_tokens) == (
        count,
        count,
        0,
        0,
    )
    assert usage.stored_bytes == count * stack.core.model.layout.bytes_per_token
    assert len(store.values) == -(-count // 16)
    assert usage.store_misses == {"absent": -(-count // 16)}
    assert result.handle.kind is PromptKind.CONVERSATION
    assert result.handle.last_role == "user"
    assert result.timings.prefill_seconds > 0
    assert result.timings.total_seconds >= result.timings.prefill_seconds


async def test_the_same_conversation_again_computes_and_stores_nothing(stack: Stack) -> None:
    first = await stack.prefill(Prompt(messages=CONVERSATION))
    again = await stack.prefill(Prompt(messages=CONVERSATION))
    assert again.handle.prefix_tokens == first.handle.prefix_tokens
    usage = again.usage
    assert (usage.cached_tokens, usage.computed_tokens, usage.fetched_tokens, usage.stored_bytes) == (
        len(first.handle.prefix_tokens), 0, 0, 0,
    )  # fmt: skip


async def test_one_prompt_asked_by_many_at_once_is_computed_once_and_stored_before_any_answer(
    stack: Stack, store: FaultyStore
) -> None:
    async def ask() -> int:
        result = await stack.prefill(Prompt(token_ids=TOKENS))
        chain = stack.core.names.chain(result.handle.prefix_tokens)
        assert stack.core.blocks.missing(stack.core.blocks.blocks(chain, 0)) == []
        return result.usage.computed_tokens

    assert sorted(await asyncio.gather(*(ask() for _ in range(4)))) == [0, 0, 0, len(TOKENS)]
    assert stack.metrics.counts["step tokens"] == len(TOKENS)


async def test_blocks_are_stored_before_the_answer_names_them(stack: Stack, store: FaultyStore) -> None:
    """The handle goes to workers at once; they must not find less than it promises."""
    result = await stack.prefill(Prompt(token_ids=TOKENS))
    chain = stack.core.names.chain(result.handle.prefix_tokens)
    assert stack.core.blocks.missing(stack.core.blocks.blocks(chain, 0)) == []


async def test_a_block_is_stored_while_the_next_chunk_is_computed(
    model: BaseModel, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, arrived, passes = threading.Event(), threading.Event(), count()
    options = replace(OPTIONS, limits=EngineLimits(max_step_tokens=16))
    async with open_stack(model, store, options=options) as stack:
        runner = stack.core.engine._stepper._runner
        forward = runner.forward

        def hold_the_second(*arguments: object) -> object:
            if next(passes) == 1:
                arrived.set()
                assert gate.wait(PATIENCE_SECONDS)
            return forward(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(runner, "forward", hold_the_second)
        prefill = asyncio.create_task(stack.prefill(Prompt(token_ids=TOKENS)))
        try:
            assert await asyncio.to_thread(arrived.wait, PATIENCE_SECONDS)
            first = part_key(stack.core.names.chain(TOKENS).full[0], 0)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while first not in store.values:  # noqa: ASYNC110  # a thread of the store puts it there
                    await asyncio.sleep(0.01)
            assert len(store.values) == 1
        finally:
            gate.set()
        assert (await prefill).usage.stored_bytes == len(TOKENS) * model.layout.bytes_per_token


async def test_blocks_that_left_the_store_are_written_again_from_memory(stack: Stack, store: FaultyStore) -> None:
    await stack.prefill(Prompt(token_ids=TOKENS))
    store.values.clear()
    again = await stack.prefill(Prompt(token_ids=TOKENS))
    assert (again.usage.computed_tokens, again.usage.fetched_tokens) == (0, 0)
    assert again.usage.stored_bytes == len(TOKENS) * stack.core.model.layout.bytes_per_token
    assert len(store.values) == 5


async def test_a_longer_conversation_computes_only_what_is_new(stack: Stack) -> None:
    await stack.prefill(Prompt(token_ids=TOKENS[:50]))
    longer = await stack.prefill(Prompt(token_ids=TOKENS))
    assert (longer.usage.cached_tokens, longer.usage.computed_tokens) == (50, 30)


async def test_another_process_fetches_instead_of_computing(stack: Stack, store: FaultyStore, model: BaseModel) -> None:
    await stack.prefill(Prompt(token_ids=TOKENS))
    async with open_stack(model, store, options=OPTIONS) as other:
        usage = (await other.prefill(Prompt(token_ids=TOKENS))).usage
    assert (usage.cached_tokens, usage.fetched_tokens, usage.computed_tokens) == (80, 80, 0)
    assert usage.fetched_bytes == 80 * model.layout.bytes_per_token
    assert usage.stored_bytes == 0


@pytest.mark.parametrize(
    ("error", "reason"), [(StoreUnavailableError("refused"), "unavailable"), (StoreFullError("full"), "full")]
)
async def test_a_store_that_takes_nothing_is_told_in_usage(
    stack: Stack, store: FaultyStore, error: Exception, reason: str
) -> None:
    store.faults["put", -1] = error  # type: ignore[assignment]
    result = await stack.prefill(Prompt(token_ids=TOKENS))
    assert (result.usage.computed_tokens, result.usage.stored_bytes) == (80, 0)
    assert result.usage.store_drops == {reason: 5}


async def test_a_store_that_is_away_is_told_in_usage(stack: Stack, store: FaultyStore) -> None:
    for operation in ("get", "contains", "put"):
        store.faults[operation, -1] = StoreUnavailableError("refused")
    usage = (await stack.prefill(Prompt(token_ids=TOKENS))).usage
    assert (usage.computed_tokens, usage.store_misses, usage.store_drops) == (
        80,
        {"unavailable": 5},
        {"unavailable": 5},
    )


async def test_tokenizing_alone_computes_and_stores_nothing(stack: Stack, store: FaultyStore) -> None:
    result = await stack.prefiller.prefill(Prompt(messages=CONVERSATION), tokenize_only=True)
    assert result.usage.prompt_tokens == len(result.handle.prefix_tokens)
    assert result.usage.computed_tokens == 0
    assert not store.calls
    assert (await stack.prefill(Prompt(messages=CONVERSATION))).handle.prefix_tokens == result.handle.prefix_tokens


async def test_a_handle_alone_is_renewed(stack: Stack) -> None:
    first = await stack.prefill(Prompt(token_ids=TOKENS))
    again = await stack.prefill(Prompt(handle=first.handle))
    assert replace(again.handle, expires_unix_seconds=0, mac=b"") == replace(
        first.handle, expires_unix_seconds=0, mac=b""
    )
    assert again.usage.computed_tokens == 0


async def test_a_handle_and_new_messages_go_on_with_its_tokens(stack: Stack) -> None:
    first = await stack.prefill(Prompt(messages=CONVERSATION))
    more = (ChatMessage("assistant", "Paris."), ChatMessage("user", "And of Italy?"))
    longer = await stack.prefill(Prompt(handle=first.handle, messages=more))
    whole = await stack.prefill(Prompt(messages=CONVERSATION + more))
    assert longer.handle.prefix_tokens == whole.handle.prefix_tokens
    assert longer.usage.cached_tokens == len(first.handle.prefix_tokens)


async def test_a_foreign_handle_is_refused(stack: Stack) -> None:
    first = await stack.prefill(Prompt(token_ids=TOKENS))
    with pytest.raises(HandleInvalidError):
        await stack.prefill(Prompt(handle=replace(first.handle, prefix_tokens=TOKENS[:5])))
    signer = HandleSigner([SECRET], b"", 3600)
    with pytest.raises(ModelMismatchError):
        await stack.prefill(Prompt(handle=signer.sign(replace(first.handle, model_digest=b"x" * 32))))


async def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(stack: Stack) -> None:
    limit = stack.core.model.context_tokens
    tokens = tuple(1 + index % 250 for index in range(limit))
    with pytest.raises(
        ContextExceededError, match=f"maximum context length is {limit} tokens; its {limit} tokens leave"
    ):
        await stack.prefill(Prompt(token_ids=tokens))
    assert (await stack.prefill(Prompt(token_ids=tokens[:-1]))).usage.computed_tokens == limit - 1


async def test_a_token_outside_the_vocabulary_is_refused_by_field(stack: Stack) -> None:
    with pytest.raises(InvalidRequestError, match="token id 320 is outside the vocabulary of 320") as caught:
        await stack.prefill(Prompt(token_ids=(1, 320, 2)))
    assert [violation.field for violation in caught.value.violations] == ["prompt.token_ids"]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [(Prompt(text="some text"), "prompt.text"), (Prompt(messages=CONVERSATION), "prompt.messages")],
)
async def test_text_of_a_token_that_has_no_embedding_is_refused_by_field(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, prompt: Prompt, field: str
) -> None:
    """As ``<pad>`` of id 32000 that a tokenizer adds to a model of 32,000 embeddings."""
    rendered = RenderedPrompt((1, 2), (320,), "user")
    for name in ("raw", "render"):
        monkeypatch.setattr(stack.core.model.tokenizer, name, lambda *_, **__: rendered)
    with pytest.raises(InvalidRequestError, match="token id 320 is outside the vocabulary of 320") as caught:
        await stack.prefill(prompt)
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_too_many_at_once_are_turned_away(model: BaseModel) -> None:
    async with open_stack(model, MemoryStore(), options=OPTIONS) as stack:
        places = [stack.core.engine.place() for _ in range(132)]
        for place in places:
            place.__enter__()
        with pytest.raises(OverloadedError):
            await stack.prefill(Prompt(token_ids=TOKENS))
        for place in places:
            place.__exit__(None, None, None)
        assert (await stack.prefill(Prompt(token_ids=TOKENS))).usage.computed_tokens == 80


async def test_what_store_threads_log_names_the_request(model: BaseModel, store: FaultyStore) -> None:
    async def lines(request_id: str, event: str) -> list[str | None]:
        processors = [structlog.contextvars.merge_contextvars]
        with (
            capture_logs(processors=processors) as logs,
            structlog.contextvars.bound_contextvars(request_id=request_id),
        ):
            async with open_stack(model, store, options=OPTIONS) as stack:
                await stack.prefill(Prompt(token_ids=TOKENS))
        return [line.get("request_id") for line in logs if line["event"] == event]

    store.faults["put", -1] = StoreFullError("full")
    assert set(await lines("r-1", "blocks not stored")) == {"r-1"}
    store.faults.clear()
    await lines("r-2", "")
    store.values = {key: value[:-1] + bytes([value[-1] ^ 1]) for key, value in store.values.items()}
    assert await lines("r-3", "stored blocks rejected") == ["r-3"]


async def test_a_prefill_in_a_trace_has_a_span_for_each_phase_and_each_visit_to_the_store(stack: Stack) -> None:
    with recording() as recorded, current(tracer_of(recorded).start_span("call")):
        await stack.prefill(Prompt(token_ids=TOKENS))
        cold = recorded.names
        recorded.exporter.clear()
        await stack.prefill(Prompt(token_ids=TOKENS))
        await stack.prefiller.prefill(Prompt(token_ids=TOKENS), tokenize_only=True)
    assert sorted(cold) == ["compute", "load prefix", "queue", "render", "store get", "store put"]
    assert recorded.names == ["render", "load prefix", "store put", "render"]


def tracer_of(recorded: Recorded) -> Tracer:
    return recorded.provider.get_tracer("test")


async def test_who_may_store_no_more_is_answered_and_nothing_is_written(stack: Stack, store: FaultyStore) -> None:
    result = await stack.prefiller.prefill(Prompt(token_ids=TOKENS), skip_store=True)
    assert not store.values
    assert store.calls["put"] == 0
    usage = result.usage
    assert (usage.computed_tokens, usage.stored_bytes, usage.store_drops) == (80, 0, {"quota": 5})
    again = await stack.prefiller.prefill(Prompt(token_ids=TOKENS))
    assert again.usage.computed_tokens == 0, "it is resident"
    assert len(store.values) == 5, "and stored for who may"


# --- before the engine ------------------------------------------------------------------------------------------------


class HeldTexts:
    """Tokenizing of texts waits for a sign."""

    def __init__(self, model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self._raw = model.tokenizer.raw
        monkeypatch.setattr(model.tokenizer, "raw", self._held)

    def _held(self, text: str) -> RenderedPrompt:
        self.begun.release()
        assert self.go_on.wait(PATIENCE_SECONDS)
        return self._raw(text)

    async def has_begun(self) -> bool:
        return await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("tokenize_only", [False, True])
async def test_a_tenants_long_texts_hold_up_no_other_tenant(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch, tokenize_only: bool
) -> None:
    texts = HeldTexts(model, monkeypatch)
    async with open_stack(model, MemoryStore(), options=TENANTS) as stack:
        ask = partial(stack.prefiller.prefill, tokenize_only=tokenize_only)
        noisy = [asyncio.create_task(ask(Prompt(text=f"text {n}"), tenant="noisy")) for n in range(40)]
        for _ in range(TURNS):
            assert await texts.has_begun()
        async with asyncio.timeout(PATIENCE_SECONDS / 2):
            await ask(Prompt(messages=CONVERSATION), tenant="quiet")
        assert not texts.begun.acquire(blocking=False), "the rest of the noisy one's waits"
        texts.go_on.set()
        assert len(await asyncio.gather(*noisy)) == 40


@pytest.mark.parametrize("tokenize_only", [False, True])
async def test_of_texts_that_wait_to_be_tokenized_there_are_as_many_as_places(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch, tokenize_only: bool
) -> None:
    texts = HeldTexts(model, monkeypatch)
    limits = EngineLimits(max_sequences=2, max_queue=6, tenant_share=0.5)
    async with open_stack(model, MemoryStore(), options=replace(TENANTS, limits=limits)) as stack:
        ask = partial(stack.prefiller.prefill, tokenize_only=tokenize_only)
        asked = [asyncio.create_task(ask(Prompt(text=f"text {n}"), tenant="noisy")) for n in range(4)]
        assert await texts.has_begun()
        with pytest.raises(OverloadedError, match="of this tenant") as caught:
            await ask(Prompt(text="one more"), tenant="noisy")
        assert caught.value.retry_after_seconds
        texts.go_on.set()
        await asyncio.gather(*asked)
        await ask(Prompt(text="one more"), tenant="noisy")
