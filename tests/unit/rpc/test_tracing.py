"""One trace over real sockets: of the router's call, its attempts at peers, and what these say of themselves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from structlog.testing import capture_logs

from alora_serve.client import AsyncClient
from alora_serve.errors import InvalidRequestError, OverloadedError
from alora_serve.logging import _add_trace
from alora_serve.rpc.tracing import end_http_server_span, http_server_span, trace_metadata
from alora_serve.telemetry import current, spans_by, tracer
from alora_serve.types import GenerateRequest, StreamEvent, TokenChunk
from alora_serve.v1 import alora_pb2, types_pb2
from fake_services import FakePrefill, FakeWorker, answer, deployment, until
from recorded_spans import Recorded, facts, failed, is_child, recording

HELLO = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hi")])
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE_ID}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-00"


class Worker(FakeWorker):
    """Remembers what it was told of traces."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.traceparents: list[str | None] = []

    async def Decode(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:  # type: ignore[override]  # noqa: N802
        self.traceparents.append(dict(context.invocation_metadata()).get("traceparent"))
        async for response in super().Decode(request, context):
            yield response


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Drawing a traceback takes a second, in which nobody here shows a sign of life."""
    with capture_logs():
        yield


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    with recording() as opened:
        yield opened


async def ask(router: Any, adapter: str = "jailbreak", **metadata: str) -> list[types_pb2.GenerationEvent]:
    request = alora_pb2.GenerateRequest(prompt=HELLO, adapter=adapter)
    call = router.stub.Generate(request, metadata=tuple(metadata.items()))
    return [response.event async for response in call]


def is_sampled(traceparent: str | None) -> bool:
    assert traceparent is not None
    return bool(int(traceparent.rpartition("-")[2], 16) & 1)


async def stuck_at_first(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    """A worker that says one token, and no more at the first attempt."""
    async for event in answer(request, attempt):
        yield event
        if attempt == 0 and isinstance(event, TokenChunk):
            await asyncio.Event().wait()


async def ended(recorded: Recorded, **calls: int) -> None:
    """So many calls of these methods of the router are over, at the peers, too: clients hear of it a moment before."""

    def are_over() -> bool:
        served, made = recorded.named("", "server"), recorded.named("", "client")
        routed = {method: len(recorded.named(f"AloraService/{method}", "server")) for method in calls}
        return routed == calls and len(served) == len(made) + sum(calls.values())

    await until(are_over)


async def test_every_hop_is_in_the_callers_trace_and_under_the_call_that_caused_it(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, servers):
        await ask(router, traceparent=CALLER, **{"x-request-id": "r-1"})
        await ended(recorded, Generate=1)
    served, generation = recorded.one("Generate", "server"), recorded.one("generation")
    prefilling, prefilled = recorded.one("Prefill", "client"), recorded.one("Prefill", "server")
    decoding, decoded = recorded.one("Decode", "client"), recorded.one("Decode", "server")
    assert served.parent is not None
    assert f"{served.parent.span_id:016x}" == CALLER.split("-")[2]
    for child, parent in (
        (prefilling, served),
        (prefilled, prefilling),
        (generation, served),
        (decoding, generation),
        (decoded, decoding),
    ):
        assert is_child(child, parent), child.name
    assert {f"{span.context.trace_id:032x}" for span in recorded.named("")} == {TRACE_ID}
    assert {facts(span)["alora.request_id"] for span in (served, prefilled, decoded)} == {"r-1"}
    assert {facts(span)["rpc.response.status_code"] for span in recorded.named("") if span != generation} == {"OK"}
    assert served.name == "alora_serve.v1.AloraService/Generate"
    assert (facts(served)["rpc.system.name"], facts(served)["rpc.method"]) == ("grpc", served.name)
    host, _, port = servers[1].address.rpartition(":")
    assert (facts(decoding)["server.address"], facts(decoding)["server.port"]) == (host, int(port))
    assert facts(decoding)["alora.attempt"] == 0
    told = facts(generation)
    assert (told["gen_ai.request.model"], told["alora.base_model"]) == ("jailbreak", "m")
    assert (told["gen_ai.usage.output_tokens"], told["gen_ai.response.finish_reasons"]) == (2, ("stop",))
    assert not any(map(failed, recorded.named("")))


async def test_a_stream_that_goes_on_elsewhere_shows_both_attempts(recorded: Recorded) -> None:
    workers = [FakeWorker(stuck_at_first), FakeWorker(stuck_at_first)]
    async with deployment([FakePrefill()], workers) as (router, servers):
        text = ""
        async for response in router.stub.Generate(alora_pb2.GenerateRequest(prompt=HELLO)):
            text += response.event.chunk.text
            if text == "Hello" and response.event.HasField("chunk"):
                await servers[1 + bool(workers[1].requests)].kill()
        await ended(recorded, Generate=1)
    assert text == "Hello world"
    generation = recorded.one("generation")
    first, second = recorded.named("Decode", "client")
    assert is_child(first, generation)
    assert is_child(second, generation)
    assert failed(first)
    assert facts(first)["rpc.response.status_code"] == facts(first)["error.type"] == "UNAVAILABLE"
    assert (facts(second)["alora.attempt"], facts(second)["alora.tokens.resumed"]) == (1, 1)
    assert facts(second)["rpc.response.status_code"] == "OK"
    assert facts(first)["server.port"] != facts(second)["server.port"]
    assert is_child(recorded.named("Decode", "server")[-1], second)
    assert not failed(generation)
    assert not failed(recorded.one("Generate", "server"))


async def test_a_refusal_is_told_by_its_status_and_reason_and_is_no_fault_of_the_server(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(router, "jailbrake")
        await ended(recorded, Generate=1)
    served = recorded.one("Generate", "server")
    assert facts(served)["rpc.response.status_code"] == "NOT_FOUND"
    assert facts(served)["alora.error.reason"] == "ADAPTER_NOT_FOUND"
    assert not failed(served)
    assert recorded.names == ["Generate"]


async def test_a_failure_is_told_at_every_hop_without_its_message(recorded: Recorded) -> None:
    async def broken(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        raise ValueError("my secret diary")
        yield

    async with deployment([FakePrefill()], [FakeWorker(broken)]) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(router)
        await ended(recorded, Generate=1)
    chain = [
        recorded.one("Generate", "server"),
        recorded.one("generation"),
        recorded.one("Decode", "client"),
        recorded.one("Decode", "server"),
    ]
    assert all(map(failed, chain))
    assert {facts(span)["error.type"] for span in chain} == {"INTERNAL"}
    for span in recorded.named(""):
        assert not span.events
        assert "diary" not in span.to_json()


async def test_an_error_that_quotes_the_request_leaves_its_words_out(recorded: Recorded) -> None:
    prefill = FakePrefill()

    async def refuse() -> None:
        raise InvalidRequestError.of("prompt.messages[0].role", "'my secret diary' is no role")

    prefill.before = refuse
    async with deployment([prefill], [FakeWorker()]) as (router, _):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(router)
        await ended(recorded, Generate=1)
    assert {facts(span)["rpc.response.status_code"] for span in recorded.named("")} == {"INVALID_ARGUMENT"}
    assert not any("diary" in span.to_json() for span in recorded.named(""))


async def test_an_attempt_that_finds_its_worker_full_is_followed_by_one_elsewhere(recorded: Recorded) -> None:
    async def full(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        if attempt == 0:
            raise OverloadedError("the queue is full", retry_after_seconds=1)
        async for event in answer(request, attempt):
            yield event

    async with deployment([FakePrefill()], [FakeWorker(full), FakeWorker(full)]) as (router, _):
        await ask(router, "")
        await ended(recorded, Generate=1)
    statuses = [facts(span)["rpc.response.status_code"] for span in recorded.named("Decode", "client")]
    assert statuses == ["RESOURCE_EXHAUSTED", "OK"]


async def test_a_client_that_leaves_ends_every_span_and_is_no_failure(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker(stuck_at_first)]) as (router, _):
        call = router.stub.Generate(alora_pb2.GenerateRequest(prompt=HELLO))
        async for response in call:
            if response.event.HasField("chunk"):
                break
        call.cancel()
        await ended(recorded, Generate=1)
    for kind in ("server", "client"):
        left = recorded.one("Decode", kind)
        assert facts(left)["rpc.response.status_code"] == "CANCELLED"
        assert not failed(left)
    assert len(recorded.named("generation")) == 1


async def test_targets_of_a_fan_out_have_a_span_each_and_one_failure_is_its_own(recorded: Recorded) -> None:
    async def picky(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        if request.adapter == "certainty":
            raise ValueError("broken")
        async for event in answer(request, attempt):
            yield event

    async with deployment([FakePrefill()], [FakeWorker(picky)]) as (router, _):
        targets = [alora_pb2.FanOutTarget(adapter=name) for name in ("jailbreak", "certainty", "")]
        call = router.stub.FanOut(alora_pb2.FanOutRequest(prompt=HELLO, targets=targets))
        _ = [response async for response in call]
        await ended(recorded, FanOut=1)
    served = recorded.one("FanOut", "server")
    generations = {facts(span).get("alora.adapter", ""): span for span in recorded.named("generation")}
    assert set(generations) == {"jailbreak", "certainty", ""}
    assert all(is_child(span, served) for span in generations.values())
    assert [failed(generations[name]) for name in ("jailbreak", "certainty", "")] == [False, True, False]
    assert not failed(served)
    assert len(recorded.named("Prefill", "client")) == 1


async def test_adapters_are_loaded_and_unloaded_within_the_trace(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        await router.stub.LoadAdapter(alora_pb2.LoadAdapterRequest(name="jailbreak"))
        await router.stub.UnloadAdapter(alora_pb2.UnloadAdapterRequest(name="jailbreak"))
        await ended(recorded, LoadAdapter=1, UnloadAdapter=1)
    for method in ("LoadAdapter", "UnloadAdapter"):
        ours, peers = recorded.named(method, "server")
        called = recorded.one(method, "client")
        assert is_child(called, ours)
        assert is_child(peers, called)


async def test_status_streams_are_not_traced(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]):
        pass
    assert recorded.names == []


async def test_a_caller_that_is_not_sampled_is_not_sampled_anywhere() -> None:
    worker = Worker()
    with recording() as recorded:
        async with deployment([FakePrefill()], [worker]) as (router, _):
            await ask(router, traceparent=UNSAMPLED)
    assert recorded.names == []
    [told] = worker.traceparents
    assert not is_sampled(told)
    assert TRACE_ID in str(told)


async def test_a_trace_that_the_router_does_not_sample_is_begun_by_no_peer() -> None:
    worker = Worker()
    with spans_by(TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)):
        async with deployment([FakePrefill()], [worker]) as (router, _):
            await ask(router)
    [told] = worker.traceparents
    assert not is_sampled(told)


async def test_off_the_callers_trace_is_in_every_log_and_reaches_peers_as_it_came() -> None:
    """And of a call that is in none nothing is told."""
    worker = Worker()
    with capture_logs(processors=[_add_trace]) as lines:

        def logged(method: str) -> Counter[str | None]:
            calls = [line for line in lines if line["event"] == "rpc" and line["method"].endswith(f"/{method}")]
            return Counter(call.get("trace_id") for call in calls)

        async with deployment([FakePrefill()], [worker]) as (router, _):
            await ask(router, traceparent=CALLER)
            await ask(router)
            await until(lambda: all(logged(method).total() == 2 for method in ("Generate", "Prefill", "Decode")))
    assert worker.traceparents == [CALLER, None]
    for method in ("Generate", "Prefill", "Decode"):
        assert logged(method) == {TRACE_ID: 1, None: 1}, method


async def test_what_a_caller_writes_into_its_trace_context_is_checked(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        for nonsense in ("00-xyz", "ff" * 500, f"00-{'0' * 32}-{'0' * 16}-01"):
            await ask(router, traceparent=nonsense, tracestate="=,;" * 100)
        await ended(recorded, Generate=3)
    roots = recorded.named("Generate", "server")
    assert [span.parent for span in roots] == [None] * 3
    assert len({span.context.trace_id for span in roots}) == 3


def in_http_request(headers: dict[str, str], status: int = 200) -> dict[str, str]:
    """What is told to whoever is called for a request with these headers."""
    with http_server_span("POST", headers, "r-1") as span:
        end_http_server_span(span, "POST /v1/models", status)
        return dict(trace_metadata())


def test_an_http_request_is_in_its_callers_trace_and_passes_it_on(recorded: Recorded) -> None:
    told = in_http_request({"traceparent": CALLER}, 503)
    span = recorded.one("POST /v1/models")
    assert told["traceparent"].split("-")[1:3] == [f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"]
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == CALLER.split("-")[2]
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 503
    assert span.attributes["http.route"] == "/v1/models"
    assert not span.status.is_ok


def test_an_http_request_that_is_not_traced_here_still_passes_its_callers_trace_on() -> None:
    assert in_http_request({"traceparent": CALLER}) == {"traceparent": CALLER}
    assert in_http_request({}) == {}
    assert trace_metadata() == ()


async def test_our_client_passes_on_the_trace_that_it_is_called_in(recorded: Recorded) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _), AsyncClient(router.address) as client:
        maker = tracer()
        assert maker is not None
        with current(maker.start_span("theirs")) as theirs:
            await client.generate("Hi", adapter="jailbreak").result()
            await client.list_adapters()
        theirs.end()
        await ended(recorded, Generate=1, ListAdapters=1)
    assert is_child(recorded.one("Generate", "server"), recorded.one("theirs"))
    assert is_child(recorded.one("ListAdapters", "server"), recorded.one("theirs"))
    assert trace_metadata() == ()
