"""The front door over real sockets, before a router whose services follow a script."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from adapter_router.access.authentication import Access, ApiKeys
from adapter_router.access.rules import read_rules
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import (
    AloraServeError,
    ContextExceededError,
    DeadlinePassedError,
    InvalidRequestError,
    OverloadedError,
)
from alora_serve.rpc.channels import MAX_MESSAGE_BYTES, message_bytes_for_context
from alora_serve.types import (
    AdapterDigest,
    Finished,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from fake_services import FakePrefill, FakeWorker, Script, answer, deployment, model, until
from front_door import OpenDoor, open_door
from openai_front.completion_request import MAX_PROMPTS
from openai_front.middleware import UNASKED_BYTES
from tenants import key_of, write_access

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": "m", "messages": HELLO}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather"}}]
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'


@asynccontextmanager
async def behind(
    script: Script = answer, *, access: Access | None = None, **settings: Any
) -> AsyncIterator[tuple[OpenDoor, FakeWorker]]:
    """A front door whose one worker follows the script."""
    worker = FakeWorker(script)
    async with (
        deployment([FakePrefill()], [worker], access=access) as (router, _),
        open_door(router.address, **settings) as door,
    ):
        yield door, worker


def says(*chunks: TokenChunk, reason: FinishReason = FinishReason.STOP) -> Script:
    """A worker that says just this."""

    async def script(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        yield Started(AdapterDigest(""), None, request.sampling.seed or 0, 3)
        for chunk in chunks:
            yield chunk
        yield Finished(reason, Usage(3, generated_tokens=len(chunks)), Timings())

    return script


def fails(error: AloraServeError, *, after: int = 0) -> Script:
    """A worker that fails after so many tokens."""

    async def script(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        if after:
            yield Started(AdapterDigest(""), None, 0, 3)
        for number in range(after):
            yield TokenChunk((number,), "a")
        raise error

    return script


async def never_ends(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    """A worker that says one token, and waits for ever."""
    yield Started(AdapterDigest(""), None, 0, 3)
    yield TokenChunk((1,), "a")
    await asyncio.Event().wait()


async def floods(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    """A worker that says more than any socket holds."""
    yield Started(AdapterDigest(""), None, 0, 3)
    while True:
        yield TokenChunk((1,), "a" * 100_000)


async def test_a_request_id_goes_both_ways_and_into_the_router() -> None:
    async with behind() as (door, worker):
        given = await door.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "r-1"})
        assert given.headers["x-request-id"] == worker.requests[-1].request_id == "r-1"
        made = await door.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "not fit\tfor logs"})
        assert made.headers["x-request-id"] == worker.requests[-1].request_id
        assert len(made.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_cancels_its_request(stream: bool) -> None:
    async with behind(never_ends) as (door, worker):
        body = json.dumps({**CHAT, "stream": stream}).encode()
        _, writer = await asyncio.open_connection(*door.address.split(":"))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        await until(lambda: len(worker.requests) == 1)
        writer.close()
        await until(lambda: worker.cancelled == 1)
        await until(lambda: served(door, "POST /v1/chat/completions", 499) == 1)


async def test_a_body_that_does_not_arrive_is_given_up_and_its_connection_closed() -> None:
    async with behind(read_timeout_seconds=0.2) as (door, worker):
        reader, writer = await asyncio.open_connection(*door.address.split(":"))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"messages": ['
        )
        async with asyncio.timeout(60):
            answer = await reader.read()  # to the connection's end
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive in time" in answer
        writer.close()
        assert worker.requests == []


async def test_an_answer_may_take_longer_than_a_body() -> None:
    async def thinks(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        yield Started(AdapterDigest(""), None, 0, 3)
        await asyncio.sleep(0.5)
        yield Finished(FinishReason.STOP, Usage(), Timings(), text="a")

    async with behind(thinks, read_timeout_seconds=0.2) as (door, _):
        assert (await door.openai.chat.completions.create(**CHAT)).choices[0].message.content == "a"


async def test_more_requests_than_may_run_are_told_when_to_come_back() -> None:
    async with behind(never_ends, http_max_requests=1) as (door, worker):
        stream = await door.openai.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.RateLimitError) as refused:
            await door.openai.chat.completions.create(**CHAT)
        assert refused.value.response.headers["retry-after"] == "1"
        assert (await door.http.get("/metrics")).status_code == 200
        await stream.close()
        await until(lambda: worker.cancelled == 1)


async def test_a_client_that_stops_reading_is_cut_off() -> None:
    async with behind(floods, write_timeout_seconds=0.2) as (door, worker):
        stream = await door.openai.chat.completions.create(**CHAT, stream=True)
        await until(lambda: worker.cancelled == 1)
        await stream.close()


async def test_a_client_may_stop_reading_for_ever() -> None:
    async with behind(write_timeout_seconds=math.inf) as (door, _):
        assert (await door.http.post("/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
async def test_the_connection_of_a_client_that_stops_reading_is_closed_though_it_takes_nothing() -> None:
    async with behind(floods, write_timeout_seconds=0.2) as (door, worker):
        stream = await door.openai.chat.completions.create(**CHAT, stream=True)
        assert door.num_connections() == 1
        await until(lambda: worker.cancelled == 1)
        await until(lambda: door.num_connections() == 0)
        await stream.close()


async def test_a_failure_before_the_first_event_has_a_status_of_its_own() -> None:
    async with behind(fails(OverloadedError("full", retry_after_seconds=3))) as (door, _):
        with pytest.raises(openai.RateLimitError) as refused:
            await door.openai.chat.completions.create(**CHAT, stream=True)
        assert refused.value.response.headers["retry-after"] == "3"


async def test_a_request_that_is_refused_after_a_slow_start_has_a_status_of_its_own() -> None:
    async def loads_and_refuses(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
        yield Heartbeat()
        yield Heartbeat()
        raise InvalidRequestError("no answer is so long")

    async with behind(loads_and_refuses) as (door, _):
        with pytest.raises(openai.BadRequestError, match="no answer is so long"):
            await door.openai.chat.completions.create(**CHAT, stream=True)


async def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    async with behind(fails(DeadlinePassedError("too late"), after=2)) as (door, _):
        stream = await door.openai.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="too late"):
            async for _ in stream:
                pass
        text = (await door.http.post("/v1/chat/completions", json={**CHAT, "stream": True})).text
        assert "[DONE]" not in text


async def test_a_call_of_a_tool_is_an_object_whole_and_streamed() -> None:
    pieces = [TokenChunk((1,), "Let me see. "), TokenChunk((2,), CALL[:20]), TokenChunk((3,), CALL[20:])]
    async with behind(says(*pieces)) as (door, worker):
        worker.requests.clear()
        whole = (await door.openai.chat.completions.create(**CHAT, tools=TOOLS)).choices[0]
        stream = await door.openai.chat.completions.create(**CHAT, tools=TOOLS, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
        assert whole.message.content == "Let me see."
        assert whole.message.tool_calls is not None
        (call,) = whole.message.tool_calls
        assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"place": "Rome"}')
        (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert (streamed.index, streamed.function.arguments) == (0, '{"place": "Rome"}')
        assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
        assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls"
        unread = (await door.openai.chat.completions.create(**CHAT, tools=TOOLS, tool_choice="none")).choices[0]
        assert unread.message.content == f"Let me see. {CALL}"
        assert unread.finish_reason == "stop"


async def test_a_tool_that_must_be_called_binds_the_answer() -> None:
    async with behind(says(TokenChunk((1,), '{"place":'), TokenChunk((2,), '"Rome"}'))) as (door, worker):
        chosen: Any = {"type": "function", "function": {"name": "weather"}}
        answer = (await door.openai.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=chosen)).choices[0]
        assert worker.requests[-1].sampling.structured_output.json_schema == '{"type": "object"}'
        assert answer.message.content is None
        assert answer.message.tool_calls is not None
        assert answer.message.tool_calls[0].function.arguments == '{"place":"Rome"}'
        assert answer.finish_reason == "tool_calls"


def likely(token_id: int, logprob: float, token: bytes) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, token)


EURO = (likely(1, -0.5, b"\xe2\x82"), likely(3, -1.5, b"x")), (likely(2, float("-inf"), b"\xac"),)
EURO_CHUNKS = (
    TokenChunk((1,), "", (-0.5,), (b"\xe2\x82",), EURO[:1]),
    TokenChunk((2,), "€", (float("-inf"),), (b"\xac",), EURO[1:]),
)


async def test_logprobs_tell_bytes_and_what_else_was_likely() -> None:
    async with behind(says(*EURO_CHUNKS)) as (door, _):
        asked: dict[str, Any] = {**CHAT, "logprobs": True, "top_logprobs": 2}
        whole = (await door.openai.chat.completions.create(**asked)).choices[0].logprobs
        assert whole is not None
        assert whole.content is not None
        assert [token.bytes for token in whole.content] == [[0xE2, 0x82], [0xAC]]
        assert [token.logprob for token in whole.content] == [-0.5, -9999.0]
        assert [[each.token for each in token.top_logprobs] for token in whole.content] == [["\ufffd", "x"], ["\ufffd"]]
        chunks = [chunk async for chunk in await door.openai.chat.completions.create(**asked, stream=True)]
        streamed = [part for chunk in chunks if (given := chunk.choices[0].logprobs) for part in given.content or ()]
        assert streamed == whole.content


async def test_text_completions_tell_logprobs_in_lists() -> None:
    chunks = (
        TokenChunk((1,), "ab", (-0.5,), (b"ab",), ((likely(1, -0.5, b"ab"), likely(2, -1.0, b"c")),)),
        TokenChunk((2,), "c", (-0.25,), (b"c",), ((likely(2, -0.25, b"c"),),)),
    )
    async with behind(says(*chunks)) as (door, _):
        asked: dict[str, Any] = {"model": "m", "prompt": "once", "logprobs": 2}
        whole = (await door.openai.completions.create(**asked)).choices[0].logprobs
        assert whole is not None
        assert whole.tokens == ["ab", "c"]
        assert whole.token_logprobs == [-0.5, -0.25]
        assert whole.top_logprobs == [{"ab": -0.5, "c": -1.0}, {"c": -0.25}]
        assert whole.text_offset == [0, 2]
        parts = [chunk.choices[0] async for chunk in await door.openai.completions.create(**asked, stream=True)]
        told = [part.logprobs for part in parts if part.logprobs]
        assert [offset for part in told for offset in part.text_offset or ()] == [0, 2]
        assert "".join(part.text for part in parts) == "abc"


IO_YAML = "model: ~\nresponse_format: ~\ntransformations: ~\n"


async def test_intrinsics_run_in_one_call_and_fail_each_for_itself() -> None:
    async with behind(says(TokenChunk((1,), '{"certainty": "high"}'))) as (door, worker):
        worker.define("certainty", IO_YAML)
        await intrinsic_known(door, "certainty")
        body = {"messages": HELLO, "intrinsics": ["certainty", "jailbreak"]}
        whole = (await door.http.post("/v1/intrinsics", json=body)).json()["data"]
        assert [(each["index"], each["intrinsic"]) for each in whole] == [(0, "certainty"), (1, "jailbreak")]
        assert whole[0]["result"] == {"certainty": "high"}
        assert whole[0]["raw_text"] == '{"certainty": "high"}'
        assert whole[0]["alora"]["usage"]["generated_tokens"] == 1
        assert whole[1]["error"]["code"] == "INTRINSIC_UNDEFINED"
        lines = (await door.http.post("/v1/intrinsics", json={**body, "stream": True})).text.split("\n\n")
        assert lines[2:] == ["data: [DONE]", ""]
        streamed = sorted((json.loads(line[6:]) for line in lines[:2]), key=lambda each: each["index"])
        assert [each.get("result") for each in streamed] == [{"certainty": "high"}, None]
        refused = await door.http.post("/v1/intrinsics", json={"messages": HELLO, "intrinsics": []})
        assert refused.json()["error"]["param"] == "intrinsics"


async def test_why_an_intrinsic_found_nothing_is_told_in_the_words_of_the_request() -> None:
    async with behind(fails(TOO_LONG)) as (door, worker):
        worker.define("certainty", IO_YAML)
        await intrinsic_known(door, "certainty")
        body = {"messages": HELLO, "intrinsics": ["certainty"]}
        whole = (await door.http.post("/v1/intrinsics", json=body)).json()["data"]
        streamed = (await door.http.post("/v1/intrinsics", json={**body, "stream": True})).text.split("\n\n")
        for told in (whole[0]["error"], json.loads(streamed[0][6:])["error"]):
            assert told["code"] == "context_length_exceeded"
            assert told["message"].startswith("messages: this model's maximum context length is 512 tokens")


async def intrinsic_known(door: OpenDoor, name: str) -> None:
    """Wait until the router has heard of it."""
    async with asyncio.timeout(20):
        while not (await door.http.get(f"/v1/models/{name}")).json()["adapter"]["intrinsic"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_heartbeat_is_a_comment() -> None:
    async with behind() as (door, _):
        text = (await door.http.post("/v1/chat/completions", json={**CHAT, "stream": True})).text
        assert text.count("\n\n: ") == 1
        assert text.endswith("data: [DONE]\n\n")


async def test_two_adapters_in_one_request_are_refused() -> None:
    async with behind() as (door, _):
        with pytest.raises(openai.BadRequestError) as refused:
            await door.openai.chat.completions.create(
                model="certainty", messages=HELLO, extra_body={"adapter": "jailbreak"}
            )
        assert refused.value.body["param"] == "adapter"  # type: ignore[index]


async def test_refused_adapters_are_not_listed() -> None:
    async with behind() as (door, _):
        listed = {model.id async for model in await door.openai.models.list()}
        assert listed == {"m", "jailbreak", "certainty", "plain"}


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in pieces"])
async def test_a_body_longer_than_the_model_can_need_is_not_read(announced: bool) -> None:
    most_bytes = message_bytes_for_context(model().context_tokens)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(most_bytes // 2**16 + 1):
            yield b" " * 2**16

    async with behind() as (door, worker):
        whole = await door.http.post("/v1/chat/completions", json={**CHAT, "user": "x" * (most_bytes - 2**10)})
        assert whole.status_code == 200
        worker.requests.clear()
        content = b" " * (most_bytes + 1) if announced else pieces()
        refused = await door.http.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert refused.status_code == 413
        assert "longer" in refused.json()["error"]["message"]
        assert not worker.requests


async def test_each_of_many_prompts_may_fill_the_context() -> None:
    most_bytes = message_bytes_for_context(model().context_tokens)
    async with behind() as (door, _):
        asked = {"model": "m", "prompt": ["x"] * MAX_PROMPTS, "max_tokens": 1, "user": "x" * most_bytes}
        answered = await door.http.post("/v1/completions", json=asked)
        assert answered.status_code == 200
        longest = min(MAX_MESSAGE_BYTES, MAX_PROMPTS * most_bytes)
        refused = await door.http.post("/v1/completions", json={**asked, "user": "x" * longest})
        assert refused.status_code == 413


@pytest.mark.parametrize("length", [f"content-length: {UNASKED_BYTES + 1}", "transfer-encoding: chunked"])
@pytest.mark.parametrize(("key", "status"), [("of nobody", 401), (key_of("acme"), 408)], ids=["stranger", "client"])
async def test_a_body_of_any_length_is_waited_for_once_the_router_knows_the_key(
    tmp_path: Path, length: str, key: str, status: int
) -> None:
    rules = write_access(tmp_path / "access.yaml", {"acme": {}})
    access = Access(ApiKeys(Reloaded([rules], partial(read_rules, rules))))
    async with behind(access=access, read_timeout_seconds=0.2) as (door, worker):
        reader, writer = await asyncio.open_connection(*door.address.split(":"))
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {key}\r\n{length}\r\n\r\n".encode()
        )
        async with asyncio.timeout(60):
            answer = await reader.readline()
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        writer.close()
        assert worker.requests == []


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (json.dumps(CHAT).encode(), "text/plain", 415),
        (json.dumps(CHAT).encode(), "application/x-www-form-urlencoded", 415),
    ],
    ids=["half", "no object", "what a page of another site could send", "what curl sends unless told"],
)
async def test_what_is_no_json_object_is_refused(content: bytes, kind: str, status: int) -> None:
    async with behind() as (door, worker):
        refused = await door.http.post("/v1/chat/completions", content=content, headers={"content-type": kind})
        assert refused.status_code == status
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert ("`Content-Type: application/json`" in refused.json()["error"]["message"]) == (status == 415)
        assert not worker.requests


async def test_other_paths_and_methods_fail_in_the_same_form() -> None:
    async with behind() as (door, _):
        for path in ("/chat/completions", "/v1/chat/completions/"):
            unknown = await door.http.post(path, json=CHAT)
            assert unknown.status_code == 404
            assert unknown.json()["error"]["message"].startswith(
                f"there is no '{path}' here; the nearest paths are /v1/chat/completions, "
            )
        assert (await door.http.get("/v1/chat/completions")).status_code == 405
        for path, nearest in (("/v1/model", "/v1/models, /v1/models/{name}, "), ("/ui/", "/ui, ")):
            message = (await door.http.get(path)).json()["error"]["message"]
            assert message.startswith(f"there is no '{path}' here; the nearest paths are {nearest}")
        assert served(door, "POST other", 404) == 2


async def test_an_answer_is_as_long_as_the_request_or_the_setting_says() -> None:
    async with behind(default_max_tokens=7) as (door, worker):
        await door.openai.chat.completions.create(**CHAT)
        sampling = worker.requests[-1].sampling
        assert (sampling.HasField("max_tokens"), sampling.default_max_tokens) == (False, 7)
        await door.openai.completions.create(model="m", prompt="once", max_tokens=9)
        assert worker.requests[-1].sampling.max_tokens == 9


TOO_LONG = ContextExceededError.beyond("prompt", "its 600 tokens leave no room for an answer", 512)
BAD_SCHEMA = "sampling.structured_output.json_schema"
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
TWO_TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}, *TOOLS]


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (TOO_LONG, {}, "messages: this model's maximum context length is 512 tokens; its 600"),
        (
            ContextExceededError.beyond("sampling.max_tokens", "max_tokens 600", 512),
            {"max_completion_tokens": 600},
            "max_completion_tokens: this model's maximum context length is 512 tokens; max_completion_tokens 600",
        ),
        (InvalidRequestError.of(BAD_SCHEMA, "no"), {"guided_json": {}}, "guided_json: no"),
        (InvalidRequestError.of(BAD_SCHEMA, "no"), {"response_format": {"type": "json_object"}}, "response_format: no"),
        (
            InvalidRequestError.of(BAD_SCHEMA, "no"),
            {"response_format": JSON_FORMAT},
            "response_format.json_schema.schema: no",
        ),
        (
            InvalidRequestError.of("sampling.structured_output.grammar", "no"),
            {"structured_outputs": {"grammar": "g"}},
            "structured_outputs.grammar: no",
        ),
        (
            InvalidRequestError.of("sampling.structured_output.choice.values[1]", "no"),
            {"guided_choice": ["a", ""]},
            "guided_choice[1]: is empty",
        ),
        (
            InvalidRequestError.of("sampling.ignore_eos", "structured_output says where the answer ends"),
            {"guided_regex": "a", "ignore_eos": True},
            "ignore_eos: guided_regex says where the answer ends",
        ),
        (
            InvalidRequestError.of(BAD_SCHEMA, "'x' at /properties/a is not supported"),
            {"tools": TWO_TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "tools[1].function.parameters: 'x' at /properties/a is not supported",
        ),
        (
            InvalidRequestError.of(BAD_SCHEMA, "'x' at /anyOf/1/properties/arguments/properties/a is not supported"),
            {"tools": TWO_TOOLS, "tool_choice": "required"},
            "tools[1].function.parameters: 'x' at /properties/a is not supported",
        ),
        (
            InvalidRequestError.of(BAD_SCHEMA, "at /properties/arguments: no"),
            {"tools": TOOLS, "tool_choice": "required"},
            "tools[0].function.parameters: at /: no",
        ),
        (InvalidRequestError.of(BAD_SCHEMA, "no"), {"tools": TOOLS, "tool_choice": "required"}, "tools: no"),
    ],
)
async def test_what_a_router_refuses_is_told_in_the_words_of_the_request(
    error: AloraServeError, fields: dict[str, Any], message: str
) -> None:
    async with behind(fails(error)) as (door, _):
        for stream in (False, True):
            answer = await door.http.post("/v1/chat/completions", json={**CHAT, **fields, "stream": stream})
            told = answer.json()["error"]
            assert answer.status_code == 400
            assert told["message"].startswith(message)
            assert told["param"] == message.partition(":")[0]
            assert (told["code"] == "context_length_exceeded") == isinstance(error, ContextExceededError)


class Weather(BaseModel):
    """What an answer, or a call, is parsed to."""

    place: str


async def test_what_openais_helpers_parsed_can_be_sent_back() -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    async with behind(says(TokenChunk((1,), '{"place": "Rome"}'))) as (door, _):
        completions = door.openai.chat.completions
        answers = [(await completions.parse(**CHAT, response_format=Weather)).choices[0].message]
        assert answers[0].parsed == Weather(place="Rome")
        chosen: Any = {"type": "function", "function": {"name": "weather"}}
        answers.append((await completions.parse(**CHAT, tools=[tool], tool_choice=chosen)).choices[0].message)
        async with completions.stream(**CHAT, tools=[tool], tool_choice=chosen) as stream:
            answers.append((await stream.get_final_completion()).choices[0].message)
        for message in answers:
            await completions.create(model="m", messages=[*HELLO, message, *HELLO])  # type: ignore[list-item]
        for message in answers[1:]:
            assert message.tool_calls
            assert message.tool_calls[0].function.parsed_arguments == Weather(place="Rome")


async def test_one_call_is_wanted_and_white_space_is_no_content() -> None:
    async with behind(says(TokenChunk((1,), f"\n{CALL}\n{CALL}\n"))) as (door, _):
        both = (await door.openai.chat.completions.create(**CHAT, tools=TOOLS)).choices[0].message
        one = (await door.openai.chat.completions.create(**CHAT, tools=TOOLS, parallel_tool_calls=False)).choices[0]
        assert (both.content, len(both.tool_calls or ())) == (None, 2)
        assert (one.message.content, len(one.message.tool_calls or ())) == (None, 1)
        assert one.finish_reason == "tool_calls"


async def test_only_a_bearers_key_is_passed_on() -> None:
    async with behind() as (door, _):
        refused = await door.http.get("/v1/models", headers={"authorization": "Basic YTpi"})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "UNAUTHENTICATED"


async def test_a_drain_waits_for_what_runs_and_turns_the_rest_away() -> None:
    async with behind(never_ends) as (door, worker):
        stream = await door.openai.chat.completions.create(**CHAT, stream=True)
        draining = asyncio.ensure_future(door.in_flight.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(openai.InternalServerError) as refused:
            await door.openai.chat.completions.create(**CHAT)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"
        assert (await door.http.get("/metrics")).status_code == 200
        assert not draining.done()
        await stream.close()
        assert await draining == 0
        await until(lambda: worker.cancelled == 1)


async def test_health_follows_the_router() -> None:
    async with open_door("127.0.0.1:1") as door:
        unwell = await door.http.get("/health")
        assert unwell.status_code == 503
        assert unwell.json()["status"] == "unavailable"


async def test_metrics_count_by_route() -> None:
    async with behind() as (door, _):
        await door.openai.chat.completions.create(**CHAT)
        await door.openai.models.retrieve("jailbreak")
        page = (await door.http.get("/metrics")).text
        assert 'alora_http_requests_total{route="POST /v1/chat/completions",status="200"} 1.0' in page
        assert 'alora_http_requests_total{route="GET /v1/models/{name:path}",status="200"} 1.0' in page
        assert "jailbreak" not in page


def served(door: OpenDoor, route: str, status: int) -> float:
    value = door.registry.get_sample_value("alora_http_requests_total", {"route": route, "status": str(status)})
    return value or 0.0
