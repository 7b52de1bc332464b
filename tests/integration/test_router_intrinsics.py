"""How the router runs intrinsics: whom it asks for definitions, what shares a prefill, and what a lost peer costs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from structlog.testing import capture_logs

from alora_serve.client import AsyncClient
from alora_serve.errors import (
    AdapterRefusedError,
    AloraServeError,
    IntrinsicOutputError,
    InvalidRequestError,
    UnavailableError,
)
from alora_serve.rpc.status import error_from_rpc
from alora_serve.types import (
    AdapterDigest,
    EndpointStatus,
    Finished,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    Usage,
)
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import FakePrefill, FakeWorker, deployment, model, until

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi. There.")])
DOCUMENTED = types_pb2.Prompt(messages=HELLO.messages, documents=[types_pb2.Document(text="The sea.")])
BARE = "model: ~\nresponse_format: ~\ntransformations: [{type: nest, input_path: [], field_name: said}]\n"
ASKING = f"{BARE}instruction: Sure?\n"
TAGGING = f"{BARE}sentence_boundaries: {{last_message: i}}\n"


async def says_yes(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    """A JSON text in two tokens, or what a resumed stream lacks of it."""
    delivered = len(request.resume.generated_tokens) if request.resume else 0
    yield Started(AdapterDigest(request.adapter.encode().hex()), None, request.sampling.seed or 0, 4)
    for chunk in (TokenChunk((10,), '"ye'), TokenChunk((11,), 's"'))[delivered:]:
        yield chunk
    yield Finished(FinishReason.STOP, Usage(4, 3, 0, 1, 2), Timings())


def knowing(*asking: str, script: Any = says_yes) -> FakeWorker:
    """A worker whose named adapters ask, and whose other aLoRA judges the bare conversation."""
    worker = FakeWorker(script)
    for name in ("jailbreak", "certainty", "plain"):
        worker.define(name, ASKING if name in asking else BARE)
    return worker


def ask_all(*names: str, prompt: types_pb2.Prompt = HELLO, **changes: Any) -> alora_pb2.RunIntrinsicsRequest:
    return alora_pb2.RunIntrinsicsRequest(prompt=prompt, intrinsics=names, **changes)


async def results_of(call: Any) -> dict[int, alora_pb2.RunIntrinsicsResponse]:
    responses = [response async for response in call]
    assert max(Counter(response.index for response in responses).values(), default=1) == 1
    return {response.index: response for response in responses}


async def failure_of(call: Any) -> AloraServeError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await results_of(call)
    return error_from_rpc(failed.value)


async def test_a_result_is_the_answer_transformed() -> None:
    async with deployment([FakePrefill()], [knowing()]) as (router, _):
        request = alora_pb2.RunIntrinsicRequest(prompt=HELLO, intrinsic="jailbreak")
        response = await router.stub.RunIntrinsic(request)
        assert MessageToDict(response.result) == {"said": "yes"}
        assert response.raw_text == '"yes"'
        assert (response.usage.prompt_tokens, response.usage.generated_tokens) == (4, 2)
        assert response.timings.total_seconds > 0


async def test_a_parameter_that_nobody_names_is_told_by_the_beginning_of_its_name_however_long_that_is() -> None:
    async with deployment([FakePrefill()], [knowing()]) as (router, _):
        with capture_logs() as logs:
            error = await failure_of(router.stub.RunIntrinsics(ask_all("jailbreak", parameters={"x" * 100_000: 1})))
            await until(lambda: any(line["event"] == "rpc" and "fields" in line for line in logs))
        assert [violation.field for violation in error.violations] == [f"parameters.{'x' * 60}…"]
        assert len(str(logs)) < 10_000


async def test_a_definition_is_asked_for_once_a_digest() -> None:
    worker = knowing()
    async with deployment([FakePrefill()], [worker]) as (router, _):
        for _ in range(2):
            await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty")))
        assert set(worker.defined) <= {"jailbreak", "certainty"}
        asked = len(worker.defined)
        assert asked <= 2, "one for both, but for a race"
        worker.define("jailbreak", ASKING)
        request = alora_pb2.RunIntrinsicRequest(prompt=HELLO, intrinsic="jailbreak")
        while len(worker.defined) == asked:
            await router.stub.RunIntrinsic(request)
        await router.stub.RunIntrinsic(request)
        assert worker.defined[asked:] == ["jailbreak"]


async def test_only_workers_that_tell_of_a_definition_are_asked_for_it() -> None:
    older, newer = FakeWorker(says_yes), knowing()
    async with deployment([FakePrefill()], [older, newer]) as (router, _):
        for _ in range(4):
            await results_of(router.stub.RunIntrinsics(ask_all("plain")))
        assert older.defined == []
        assert newer.defined == ["plain"]


async def test_a_lost_worker_is_not_the_last_that_knows_a_definition() -> None:
    workers = [knowing(), knowing()]
    async with deployment([FakePrefill()], workers) as (router, servers):
        await servers[1].kill()
        request = alora_pb2.RunIntrinsicRequest(prompt=HELLO, intrinsic="certainty")
        assert (await router.stub.RunIntrinsic(request)).raw_text == '"yes"'


async def test_a_worker_that_dies_in_the_middle_is_followed_by_another() -> None:
    async def dies(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        async for event in says_yes(request, attempt):
            if isinstance(event, TokenChunk) and attempt == 0:
                yield event
                raise UnavailableError("gone")
            yield event

    workers = [knowing(script=dies), knowing(script=dies)]
    async with deployment([FakePrefill()], workers) as (router, _):
        results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty")))
        assert {result.result.raw_text for result in results.values()} == {'"yes"'}


async def test_intrinsics_that_leave_a_conversation_alike_share_its_prefill() -> None:
    prefill, worker = FakePrefill(), knowing("jailbreak", "plain")
    async with deployment([prefill], [worker]) as (router, _):
        results = await results_of(router.stub.RunIntrinsics(ask_all("plain", "jailbreak", "certainty")))
        computed = [len(request.prompt.messages) for request in prefill.requests if not request.tokenize_only]
        rendered = [len(request.prompt.messages) for request in prefill.requests if request.tokenize_only]
        assert computed == [1], "the conversation"
        assert rendered == [2, 2], "with its instruction, for those that have one"
        assert [results[index].result.usage.stored_bytes for index in range(3)] == [0, 1000, 0]
        assert {request.adapter: len(request.handle.prefix_token_ids) // 4 for request in worker.requests} == {
            "plain": 2,
            "jailbreak": 2,
            "certainty": 1,
        }


def rollout(only_new: str = "") -> tuple[list[FakePrefill], list[FakeWorker]]:
    """Base prefills and workers of two models; of one adapter, only the new model has a version."""
    workers = [knowing("jailbreak", "certainty", "plain") for _ in range(2)]
    for worker, name in zip(workers, ("old", "new"), strict=True):
        adapters = tuple(a for a in worker.status.adapters if name == "new" or a.name != only_new)
        worker.report(model=model(name), adapters=adapters)
    return [FakePrefill(EndpointStatus(worker.status.model)) for worker in workers], workers


async def test_during_a_rollout_instructions_are_rendered_by_the_model_that_has_the_conversation() -> None:
    prefills, workers = rollout()

    async def all_at_once() -> None:
        await until(lambda: sum(len(prefill.requests) for prefill in prefills) in (1, 4))

    for prefill in prefills:
        prefill.before = all_at_once  # three at once are more than a base prefill gets where another would do
    async with deployment(prefills, workers) as (router, _):
        results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty", "plain")))
        assert [results[index].result.raw_text for index in range(3)] == ['"yes"'] * 3
        for worker in workers:
            models = {bytes(request.handle.model_digest) for request in worker.requests}
            assert models <= {worker.status.model.model_digest}


async def test_during_a_rollout_a_conversation_is_prefilled_for_the_model_that_serves_all_who_share_it() -> None:
    prefills, workers = rollout(only_new="certainty")
    async with deployment(prefills, workers) as (router, _):
        for content in "abcdefgh":
            prompt = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content=content)])
            results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty", prompt=prompt)))
            assert [results[index].result.raw_text for index in range(2)] == ['"yes"'] * 2
        assert [len(worker.requests) for worker in workers] == [0, 16]


async def test_one_that_rewrites_the_conversation_has_a_prefill_of_its_own() -> None:
    prefill, worker = FakePrefill(), knowing("jailbreak")
    worker.define("certainty", TAGGING)
    async with deployment([prefill], [worker]) as (router, _):
        results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty")))
        prompts = [[turn.content for turn in request.prompt.messages] for request in prefill.requests]
        assert sorted(prompts) == [["<i0> Hi. <i1> There."], ["Hi. There.", "Sure?"]]
        assert not any(request.tokenize_only for request in prefill.requests)
        assert [results[index].result.usage.stored_bytes for index in range(2)] == [1000, 1000]


@pytest.mark.parametrize("takes_documents", [False, True])
async def test_documents_go_where_the_model_has_a_place_for_them(takes_documents: bool) -> None:
    prefill, worker = FakePrefill(), knowing()
    known = dataclasses.replace(model(), takes_documents=takes_documents)
    prefill.report(model=known)
    worker.report(model=known)
    async with deployment([prefill], [worker]) as (router, _):
        await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", prompt=DOCUMENTED)))
        (request,) = prefill.requests
        assert len(request.prompt.documents) == takes_documents
        assert len(request.prompt.messages) == 2 - takes_documents


async def test_results_come_as_they_are_ready() -> None:
    gate = asyncio.Event()

    async def certainty_waits(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        if request.adapter == "certainty":
            await gate.wait()
        async for event in says_yes(request, attempt):
            yield event

    async with deployment([FakePrefill()], [knowing(script=certainty_waits)]) as (router, _):
        call = router.stub.RunIntrinsics(ask_all("certainty", "jailbreak"))
        assert (await call.read()).index == 1
        gate.set()
        assert (await call.read()).index == 0
        assert await call.read() is grpc.aio.EOF


async def test_who_leaves_cancels_what_runs() -> None:
    async def never(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        while True:
            yield Heartbeat()
            await asyncio.sleep(0.01)

    worker = knowing(script=never)
    async with deployment([FakePrefill()], [worker]) as (router, _):
        call = router.stub.RunIntrinsics(ask_all("certainty", "jailbreak"))
        await until(lambda: len(worker.requests) == 2)
        call.cancel()
        await until(lambda: worker.cancelled == 2)


@pytest.mark.parametrize(("said", "problem"), [("no JSON", "not JSON"), ("[" * 40 + "]" * 40, "in one another")])
async def test_an_answer_that_is_no_result_is_a_failure(said: str, problem: str) -> None:
    async def says(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        yield Started(AdapterDigest(""), None, 0, 1)
        yield Finished(FinishReason.STOP, Usage(), Timings(), text=said)

    with capture_logs() as logs:
        async with (
            deployment([FakePrefill()], [knowing(script=says)]) as (router, _),
            AsyncClient(router.address) as client,
        ):
            with pytest.raises(IntrinsicOutputError, match=problem):
                await client.run_intrinsic("Hi", "jailbreak")
            (outcome,) = await client.run_intrinsics("Hi", ["jailbreak"]).results()
            assert isinstance(outcome, IntrinsicOutputError)
    assert "INTRINSIC_OUTPUT" in str(logs)
    assert said not in str(logs)


async def test_a_definition_that_this_release_does_not_understand_refuses_the_adapter() -> None:
    worker = knowing()
    worker.define("jailbreak", f"{BARE}invented_later: 1\n")
    async with deployment([FakePrefill()], [worker]) as (router, _):
        results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty")))
        assert results[0].failure.reason == AdapterRefusedError.reason
        assert "invented_later" in results[0].failure.message
        assert results[1].result.raw_text == '"yes"'


async def test_what_all_share_fails_the_call() -> None:
    prefill, worker = FakePrefill(), knowing("jailbreak")

    async def refuse() -> None:
        raise InvalidRequestError.of("prompt.messages", "refused by the chat template")

    prefill.before = refuse
    async with deployment([prefill], [worker]) as (router, _):
        error = await failure_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty")))
        assert [violation.field for violation in error.violations] == ["prompt.messages"]
        worker.define("certainty", TAGGING)
        await until(lambda: len({info.intrinsic_digest for info in _adapters(router)}) == 4)
        results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty")))
        assert [results[index].failure.code for index in range(2)] == [grpc.StatusCode.INVALID_ARGUMENT.value[0]] * 2


def _adapters(router: Any) -> list[Any]:
    return [info for worker in router.workers.members() for info in worker.adapters.values()]


async def test_what_an_interrupted_call_has_brought_is_not_asked_again() -> None:
    worker = knowing("jailbreak")
    async with deployment([FakePrefill()], [worker]) as (router, _):
        results = await results_of(router.stub.RunIntrinsics(ask_all("jailbreak", "certainty", "unknown", done=[0, 2])))
        assert sorted(results) == [1]
        assert [request.adapter for request in worker.requests] == ["certainty"]
        assert await results_of(router.stub.RunIntrinsics(ask_all("certainty", done=[0]))) == {}
