"""Bad input gets a clear status that names the fields at fault, and nothing is lost: a good request is served next."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from alora_serve.client import ChatMessage
from alora_serve.errors import (
    AdapterNotFoundError,
    AloraServeError,
    HandleInvalidError,
    InvalidRequestError,
    UnimplementedFeatureError,
)
from alora_serve.rpc.channels import (
    DEFAULT_MESSAGE_BYTES,
    MAX_MESSAGE_BYTES,
    internal_channel,
    message_bytes_for_context,
)
from alora_serve.rpc.convert import handle_to_proto
from alora_serve.rpc.convert.tokens import pack_token_ids
from alora_serve.rpc.status import MessageTooLargeError, error_from_rpc
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, types_pb2
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceStub
from deployment import TINY_CONTEXT_TOKENS, WORKER, Deployed
from fake_services import router_on

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

MIB = 1 << 20
ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+|:\d{4,}")
"""Of an endpoint behind the router."""
TOO_MANY_TOKENS = "x" * (TINY_CONTEXT_TOKENS + 1)  # a byte is a token


def user(text: str = "Is the sea deep?") -> types_pb2.Message:
    return types_pb2.Message(role="user", content=text)


def prompt_of(*messages: types_pb2.Message, **more: Any) -> types_pb2.Prompt:
    return types_pb2.Prompt(messages=messages or [user()], **more)


def generate(prompt: types_pb2.Prompt | None = None, adapter: str = "", **sampling: Any) -> alora_pb2.GenerateRequest:
    return alora_pb2.GenerateRequest(
        prompt=prompt or prompt_of(), adapter=adapter, sampling=types_pb2.SamplingParams(**sampling)
    )


async def failure_of(call: Any) -> AloraServeError:
    try:
        if hasattr(call, "read"):
            _ = [response async for response in call]
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the call succeeded")


def fields_of(error: AloraServeError) -> list[str]:
    return [violation.field for violation in error.violations]


@pytest_asyncio.fixture(loop_scope="session")
async def served(tiny: Deployed) -> AsyncIterator[Deployed]:
    """The deployment, which after the test still gives a good request the right tokens, and holds nothing more."""
    yield tiny
    handle = (await tiny.client.prefill([ChatMessage("user", "Is the sea still deep?")])).handle
    answer = await tiny.ask(handle, "guard")
    assert answer.token_ids == tiny.model.cold_tokens("guard", tiny.model.prompt(handle, "guard"))
    await tiny.wait_for_load(running=0)
    assert await tiny.metric("router", "alora_router_in_flight") == 0


ASSISTANT = types_pb2.Message(role="assistant", content="Yes.")
BAD_GENERATIONS: dict[str, tuple[alora_pb2.GenerateRequest, list[str]]] = {
    "no conversation": (generate(types_pb2.Prompt()), ["prompt"]),
    "unknown role": (
        generate(prompt_of(user(), types_pb2.Message(role="robot", content="x"))),
        ["prompt.messages[1].role"],
    ),
    "base turn on an assistant's": (generate(prompt_of(user(), ASSISTANT)), ["prompt.messages[1].role"]),
    "messages and tokens": (generate(prompt_of(token_ids=bytes(4))), ["prompt.token_ids"]),
    "messages and text": (generate(prompt_of(text="x")), ["prompt.text"]),
    "tokens and text": (generate(types_pb2.Prompt(token_ids=bytes(4), text="x")), ["prompt.token_ids", "prompt.text"]),
    "text beyond the context": (generate(types_pb2.Prompt(text=TOO_MANY_TOKENS)), ["prompt"]),
    "tokens in pieces": (generate(types_pb2.Prompt(token_ids=bytes(5))), ["prompt.token_ids"]),
    "token outside the vocabulary": (
        generate(types_pb2.Prompt(token_ids=pack_token_ids([320]))),
        ["prompt.token_ids"],
    ),
    "prompt beyond the context": (generate(prompt_of(user(TOO_MANY_TOKENS))), ["prompt"]),
    "prompt beyond the context for a plain LoRA": (generate(prompt_of(user(TOO_MANY_TOKENS)), "plain"), ["prompt"]),
    "max_tokens beyond the context": (generate(max_tokens=TINY_CONTEXT_TOKENS), ["sampling.max_tokens"]),
    "no tokens": (generate(max_tokens=0), ["sampling.max_tokens"]),
    "negative temperature": (generate(temperature=-1), ["sampling.temperature"]),
    "temperature that is no number": (generate(temperature=math.nan), ["sampling.temperature"]),
    "top_p of nothing": (generate(top_p=0), ["sampling.top_p"]),
    "several at once": (
        generate(types_pb2.Prompt(), temperature=-1, top_p=2, stop=["", "a"]),
        ["prompt", "sampling.temperature", "sampling.top_p", "sampling.stop[0]"],
    ),
    "bias outside the vocabulary": (generate(logit_bias={320: 1.0}), ["sampling.logit_bias"]),
    "stop token outside the vocabulary": (generate(stop_token_ids=[320]), ["sampling.stop_token_ids"]),
}


@pytest.mark.parametrize("what", BAD_GENERATIONS)
async def test_a_bad_generation_names_every_bad_field(served: Deployed, what: str) -> None:
    request, fields = BAD_GENERATIONS[what]
    error = await failure_of(served.stub.Generate(request))
    assert isinstance(error, InvalidRequestError)
    assert fields_of(error) == fields
    assert error.metadata["request_id"]


@pytest.mark.parametrize("count", [0, 257])
async def test_a_fan_out_to_nobody_or_too_many_is_refused(served: Deployed, count: int) -> None:
    targets = [alora_pb2.FanOutTarget()] * count
    error = await failure_of(served.stub.FanOut(alora_pb2.FanOutRequest(prompt=prompt_of(), targets=targets)))
    assert isinstance(error, InvalidRequestError)
    assert fields_of(error) == ["targets"]


async def test_a_bad_prefill_names_the_field(served: Deployed) -> None:
    error = await failure_of(served.stub.Prefill(alora_pb2.PrefillRequest(prompt=prompt_of(user(TOO_MANY_TOKENS)))))
    assert isinstance(error, InvalidRequestError)
    assert fields_of(error) == ["prompt"]


async def test_an_unknown_adapter_comes_with_the_nearest_names(served: Deployed) -> None:
    calls = (
        served.stub.Generate(generate(adapter="gaurd")),
        served.stub.LoadAdapter(alora_pb2.LoadAdapterRequest(name="gaurd")),
        served.stub.UnloadAdapter(alora_pb2.UnloadAdapterRequest(name="gaurd")),
    )
    for call in calls:
        error = await failure_of(call)
        assert isinstance(error, AdapterNotFoundError)
        assert error.metadata["nearest"].split(",")[0] == "guard"
        assert "guard" in str(error)


LARGE: dict[str, tuple[types_pb2.Prompt, str]] = {
    "a turn": (prompt_of(user(), ASSISTANT, user("x" * 20 * MIB)), "prompt.messages[2].content"),
    "a turn that a larger model might take": (prompt_of(user("x" * 2 * MIB)), "prompt.messages[0].content"),
    "many turns": (prompt_of(*[user("x" * 10_000)] * 2000), "prompt.messages"),
    "tokens": (types_pb2.Prompt(token_ids=bytes(20 * MIB)), "prompt.token_ids"),
    "a handle": (
        types_pb2.Prompt(handle=types_pb2.PrefixHandle(prefix_token_ids=bytes(20 * MIB))),
        "prompt.handle.prefix_token_ids",
    ),
}


@pytest.mark.parametrize("what", LARGE)
async def test_a_request_too_large_for_the_model_is_refused_by_its_largest_field(served: Deployed, what: str) -> None:
    prompt, field = LARGE[what]
    limit = str(message_bytes_for_context(TINY_CONTEXT_TOKENS))
    fan_out = alora_pb2.FanOutRequest(prompt=prompt, targets=[alora_pb2.FanOutTarget()])
    for call in (
        served.stub.Generate(generate(prompt)),
        served.stub.FanOut(fan_out),
        served.stub.Prefill(alora_pb2.PrefillRequest(prompt=prompt)),
    ):
        error = await failure_of(call)
        assert type(error) is InvalidRequestError
        assert fields_of(error) == [field]
        assert str(prompt.ByteSize())[:2] in error.violations[0].description
        assert limit in error.violations[0].description
        assert error.metadata["request_id"]
        assert not ADDRESS.search(str(error))


async def test_a_handle_too_large_for_the_worker_is_refused_by_name(served: Deployed) -> None:
    async with internal_channel(served.local.processes[WORKER].address) as channel:
        stub: Any = AdapterDecodeServiceStub(channel)
        handle = types_pb2.PrefixHandle(prefix_token_ids=bytes(2 * MIB))
        error = await failure_of(stub.Decode(adapter_decode_pb2.DecodeRequest(handle=handle)))
    assert type(error) is InvalidRequestError
    assert fields_of(error) == ["handle.prefix_token_ids"]


async def test_a_request_beyond_what_is_read_at_all_is_told_from_an_overload(served: Deployed) -> None:
    error = await failure_of(served.stub.Generate(generate(prompt_of(user("x" * MAX_MESSAGE_BYTES)))))
    assert type(error) is MessageTooLargeError
    assert error.status == "RESOURCE_EXHAUSTED"
    assert error.retry_after_seconds is None, "it will be as large the next time"
    assert not ADDRESS.search(str(error))


async def test_a_router_that_knows_no_model_yet_takes_what_any_usual_one_takes() -> None:
    async with router_on([], []) as router:
        error = await failure_of(router.stub.Generate(generate(prompt_of(user("x" * (DEFAULT_MESSAGE_BYTES - MIB))))))
        assert error.status == "UNAVAILABLE"
        error = await failure_of(router.stub.Generate(generate(prompt_of(user("x" * 20 * MIB)))))
        assert fields_of(error) == ["prompt.messages[0].content"]


async def test_a_stop_string_that_is_not_utf8_is_named(served: Deployed) -> None:
    raw = generate(stop=["fine", "STOP"]).SerializeToString().replace(b"STOP", b"ST\xff\xfe")
    call = served.channel.unary_stream("/alora_serve.v1.AloraService/Generate", request_serializer=None)
    error = await failure_of(call(raw))
    assert isinstance(error, InvalidRequestError)
    assert fields_of(error) == ["sampling.stop[1]"]


UNSERVED: dict[str, alora_pb2.GenerateRequest] = {
    "prompt.documents": generate(prompt_of(documents=[types_pb2.Document(text="Salt water is heavy.")])),
}


@pytest.mark.parametrize("field", UNSERVED)
async def test_a_field_that_is_not_served_yet_is_refused_by_name(served: Deployed, field: str) -> None:
    error = await failure_of(served.stub.Generate(UNSERVED[field]))
    assert isinstance(error, UnimplementedFeatureError)
    assert fields_of(error) == [field]
    assert field in str(error)


@pytest.mark.parametrize("method", ["PurgeTenant"])
async def test_a_call_that_is_not_served_yet_is_refused_by_name(served: Deployed, method: str) -> None:
    request = getattr(alora_pb2, f"{method}Request")()
    error = await failure_of(getattr(served.stub, method)(request))
    assert isinstance(error, UnimplementedFeatureError)
    assert method in str(error)


async def test_a_handle_is_of_no_use_to_another_tenant(served: Deployed) -> None:
    handle = (await served.client.prefill("Is the sea deep?")).handle
    async with internal_channel(served.local.processes[WORKER].address) as channel:
        stub: Any = AdapterDecodeServiceStub(channel)
        request = adapter_decode_pb2.DecodeRequest(handle=handle_to_proto(handle), tenant="somebody")
        error = await failure_of(stub.Decode(request))
    assert isinstance(error, HandleInvalidError)
