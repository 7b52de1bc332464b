"""Traces and logs of real processes, as a collector on a real socket gets them: who called whom, and for what."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc
import pytest
import pytest_asyncio

from alora_serve.cli.local.events import LogLine
from alora_serve.rpc.convert import prompt_to_proto
from alora_serve.types import ChatMessage, Prompt
from alora_serve.v1 import alora_pb2, types_pb2
from deployment import ANSWER_TOKENS, BLOCK_TOKENS, PATIENCE_SECONDS, Deployed, ServedModel, deployed
from trace_collector import Collector, Trace, collector

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SECRET_WORDS = "Quagga-Xylophon-Zwieback"
ROUTER, PREFILL, WORKER = "adapter-router", "base-prefill", "adapter-decode"
ROUTED = "server Generate"


@dataclass(frozen=True, slots=True)
class Traced:
    """A deployment, who collects its spans, and what it logged."""

    running: Deployed
    collecting: Collector
    log: list[str]

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        """What was logged about a request."""
        lines = [json.loads(line) for line in self.log]
        return [line for line in lines if line.get("request_id") == request_id]

    async def wait_for(self, trace_id: str, *names: str) -> Trace:
        """The trace, once a service has ended each of these calls, and the router its own."""
        wanted = {"Generate", *names}

        def complete(trace: Trace) -> bool:
            return wanted <= {span.name.rpartition("/")[2] for span in trace.spans if span.kind == "server"}

        return await asyncio.to_thread(self.collecting.wait_for, trace_id, complete)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traced(tiny_model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    """Two decode workers, a base prefill and a router that send their spans every tenth of a second."""
    log: list[str] = []

    def keep(event: object) -> None:
        if isinstance(event, LogLine) and event.line.startswith("{"):
            log.append(event.line)

    store = tmp_path_factory.mktemp("store")
    with collector() as collecting, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collecting.address}")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        async with deployed(
            tiny_model, f"lmdb://{store}", workers=2, emit=keep, block_tokens=str(BLOCK_TOKENS), silence_seconds="30"
        ) as running:
            yield Traced(running, collecting, log)


class Caller:
    """The trace that a call is made in."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.request_id = f"asked-{secrets.token_hex(4)}"
        flags = "01" if sampled else "00"
        self.metadata = (
            ("traceparent", f"00-{self.trace_id}-{self.span_id}-{flags}"),
            ("x-request-id", self.request_id),
        )


def question(subject: str, adapter: str, tokens: int = ANSWER_TOKENS, turns: int = 1) -> alora_pb2.GenerateRequest:
    """About a subject that no other test has."""
    text = f"The {subject} is deep and salt, and ships go over it. " * (4 * turns)
    return alora_pb2.GenerateRequest(
        prompt=prompt_to_proto(Prompt(messages=(ChatMessage("user", text),))),
        adapter=adapter,
        sampling=types_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1),
    )


async def ask(traced: Traced, caller: Caller, request: alora_pb2.GenerateRequest) -> list[types_pb2.GenerationEvent]:
    call = traced.running.stub.Generate(request, metadata=caller.metadata, timeout=PATIENCE_SECONDS)
    return [response.event async for response in call]


