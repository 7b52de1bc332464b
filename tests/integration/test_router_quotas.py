"""What a request takes of its tenant's quotas and share, however it ends, and what becomes of who has used them up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from adapter_router.access.authentication import Access
from adapter_router.access.quotas import Quotas
from adapter_router.access.rules import AccessRules, Quota
from adapter_router.admission import RouterLimits
from alora_serve.errors import InvalidRequestError, OverloadedError
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import GenerateRequest, Identity, StreamEvent, TokenChunk, Usage
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import FakePrefill, FakeWorker, answer, deployment, until

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])
GENERATE = alora_pb2.GenerateRequest(prompt=HELLO, adapter="jailbreak")
SCORE = alora_pb2.ScoreRequest(prompt=HELLO, adapter="jailbreak", continuations=["abc", "d"])
BY_PLAIN_LORA = alora_pb2.GenerateRequest(prompt=HELLO, adapter="plain")
FAN_OUT = alora_pb2.FanOutRequest(
    prompt=HELLO, targets=[alora_pb2.FanOutTarget(adapter=name) for name in ("jailbreak", "certainty")]
)

PREFILL_TOKENS, PREFILL_BYTES = 1, 1000
"""What the scripted prefill of one message computes and stores."""


class Ledger(Quotas):
    """Quotas that remember what was charged, and to which nothing comes back with time."""

    def __init__(self, **limits: int) -> None:
        rules = AccessRules.model_construct(tenants={"": Quota(**limits)})  # no tenants: all callers are one
        super().__init__(lambda: rules, clock=lambda: 0.0)
        self.charged: list[Usage] = []

    def charge(self, tenant: str, usage: Usage) -> None:
        self.charged.append(usage)
        super().charge(tenant, usage)

    @property
    def tokens(self) -> int:
        return sum(usage.computed_tokens + usage.generated_tokens for usage in self.charged)

    @property
    def stored_bytes(self) -> int:
        return sum(usage.stored_bytes for usage in self.charged)


async def one_token(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    """Says one token and falls silent."""
    async for event in answer(request, attempt):
        yield event
        if isinstance(event, TokenChunk):
            await asyncio.Event().wait()


async def refuse(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    raise InvalidRequestError.of("sampling.max_tokens", "beyond the context")
    yield


async def read_all(call: Any) -> None:
    async for _ in call:
        pass


async def read_two_chunks_and_leave(router: Any, request: alora_pb2.FanOutRequest) -> None:
    call, chunks = router.stub.FanOut(request), 0
    async for response in call:
        chunks += response.event.HasField("chunk")
        if chunks == 2:
            break
    call.cancel()
    await until(lambda: router.metric("alora_router_in_flight") == 0)


async def test_an_abandoned_stream_is_charged_its_prefill_and_what_was_delivered() -> None:
    quotas = Ledger()
    async with deployment([FakePrefill()], [FakeWorker(one_token)], quotas=quotas) as (router, _):
        call = router.stub.Generate(GENERATE)
        async for response in call:
            if response.event.HasField("chunk"):
                break
        call.cancel()
        await until(lambda: router.metric("alora_router_in_flight") == 0)
    assert quotas.tokens == PREFILL_TOKENS + 1
    assert quotas.stored_bytes == PREFILL_BYTES


async def test_an_abandoned_fan_out_is_charged_its_one_prefill_and_what_was_delivered_of_each() -> None:
    quotas = Ledger()
    async with deployment([FakePrefill()], [FakeWorker(one_token)], quotas=quotas) as (router, _):
        await read_two_chunks_and_leave(router, FAN_OUT)
    assert quotas.tokens == PREFILL_TOKENS + 2
    assert quotas.stored_bytes == PREFILL_BYTES


async def test_an_abandoned_stream_of_a_plain_lora_is_charged_its_whole_prompt_which_its_worker_computes() -> None:
    quotas = Ledger()
    async with deployment([FakePrefill()], [FakeWorker(one_token)], quotas=quotas) as (router, _):
        call = router.stub.Generate(BY_PLAIN_LORA)
        async for response in call:
            if response.event.HasField("started"):
                prompt_tokens = response.event.started.prompt_tokens
            if response.event.HasField("chunk"):
                break
        call.cancel()
        await until(lambda: router.metric("alora_router_in_flight") == 0)
    assert quotas.tokens == prompt_tokens + 1


async def test_a_fan_out_that_is_abandoned_is_charged_the_prompt_of_its_plain_lora_besides() -> None:
    quotas = Ledger()
    request = alora_pb2.FanOutRequest(
        prompt=HELLO, targets=[alora_pb2.FanOutTarget(adapter=name) for name in ("jailbreak", "plain")]
    )
    async with deployment([FakePrefill()], [FakeWorker(one_token)], quotas=quotas) as (router, _):
        await read_two_chunks_and_leave(router, request)
    of_plain_lora = PREFILL_TOKENS + 1
    assert quotas.tokens == PREFILL_TOKENS + of_plain_lora + 2


@pytest.mark.parametrize("adapter", ["jailbreak", "plain"])
async def test_a_stream_that_no_worker_takes_is_charged_its_prefill(adapter: str) -> None:
    request = alora_pb2.GenerateRequest(prompt=HELLO, adapter=adapter)
    quotas = Ledger()
    async with deployment([FakePrefill()], [FakeWorker(refuse)], quotas=quotas) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError):
            await read_all(router.stub.Generate(request))
    assert quotas.tokens == (PREFILL_TOKENS if adapter == "jailbreak" else 0), "a plain LoRA's is only tokenized"


@pytest.mark.parametrize("goes", ["cancels", "runs out of time"])
@pytest.mark.parametrize("adapter", ["jailbreak", "plain"])
async def test_a_score_that_is_given_up_is_charged_its_prompt_and_a_guess_at_its_texts(adapter: str, goes: str) -> None:
    asked = asyncio.Event()

    class Hanging(FakeWorker):
        async def Score(self, request: Any, context: Any) -> Any:  # noqa: N802
            asked.set()
            await asyncio.Event().wait()

    quotas = Ledger()
    request = alora_pb2.ScoreRequest(prompt=HELLO, adapter=adapter, continuations=["a text of 20 bytes..", "d" * 20])
    async with deployment([FakePrefill()], [Hanging()], quotas=quotas) as (router, _):
        call = router.stub.Score(request, timeout=1.0 if goes == "runs out of time" else None)
        await asyncio.wait((asyncio.ensure_future(asked.wait()),), timeout=20)
        if goes == "cancels":
            call.cancel()
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await call
        await until(lambda: router.metric("alora_router_in_flight") == 0)
    prompt_tokens = PREFILL_TOKENS  # of one message: base prefill computes it, or the worker with a plain LoRA
    assert (quotas.tokens, quotas.stored_bytes) == (prompt_tokens + 40 // 4, PREFILL_BYTES)


async def test_a_score_that_no_worker_could_take_is_charged_its_prefill_alone() -> None:
    quotas = Ledger()
    request = alora_pb2.ScoreRequest(prompt=HELLO, adapter="jailbreak", continuations=["d" * 4000])
    async with deployment([FakePrefill()], [FakeWorker()], quotas=quotas) as (router, [_, worker]):
        await worker.kill()
        await until(lambda: router.metric("alora_router_endpoints", role="adapter_decode", state="healthy") == 0)
        for timeout_seconds in (0.5, None):
            call = router.stub.Score(request, timeout=timeout_seconds)
            if timeout_seconds is None:
                await asyncio.sleep(0.3)
                call.cancel()
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await call
            await until(lambda: router.metric("alora_router_in_flight") == 0)
    assert quotas.tokens == 2 * PREFILL_TOKENS


LONG = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi " * 400)])


class NeverPrefills(FakePrefill):
    """Says nothing until its caller goes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def Prefill(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.asked.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("goes", ["cancels", "runs out of time"])
async def test_a_prefill_that_is_given_up_is_charged_as_many_tokens_as_it_was_admitted_with(goes: str) -> None:
    quotas, prefill = Ledger(), NeverPrefills()
    async with deployment([prefill], [FakeWorker()], quotas=quotas) as (router, _):
        request = alora_pb2.GenerateRequest(prompt=LONG)
        call = router.stub.Generate(request, timeout=1.0 if goes == "runs out of time" else None)
        reading = asyncio.ensure_future(read_all(call))
        await asyncio.wait((asyncio.ensure_future(prefill.asked.wait()),), timeout=20)
        if goes == "cancels":
            call.cancel()
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await reading
        await until(lambda: router.metric("alora_router_in_flight") == 0)
    assert (quotas.tokens, quotas.stored_bytes) == (LONG.ByteSize() // 4, 0)


async def test_a_prefill_that_nobody_could_take_costs_nothing() -> None:
    """While all base prefills are away, calls with short deadlines would use up what their tenant may compute."""
    quotas = Ledger()
    async with deployment([FakePrefill()], [FakeWorker()], quotas=quotas) as (router, [prefill, *_]):
        await prefill.kill()
        await until(lambda: router.metric("alora_router_endpoints", role="base_prefill", state="healthy") == 0)
        for timeout_seconds in (0.2, None):
            call = router.stub.Generate(alora_pb2.GenerateRequest(prompt=LONG), timeout=timeout_seconds)
            reading = asyncio.ensure_future(read_all(call))
            await asyncio.sleep(0.1)
            if timeout_seconds is None:
                call.cancel()
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await reading
            await until(lambda: router.metric("alora_router_in_flight") == 0)
    assert not quotas.tokens


async def test_what_is_only_to_be_tokenized_is_charged_nothing_when_it_is_given_up() -> None:
    quotas, prefill = Ledger(), NeverPrefills()
    async with deployment([prefill], [FakeWorker()], quotas=quotas) as (router, _):
        call = router.stub.Tokenize(alora_pb2.TokenizeRequest(prompt=LONG))
        await asyncio.wait((asyncio.ensure_future(prefill.asked.wait()),), timeout=20)
        call.cancel()
        await until(lambda: router.metric("alora_router_in_flight") == 0)
    assert not quotas.tokens


async def test_what_is_answered_is_charged_once() -> None:
    quotas = Ledger()
    async with deployment([FakePrefill()], [FakeWorker()], quotas=quotas) as (router, _):
        await read_all(router.stub.Generate(GENERATE))
        answered = 1 + 2  # the worker's invocation token, and two of an answer
        assert (quotas.tokens, quotas.stored_bytes) == (PREFILL_TOKENS + answered, PREFILL_BYTES)
        quotas.charged.clear()
        await read_all(router.stub.FanOut(FAN_OUT))
        assert (quotas.tokens, quotas.stored_bytes) == (PREFILL_TOKENS + 2 * answered, PREFILL_BYTES)
        quotas.charged.clear()
        await router.stub.Score(SCORE)
        assert (quotas.tokens, quotas.stored_bytes) == (PREFILL_TOKENS + len("abcd"), PREFILL_BYTES)
        quotas.charged.clear()
        await router.stub.Prefill(alora_pb2.PrefillRequest(prompt=HELLO))
        assert (quotas.tokens, quotas.stored_bytes) == (PREFILL_TOKENS, PREFILL_BYTES)


async def test_a_tenant_over_its_stored_bytes_is_answered_and_stores_nothing_more() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker], quotas=Ledger(stored_bytes_per_day=PREFILL_BYTES)) as (router, _):
        await read_all(router.stub.Generate(GENERATE))
        assert not prefill.requests[0].skip_store
        assert worker.requests[0].skip_store, "its prefill has used up the quota"
        await read_all(router.stub.Generate(GENERATE))
        await router.stub.Score(SCORE)
        assert [request.skip_store for request in prefill.requests[1:]] == [True, True]
        assert worker.requests[1].skip_store
        assert worker.scored[0].skip_store


