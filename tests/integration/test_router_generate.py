"""The router's API in front of scripted services: what it checks, what it passes down, what it reports."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from adapter_router.access.authentication import Access
from adapter_router.admission import RouterLimits
from adapter_router.affinity import adapter_key, conversation_key, opening_key, rendezvous_order
from alora_serve.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    AloraServeError,
    DeadlinePassedError,
    HandleInvalidError,
    InvalidRequestError,
    ModelMismatchError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
    UnimplementedFeatureError,
)
from alora_serve.rpc.convert import handle_from_proto, handle_to_proto, model_from_proto
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import ChatMessage, EndpointStatus, GenerateRequest, Identity, StreamEvent
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import (
    ADAPTERS,
    SIGNER,
    FakePrefill,
    FakeWorker,
    answer,
    deployment,
    handle,
    model,
    until,
)

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])


def by_handle(**changes: Any) -> types_pb2.Prompt:
    return types_pb2.Prompt(handle=handle_to_proto(handle(**changes)))


def ask(prompt: types_pb2.Prompt = HELLO, adapter: str = "", **sampling: Any) -> alora_pb2.GenerateRequest:
    return alora_pb2.GenerateRequest(prompt=prompt, adapter=adapter, sampling=types_pb2.SamplingParams(**sampling))


async def events_of(call: Any) -> list[types_pb2.GenerationEvent]:
    return [response.event async for response in call]


async def failure_of(call: Any) -> AloraServeError:
    try:
        if hasattr(call, "read"):
            await events_of(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the call succeeded")


async def test_generate_forwards_a_stream_and_reports_both_services_figures() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        events = await events_of(router.stub.Generate(ask(adapter="jailbreak")))
        assert [event.WhichOneof("event") for event in events] == ["started", "heartbeat", "chunk", "chunk", "finished"]
        assert "".join(event.chunk.text for event in events) == "Hello world"
        assert [event.chunk.first_index for event in events if event.HasField("chunk")] == [0, 1]
        finished = events[-1].finished
        # One message is one token, which prefill computed; the worker ran the invocation.
        assert finished.usage.prompt_tokens == 2
        assert finished.usage.computed_tokens == 2
        assert finished.usage.cached_tokens == 0
        assert finished.usage.fetched_bytes == 110
        assert finished.usage.stored_bytes == 1000
        assert dict(finished.usage.store_misses) == {"absent": 1}
        assert dict(finished.usage.store_drops) == {"full": 2}
        assert finished.timings.queue_seconds == pytest.approx(1.1)
        assert finished.timings.fetch_seconds == pytest.approx(2.2)
        assert finished.timings.prefill_seconds == pytest.approx(4.3)
        assert finished.timings.adapter_load_seconds == 0.4
        assert 0 < finished.timings.first_token_seconds <= finished.timings.total_seconds != 0.7
        assert router.metric("alora_router_requests_total", adapter="jailbreak") == 1
        assert router.metric("alora_tokens_total", source="computed") == 2
        assert router.metric("alora_router_in_flight") == 0


async def test_the_request_id_the_deadline_and_a_seed_reach_the_worker() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        await events_of(router.stub.Generate(ask(), timeout=50, metadata=(("x-request-id", "abc"),)))
        assert prefill.requests[0].request_id == worker.requests[0].request_id == "abc"
        assert worker.request_ids == ["abc"]
        assert 0 < worker.remaining_seconds[0] <= 51  # gRPC rounds time-outs up on the wire
        assert worker.requests[0].sampling.HasField("seed")
        await events_of(router.stub.Generate(ask(seed=7)))
        assert worker.requests[1].sampling.seed == 7


async def test_a_call_without_a_deadline_gets_the_routers() -> None:
    worker = FakeWorker()
    limits = RouterLimits(default_deadline_seconds=33)
    async with deployment([FakePrefill()], [worker], limits=limits) as (router, _):
        await events_of(router.stub.Generate(ask()))
        assert 0 < worker.remaining_seconds[0] <= 34


async def test_a_closed_handle_alone_skips_prefill_and_reports_the_workers_figures() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        events = await events_of(router.stub.Generate(ask(by_handle(), "jailbreak")))
        assert not prefill.requests
        assert events[-1].finished.usage.cached_tokens == 3
        assert events[-1].finished.usage.fetched_bytes == 100


@pytest.mark.parametrize("prompt", ["open turn", "new messages"])
async def test_a_handle_with_something_left_to_do_goes_through_prefill(prompt: str) -> None:
    given = by_handle(open_turn=True) if prompt == "open turn" else by_handle()
    if prompt == "new messages":
        given.messages.add(role="user", content="More")
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        await events_of(router.stub.Generate(ask(given)))
        assert len(prefill.requests) == 1
        assert not prefill.requests[0].tokenize_only


async def test_plain_lora_is_only_tokenized() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        await events_of(router.stub.Generate(ask(adapter="plain")))
        assert prefill.requests[0].tokenize_only


async def test_an_unknown_adapter_is_refused_with_the_nearest_names_before_any_prefill() -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        error = await failure_of(router.stub.Generate(ask(adapter="jailbrake")))
        assert isinstance(error, AdapterNotFoundError)
        assert "nearest: jailbreak" in str(error)
        assert error.metadata["nearest"].split(",")[0] == "jailbreak"
        assert not prefill.requests


async def test_a_refused_adapter_says_why_before_any_prefill() -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        error = await failure_of(router.stub.Generate(ask(adapter="broken")))
        assert isinstance(error, AdapterRefusedError)
        assert "use_dora" in str(error)
        assert not prefill.requests


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(types_pb2.Prompt()), "prompt"),
        (ask(types_pb2.Prompt(messages=[types_pb2.Message(role="robot")])), "prompt.messages[0].role"),
        (ask(temperature=-1), "sampling.temperature"),
        (ask(top_p=0), "sampling.top_p"),
    ],
)
async def test_bad_requests_name_their_fields(request_: alora_pb2.GenerateRequest, field: str) -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        error = await failure_of(router.stub.Generate(request_))
        assert isinstance(error, InvalidRequestError)
        assert [violation.field for violation in error.violations] == [field]
        assert not prefill.requests


async def test_a_forged_handle_is_refused_before_anyone_works_on_it() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    forged = handle_to_proto(dataclasses.replace(handle(), prefix_tokens=(4, 5, 6)))
    async with deployment([prefill], [worker]) as (router, _):
        for call in (
            router.stub.Generate(ask(types_pb2.Prompt(handle=forged))),
            router.stub.Prefill(alora_pb2.PrefillRequest(prompt=types_pb2.Prompt(handle=forged))),
        ):
            error = await failure_of(call)
            assert isinstance(error, HandleInvalidError)
            assert error.violations[0].field == "prompt.handle"
        assert not prefill.requests
        assert not worker.requests


async def test_a_handle_of_a_model_that_nobody_has_is_a_failed_precondition() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        assert isinstance(await failure_of(router.stub.Generate(ask(by_handle(model_name="old")))), ModelMismatchError)


async def test_during_a_rollout_each_handle_stays_with_its_model() -> None:
    old = FakeWorker(status=EndpointStatus(model("old"), adapters=ADAPTERS))
    new = FakeWorker(status=EndpointStatus(model("new"), adapters=ADAPTERS))
    prefills = [FakePrefill(EndpointStatus(model(name))) for name in ("old", "new")]
    async with deployment(prefills, [old, new]) as (router, _):
        for name, worker in (("old", old), ("new", new)):
            given = by_handle(model_name=name, open_turn=True)
            await events_of(router.stub.Generate(ask(given, "jailbreak")))
            assert [bytes(r.handle.model_digest) for r in worker.requests] == [model(name).model_digest]


async def test_a_prefill_is_only_made_for_a_model_that_a_worker_has() -> None:
    lonely = FakePrefill(EndpointStatus(model("new")))
    paired = FakePrefill()
    async with deployment([lonely, paired], [FakeWorker()]) as (router, _):
        for content in "abcdefgh":
            message = types_pb2.Message(role="user", content=content)
            await events_of(router.stub.Generate(ask(types_pb2.Prompt(messages=[message]))))
        assert not lonely.requests
        assert len(paired.requests) == 8


async def test_a_long_prompt_does_not_wait_behind_another_that_was_just_sent() -> None:
    """Both prefer the same base prefill, which has not reported the first when the second comes."""
    release = asyncio.Event()
    prefills = [FakePrefill(EndpointStatus(model(), prefill_tokens_per_second=1000)) for _ in range(2)]
    for prefill in prefills:
        prefill.before = release.wait
    async with deployment(prefills, [FakeWorker()]) as (router, servers):
        addresses = [server.address for server in servers[:2]]
        asked = [(ChatMessage("user", f"{number}: " + "long " * 2000),) for number in range(20)]
        near = [each for each in asked if rendezvous_order(opening_key(each), addresses)[0] == addresses[0]][:2]
        calls = []
        for (message,) in near:
            prompt = types_pb2.Prompt(messages=[types_pb2.Message(role=message.role, content=message.content)])
            calls.append(asyncio.create_task(events_of(router.stub.Generate(ask(prompt)))))
            await until(lambda: sum(len(prefill.requests) for prefill in prefills) == len(calls))
        assert [len(prefill.requests) for prefill in prefills] == [1, 1]
        release.set()
        await asyncio.gather(*calls)


async def test_what_is_only_tokenized_keeps_nobody_waiting() -> None:
    release = asyncio.Event()
    prefill = FakePrefill(EndpointStatus(model(), prefill_tokens_per_second=1000))
    prefill.before = release.wait
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        prompt = types_pb2.Prompt(text="long " * 2000)
        for adapter, waited_for in (("plain", False), ("jailbreak", True)):
            call = asyncio.create_task(events_of(router.stub.Generate(ask(prompt, adapter))))
            await until(lambda: len(prefill.requests) == 1)
            (snapshot,) = router.prefills.snapshots()
            assert (snapshot.tokens_ahead(b"another's") > 0) == waited_for
            release.set()
            await call
            release.clear()
            prefill.requests.clear()


async def test_an_adapter_keeps_its_worker_and_a_base_conversation_its_own() -> None:
    workers = [FakeWorker() for _ in range(3)]
    async with deployment([FakePrefill()], workers) as (router, servers):
        addresses = [server.address for server in servers[1:]]
        for _ in range(4):
            await events_of(router.stub.Generate(ask(adapter="jailbreak")))
            await events_of(router.stub.Generate(ask(by_handle(tokens=range(20)))))
        by_address = dict(zip(addresses, workers, strict=True))
        favourite = by_address[rendezvous_order(adapter_key("jailbreak"), addresses)[0]]
        home = by_address[rendezvous_order(conversation_key(tuple(range(20))), addresses)[0]]
        assert sum(r.adapter == "jailbreak" for r in favourite.requests) == 4
        assert sum(r.adapter == "" for r in home.requests) == 4


async def test_cancelling_reaches_the_worker_and_frees_its_place() -> None:
    async def endless(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
            await asyncio.Event().wait()

    worker = FakeWorker(endless)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        call = router.stub.Generate(ask())
        await call.read()
        assert router.metric("alora_router_in_flight") == 1
        call.cancel()
        await until(lambda: worker.cancelled == 1)
        await until(lambda: router.metric("alora_router_in_flight") == 0)
        assert [member.in_flight for member in router.workers.members()] == [0]


async def test_cancelling_reaches_the_worker_while_nobody_reads() -> None:
    async def torrent(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
            if event.__class__.__name__ == "TokenChunk":
                break
        while True:
            yield dataclasses.replace(event, text="x" * 10_000)

    worker = FakeWorker(torrent)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        call = router.stub.Generate(ask())
        await call.read()
        await asyncio.sleep(0.1)  # until every buffer on the way is full
        call.cancel()
        await until(lambda: worker.cancelled == 1 and router.metric("alora_router_in_flight") == 0)


async def test_the_deadline_ends_the_call_everywhere() -> None:
    async def never(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        await asyncio.Event().wait()
        yield await anext(answer(request, attempt))

    worker = FakeWorker(never)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        error = await failure_of(router.stub.Generate(ask(), timeout=0.3))
        assert isinstance(error, DeadlinePassedError)
        await until(lambda: worker.cancelled == 1)


async def test_a_workers_answer_passes_with_all_its_details() -> None:
    async def refuse(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        raise InvalidRequestError.of("sampling.max_tokens", "beyond the context")
        yield

    async with deployment([FakePrefill()], [FakeWorker(refuse)]) as (router, _):
        error = await failure_of(router.stub.Generate(ask()))
        assert isinstance(error, InvalidRequestError)
        assert error.violations[0].field == "sampling.max_tokens"


async def test_more_requests_than_the_router_takes_are_refused_with_a_time_to_retry() -> None:
    gate = asyncio.Event()

    async def gated(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        await gate.wait()
        async for event in answer(request, attempt):
            yield event

    async with deployment([FakePrefill()], [FakeWorker(gated)], limits=RouterLimits(max_in_flight=3)) as (router, _):
        held = [asyncio.create_task(events_of(router.stub.Generate(ask()))) for _ in range(3)]
        await until(lambda: router.metric("alora_router_in_flight") == 3)
        for call in (router.stub.Generate(ask()), router.stub.Prefill(alora_pb2.PrefillRequest(prompt=HELLO))):
            error = await failure_of(call)
            assert isinstance(error, OverloadedError)
            assert error.retry_after_seconds is not None
            assert 0.5 <= error.retry_after_seconds <= 1.5
        gate.set()
        assert all(events[-1].HasField("finished") for events in await asyncio.gather(*held))


async def test_prefill_gives_a_handle_and_its_cost() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        response = await router.stub.Prefill(alora_pb2.PrefillRequest(prompt=HELLO))
        SIGNER.verify(handle_from_proto(response.handle))
        assert response.usage.computed_tokens == 1
        assert response.timings.prefill_seconds == 4.0


async def test_adapters_are_listed_loaded_where_they_are_used_and_unloaded_everywhere() -> None:
    second = FakeWorker()
    second.status = dataclasses.replace(
        second.status, adapters=(dataclasses.replace(ADAPTERS[0], resident=True), *ADAPTERS[1:])
    )
    workers = [FakeWorker(), second]
    async with deployment([FakePrefill()], workers) as (router, servers):
        listed = (await router.stub.ListAdapters(alora_pb2.ListAdaptersRequest())).adapters
        assert [(a.name, a.resident, a.problem) for a in listed] == [
            ("broken", False, "use_dora"),
            ("certainty", False, ""),
            ("jailbreak", True, ""),
            ("plain", False, ""),
        ]
        loaded = await router.stub.LoadAdapter(alora_pb2.LoadAdapterRequest(name="jailbreak"))
        assert loaded.adapter.resident
        addresses = [server.address for server in servers[1:]]
        preferred = addresses.index(rendezvous_order(adapter_key("jailbreak"), addresses)[0])
        assert workers[preferred].loaded == ["jailbreak"]
        unloaded = await router.stub.UnloadAdapter(alora_pb2.UnloadAdapterRequest(name="jailbreak"))
        assert unloaded.was_resident, "one of the two had it"
        assert [worker.unloaded for worker in workers] == [["jailbreak"], ["jailbreak"]]
        for method, request in (
            ("LoadAdapter", alora_pb2.LoadAdapterRequest(name="x")),
            ("UnloadAdapter", alora_pb2.UnloadAdapterRequest(name="x")),
        ):
            assert isinstance(await failure_of(getattr(router.stub, method)(request)), AdapterNotFoundError)
            unnamed = await failure_of(getattr(router.stub, method)(type(request)()))
            assert isinstance(unnamed, InvalidRequestError)
            assert [violation.field for violation in unnamed.violations] == ["name"]


class ByRole:
    """Takes every token for the name of its role."""

    def identify(self, token: str) -> Identity | None:
        return Identity("acme", frozenset({"generate", "admin"} if token == "admin" else {"generate"}))


async def test_which_adapters_are_in_memory_is_told_to_administrators_alone() -> None:
    worker = FakeWorker()
    worker.status = dataclasses.replace(worker.status, adapters=(dataclasses.replace(ADAPTERS[0], resident=True),))
    async with deployment([FakePrefill()], [worker], access=Access(ByRole())) as (router, _):

        async def resident(role: str) -> list[bool]:
            metadata = (("authorization", f"Bearer {role}"),)
            response = await router.stub.ListAdapters(alora_pb2.ListAdaptersRequest(), metadata=metadata)
            return [adapter.resident for adapter in response.adapters]

        assert (await resident("admin"), await resident("generate")) == ([True], [False])


@pytest.mark.parametrize("refusal", [UnavailableError("going"), AdapterNotFoundError("not seen yet")])
async def test_unloading_passes_over_workers_that_hold_nothing(refusal: AloraServeError) -> None:
    workers = [FakeWorker(), FakeWorker()]
    workers[0].refusal = refusal
    async with deployment([FakePrefill()], workers) as (router, _):
        unloaded = await router.stub.UnloadAdapter(alora_pb2.UnloadAdapterRequest(name="jailbreak"))
        assert not unloaded.was_resident
        assert workers[1].unloaded == ["jailbreak"]


async def test_unloading_reports_a_worker_that_refuses_after_asking_the_others() -> None:
    workers = [FakeWorker(), FakeWorker()]
    workers[0].refusal = OverloadedError("busy", retry_after_seconds=1)
    async with deployment([FakePrefill()], workers) as (router, _):
        error = await failure_of(router.stub.UnloadAdapter(alora_pb2.UnloadAdapterRequest(name="jailbreak")))
        assert isinstance(error, OverloadedError)
        assert workers[1].unloaded == ["jailbreak"]


async def test_the_model_is_the_one_most_workers_have() -> None:
    statuses = [EndpointStatus(model(name), adapters=ADAPTERS) for name in ("new", "old", "new")]
    prefills = [FakePrefill(EndpointStatus(model(name))) for name in ("old", "new")]
    async with deployment(prefills, [FakeWorker(status=status) for status in statuses]) as (router, _):
        response = await router.stub.GetModel(alora_pb2.GetModelRequest())
        assert model_from_proto(response.model) == model("new")


async def test_the_model_takes_no_longer_prompt_than_its_base_prefill_and_its_workers_do() -> None:
    def status(context_tokens: int) -> EndpointStatus:
        return EndpointStatus(dataclasses.replace(model(), context_tokens=context_tokens), adapters=ADAPTERS)

    prefills = [FakePrefill(status(120)), FakePrefill(status(240))]
    async with deployment(prefills, [FakeWorker(status=status(200)), FakeWorker(status=status(160))]) as (router, _):
        response = await router.stub.GetModel(alora_pb2.GetModelRequest())
        assert response.model.context_tokens == 120


async def test_without_endpoints_everything_is_unavailable() -> None:
    async with deployment([], []) as (router, _):
        for call in (
            router.stub.Generate(ask()),
            router.stub.Generate(ask(adapter="jailbreak")),
            router.stub.Generate(ask(by_handle())),
            router.stub.GetModel(alora_pb2.GetModelRequest()),
        ):
            assert isinstance(await failure_of(call), UnavailableError)


@pytest.mark.parametrize(("method", "request_"), [("PurgeTenant", alora_pb2.PurgeTenantRequest())])
async def test_what_is_not_served_yet_says_so_by_name(method: str, request_: Any) -> None:
    async with deployment([], []) as (router, _):
        error = await failure_of(getattr(router.stub, method)(request_))
        assert isinstance(error, UnimplementedFeatureError)
        assert method in str(error)


async def test_texts_are_scored_after_a_prepared_conversation_by_the_adapter_asked() -> None:
    prefill, worker = FakePrefill(), FakeWorker()
    async with deployment([prefill], [worker]) as (router, _):
        wanted = alora_pb2.ScoreRequest(prompt=HELLO, adapter="jailbreak", continuations=["ab", "c"])
        response = await router.stub.Score(wanted, metadata=(("x-request-id", "abc"),))
        assert [len(score.logprobs) for score in response.scores] == [2, 1]
        assert response.usage.prompt_tokens == 1
        assert response.usage.computed_tokens == 1  # by base prefill
        assert response.timings.queue_seconds == pytest.approx(1.5)
        [asked] = worker.scored
        assert (asked.adapter, asked.continuations, asked.request_id) == ("jailbreak", ("ab", "c"), "abc")
        assert router.metric("alora_router_requests_total", adapter="jailbreak") == 1
        await router.stub.Score(alora_pb2.ScoreRequest(prompt=by_handle(), adapter="plain", continuations=["x"]))
        assert len(prefill.requests) == 1, "a closed handle alone needs none"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (alora_pb2.ScoreRequest(prompt=HELLO), "continuations"),
        (alora_pb2.ScoreRequest(prompt=HELLO, continuations=["a"] * 257), "continuations"),
        (alora_pb2.ScoreRequest(prompt=HELLO, continuations=["a", ""]), "continuations[1]"),
        (alora_pb2.ScoreRequest(continuations=["a"]), "prompt"),
        (
            alora_pb2.ScoreRequest(
                prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="assistant", content="Hi")]),
                continuations=["a"],
            ),
            "prompt.messages[0].role",
        ),
    ],
)
async def test_what_cannot_be_scored_is_named_before_any_prefill(request_: alora_pb2.ScoreRequest, field: str) -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        error = await failure_of(router.stub.Score(request_))
        assert [violation.field for violation in error.violations] == [field]
        assert not prefill.requests


async def test_a_score_whose_worker_is_lost_is_asked_of_another() -> None:
    asked: list[FakeWorker] = []

    class OnceGone(FakeWorker):
        async def Score(self, request: Any, context: Any) -> Any:  # noqa: N802
            asked.append(self)
            if len(asked) == 1:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            return await super().Score(request, context)

    async with deployment([FakePrefill()], [OnceGone(), OnceGone()]) as (router, _):
        wanted = alora_pb2.ScoreRequest(prompt=by_handle(), adapter="jailbreak", continuations=["ab"])
        response = await router.stub.Score(wanted)
    assert len(response.scores) == 1
    assert len({id(worker) for worker in asked}) == 2


async def test_tokens_are_told_of_a_handle_only_to_whom_it_was_given() -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        forged = by_handle()
        forged.handle.prefix_token_ids += bytes(4)
        error = await failure_of(router.stub.Tokenize(alora_pb2.TokenizeRequest(prompt=forged)))
        assert isinstance(error, HandleInvalidError)
        assert isinstance(await failure_of(router.stub.Tokenize(alora_pb2.TokenizeRequest())), InvalidRequestError)
        assert not prefill.requests


async def test_a_bug_in_a_worker_is_internal_and_not_retried() -> None:
    async def bug(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        raise ZeroDivisionError
        yield

    workers = [FakeWorker(bug), FakeWorker(bug)]
    async with deployment([FakePrefill()], workers) as (router, _):
        error = await failure_of(router.stub.Generate(ask()))
        assert error.status == "INTERNAL"
        assert not isinstance(error, RequestCancelledError)
        assert sum(len(worker.requests) for worker in workers) == 1


async def test_a_worker_that_has_finished_may_end_its_call_in_peace() -> None:
    async def lingering(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in answer(request, attempt):
            yield event
        await asyncio.sleep(0.05)  # what it still has to do: count the call, for one

    worker = FakeWorker(lingering)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        events = await events_of(router.stub.Generate(ask()))
        assert events[-1].HasField("finished")
    assert worker.cancelled == 0