async def test_one_trace_leads_from_the_client_to_both_stores_and_says_what_they_had(traced: Traced) -> None:
    caller = Caller()
    finished = (await ask(traced, caller, question("traced sea", "guard")))[-1].finished
    trace = await traced.wait_for(caller.trace_id, "Prefill", "Decode")

    paths = sorted((span.service, trace.path(span)) for span in trace.spans)
    prefill = [ROUTED, "client Prefill", "server Prefill"]
    decode = [ROUTED, "internal generation", "client Decode", "server Decode"]
    phases = {
        PREFILL: [["render"], ["load prefix"], ["load prefix", "store get"], ["queue"], ["compute"], ["store put"]],
        WORKER: [
            ["acquire adapter"],
            ["load prefix"],
            ["load prefix", "store get"],
            ["queue"],
            ["compute"],
            ["decode"],
        ],
    }
    expected = [(ROUTER, prefill[:1]), (ROUTER, prefill[:2]), (ROUTER, decode[:2]), (ROUTER, decode[:3])]
    for service, path in ((PREFILL, prefill), (WORKER, decode)):
        inner = [[*path, *(f"internal {name}" for name in names)] for names in phases[service]]
        expected += [(service, way) for way in (path, *inner)]
    assert paths == sorted(expected)

    [routed] = [span for span in trace.spans if trace.path(span) == [ROUTED]]
    assert routed.parent_id == caller.span_id
    prefilled, decoded = trace.one("Prefill", "server"), trace.one("Decode", "server")
    for call in (routed, prefilled, decoded):
        assert call.attributes["rpc.response.status_code"] == "OK"
        assert call.attributes["alora.request_id"] == caller.request_id
        assert not call.failed
    assert len({span.instance for span in (routed, prefilled, decoded)}) == 3

    prompt_tokens = prefilled.attributes["gen_ai.usage.input_tokens"]
    assert prefilled.attributes["alora.tokens.computed"] > 0
    stored_bytes = prefilled.attributes["alora.bytes.stored"]
    assert trace.one("store put").attributes["alora.bytes.stored"] == stored_bytes > 0
    put, got = trace.named("store get")
    assert put.attributes["alora.misses.absent"] > 0
    assert got.attributes["alora.bytes.fetched"] == decoded.attributes["alora.bytes.fetched"] > 0
    assert decoded.attributes["alora.tokens.fetched"] == prompt_tokens
    digest = next(a.digest for a in await traced.running.client.list_adapters() if a.name == "guard")
    assert decoded.attributes["alora.adapter.digest"] == digest
    assert decoded.attributes["alora.invocation_start"] == prompt_tokens
    assert decoded.attributes["gen_ai.request.model"] == "guard"
    assert decoded.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert decoded.attributes["gen_ai.usage.output_tokens"] == ANSWER_TOKENS
    whole = trace.one("generation").attributes
    assert whole["gen_ai.usage.input_tokens"] == finished.usage.prompt_tokens
    assert whole["alora.tokens.computed"] == finished.usage.computed_tokens
    assert whole["alora.bytes.stored"] == finished.usage.stored_bytes == stored_bytes


async def test_phases_follow_each_other_within_their_call(traced: Traced) -> None:
    caller = Caller()
    await ask(traced, caller, question("orderly sea", "guard"))
    trace = await traced.wait_for(caller.trace_id, "Prefill", "Decode")
    for method in ("Prefill", "Decode"):
        call = trace.one(method, "server")
        phases = trace.children(call)
        assert all(phase.ended_nanoseconds >= phase.began_nanoseconds for phase in phases)
        # Those of the engine come from its own clock readings, a moment before or after the call's.
        slack = 50_000_000
        edges = [call.began_nanoseconds, *(phase.began_nanoseconds for phase in phases), call.ended_nanoseconds]
        assert all(later >= earlier - slack for earlier, later in pairwise(edges))


async def test_a_base_turn_shows_what_it_stored(traced: Traced) -> None:
    caller = Caller()
    finished = (await ask(traced, caller, question("stored sea", "", tokens=2 * BLOCK_TOKENS)))[-1].finished
    trace = await traced.wait_for(caller.trace_id, "Prefill", "Decode")
    decoded = trace.one("Decode", "server")
    [put] = [span for span in trace.children(decoded) if span.name == "store put"]
    assert put.attributes["alora.bytes.stored"] == decoded.attributes["alora.bytes.stored"] > 0
    assert decoded.attributes["gen_ai.request.model"] == decoded.attributes["alora.base_model"] == "tiny-llama"
    assert finished.usage.stored_bytes > put.attributes["alora.bytes.stored"], "prefill's besides"


async def test_no_span_is_made_for_a_token_or_a_block(traced: Traced) -> None:
    counts = []
    for tokens, turns in ((2, 1), (40, 8)):
        caller = Caller()
        await ask(traced, caller, question(f"{tokens} seas", "guard", tokens, turns))
        trace = await traced.wait_for(caller.trace_id, "Prefill", "Decode")
        assert not any(span.num_events for span in trace.spans)
        counts.append(len(trace.spans))
    assert counts[0] == counts[1]
    assert 10 <= counts[0] <= 20