async def test_a_tenant_within_its_stored_bytes_stores() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker], quotas=Ledger(stored_bytes_per_day=10 * PREFILL_BYTES)) as (router, _):
        await read_all(router.stub.Generate(GENERATE))
        await router.stub.Score(SCORE)
        assert not any(request.skip_store for request in (*prefill.requests, *worker.requests, *worker.scored))


class ByName:
    """Takes every token for the name of its tenant."""

    def identify(self, token: str) -> Identity | None:
        return Identity(token, frozenset({"generate"}))


async def test_one_tenant_leaves_room_in_the_router_for_the_others() -> None:
    limits = RouterLimits(max_in_flight=4, tenant_share=0.5)
    held: list[Any] = []
    async with deployment([FakePrefill()], [FakeWorker(one_token)], limits=limits, access=Access(ByName())) as (
        router,
        _,
    ):

        async def ask(tenant: str) -> None:
            held.append(router.stub.Generate(GENERATE, metadata=(("authorization", f"Bearer {tenant}"),)))
            await held[-1].read()

        for _ in range(2):
            await ask("noisy")
        with pytest.raises(grpc.aio.AioRpcError, match="2 requests of this tenant") as refused:
            await ask("noisy")
        error = error_from_rpc(refused.value)
        assert isinstance(error, OverloadedError)
        assert error.retry_after_seconds
        for tenant in ("quiet", "other"):
            await ask(tenant)
        with pytest.raises(grpc.aio.AioRpcError, match="holds 4 requests"):
            await ask("late")
        for call in held:
            call.cancel()
        await until(lambda: router.metric("alora_router_in_flight") == 0)
        await ask("noisy")