async def test_a_stream_that_loses_its_worker_shows_both_attempts_in_one_trace(traced: Traced) -> None:
    running, caller = traced.running, Caller()
    call = running.stub.Generate(question("stormy sea", "guard", 400), metadata=caller.metadata)
    received = 0
    async for response in call:
        received += len(response.event.chunk.token_ids) // 4
        if received == 5:
            await running.local.kill(await holder(running))
            received += 1  # once
    trace = await traced.wait_for(caller.trace_id, "Prefill", "Decode")
    lost, resumed = trace.named("Decode", "client")
    assert trace.parent(lost) == trace.parent(resumed) == trace.one("generation")
    assert lost.failed
    assert lost.attributes["rpc.response.status_code"] == "UNAVAILABLE"
    assert resumed.attributes["alora.attempt"] == 1
    assert resumed.attributes["alora.tokens.resumed"] >= 5
    assert resumed.attributes["rpc.response.status_code"] == "OK"
    # The killed worker took its own spans with it.
    decoded = trace.one("Decode", "server")
    assert trace.parent(decoded) == resumed
    assert decoded.attributes["alora.tokens.resumed"] == resumed.attributes["alora.tokens.resumed"]
    assert not trace.one("Generate", "server").failed
    [told] = [line for line in traced.lines(caller.request_id) if line["event"] == "call failed"]
    assert told["trace_id"] == caller.trace_id
    await running.local.wait_ready()


async def holder(running: Deployed) -> str:
    """The worker that runs the one stream there is."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for name in ("worker-1", "worker-2"):
                async with aclosing(running.statuses(name)) as statuses:  # type: ignore[type-var]
                    if (await anext(statuses)).running:
                        return name


async def test_a_refusal_is_recorded_by_status_and_reason(traced: Traced) -> None:
    caller = Caller()
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(traced, caller, question("refused sea", "guarb"))
    trace = await traced.wait_for(caller.trace_id)
    [routed] = trace.spans
    assert routed.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert routed.attributes["alora.error.reason"] == "ADAPTER_NOT_FOUND"


async def test_who_is_not_sampled_is_sampled_by_no_service_but_found_in_every_log(traced: Traced) -> None:
    caller, other = Caller(sampled=False), Caller()
    await ask(traced, caller, question("private sea", "guard"))
    await ask(traced, other, question("private sea", "guard"))
    await traced.wait_for(other.trace_id, "Prefill", "Decode")
    assert not any(span.trace_id == caller.trace_id for span in traced.collecting.spans())
    assert {line["trace_id"] for line in traced.lines(caller.request_id)} == {caller.trace_id}


async def test_lines_of_a_request_carry_its_ids_in_all_services(traced: Traced) -> None:
    caller = Caller()
    call = traced.running.stub.Generate(question("logged sea", "guard"), metadata=caller.metadata)
    _ = [response async for response in call]
    assert dict(await call.initial_metadata())["x-request-id"] == caller.request_id
    trace = await traced.wait_for(caller.trace_id, "Prefill", "Decode")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(lines := traced.lines(caller.request_id)) < 3:  # noqa: ASYNC110  # read from pipes
            await asyncio.sleep(0.01)
    assert {line["service"] for line in lines} == {ROUTER, PREFILL, WORKER}
    assert {line["trace_id"] for line in lines} == {caller.trace_id}
    by_service = {span.service: span.span_id for span in trace.spans if span.kind == "server"}
    assert {line["service"]: line["span_id"] for line in lines} == by_service


async def test_neither_spans_nor_logs_say_what_was_asked_or_answered(traced: Traced) -> None:
    caller, refused = Caller(), Caller()
    answer = await ask(traced, caller, question(SECRET_WORDS, "guard"))
    bad = question("x", "guard")
    bad.prompt.messages[0].role = f"role of {SECRET_WORDS}"
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(traced, refused, bad)
    await traced.wait_for(caller.trace_id, "Prefill", "Decode")
    await traced.wait_for(refused.trace_id)
    told = b"".join(traced.collecting.raw) + "\n".join(traced.log).encode()
    assert caller.request_id.encode() in told
    said = "".join(event.chunk.text for event in answer).strip()
    assert len(said) > 3
    for word in (*SECRET_WORDS.split("-"), said):
        assert word.encode() not in told
