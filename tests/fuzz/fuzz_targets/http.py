"""Parsers of the HTTP front door: bodies of requests, and answers that call tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from pydantic import ValidationError

from alora_serve.errors import InvalidRequestError, UnimplementedFeatureError
from alora_serve.intrinsics.documents import with_documents_placed
from alora_serve.rpc.convert import (
    Target as Continuer,
)
from alora_serve.rpc.convert import (
    generate_from_proto,
    generate_to_proto,
    run_intrinsics_from_proto,
    run_intrinsics_to_proto,
)
from alora_serve.types import IntrinsicRun, Prompt
from alora_serve.v1 import alora_pb2
from fuzz_targets.target import Target, must
from openai_front.chat_request import ChatRequest
from openai_front.completion_request import CompletionRequest
from openai_front.failures import validation_error
from openai_front.field_names import as_asked
from openai_front.intrinsics import FIELD_NAMES, IntrinsicsRequest
from openai_front.middleware import answer_with
from openai_front.tool_calls import Call, ToolCallReader

_TOOLS: Final = frozenset({"weather", "clock"})
_CALL: Final = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'


def http_requests(data: bytes) -> None:
    """A body: what it asks can be sent to a router, and what is wrong with it told to its client."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return
    for ask in (_chat, _complete, _judge):
        try:
            ask(body)
        except ValidationError as error:
            found = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
            answer_with(validation_error(found, body))
        except (InvalidRequestError, UnimplementedFeatureError) as error:
            answer_with(error)


def _chat(body: Any) -> None:
    request = ChatRequest.model_validate(body)
    _generate(request, [with_documents_placed(request.prompt(), template_takes_documents=False)])


def _complete(body: Any) -> None:
    request = CompletionRequest.model_validate(body)
    _generate(request, request.prompts())


def _judge(body: Any) -> None:
    request = IntrinsicsRequest.model_validate(body)
    run = IntrinsicRun(request.prompt(), tuple(request.intrinsics), request.parameters or {})
    sent = run_intrinsics_to_proto(run).SerializeToString()
    _received(partial(_run, sent), FIELD_NAMES)


def _generate(request: ChatRequest | CompletionRequest, prompts: Sequence[Prompt]) -> None:
    must(request.wants_stream or not request.wants_usage, "usage without a stream")
    sampling, names = request.sampling_params(), request.field_names
    adapter = next(filter(None, request.adapter_names.values()), "")
    for prompt in prompts:
        sent = generate_to_proto(prompt, Continuer(adapter, sampling)).SerializeToString()
        _received(partial(_generation, sent), names)


def _generation(sent: bytes) -> object:
    return generate_from_proto(alora_pb2.GenerateRequest.FromString(sent))


def _run(sent: bytes) -> object:
    return run_intrinsics_from_proto(alora_pb2.RunIntrinsicsRequest.FromString(sent))


def _received(parse: Callable[[], object], names: Mapping[str, str]) -> None:
    """As a router takes it, whose complaints name fields of the body."""
    try:
        parse()
    except InvalidRequestError as error:
        raise as_asked(error, names) from error


def tool_calls(data: bytes) -> None:
    """An answer's text: calls of tools that there are, the same ones wherever it is cut."""
    text = data.decode("utf-8", errors="replace")
    at = sum(data) % (len(text) + 1)
    for only_first in (False, True):
        said, calls = _read(ToolCallReader(_TOOLS, only_first=only_first), text)
        must((said, calls) == _read(ToolCallReader(_TOOLS, only_first=only_first), text[:at], text[at:]), "cut")
        must(not only_first or len(calls) <= 1, "more than the first")
        for call in calls:
            must(call.name in _TOOLS and isinstance(json.loads(call.arguments), dict), "no call")


def _read(reader: ToolCallReader, *pieces: str) -> tuple[str, list[Call]]:
    parts = [*map(reader.push, pieces), reader.finish()]
    return "".join(said for said, _ in parts), [call for _, calls in parts for call in calls]


def _bodies() -> list[bytes]:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "refusal", "refusal": "Rome?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c"},
    ]
    hello = [{"role": "user", "content": "Hello"}]
    template = {"adapter_name": "guard", "thinking": False, "documents": [{"text": "It rained.", "doc_id": 3}]}
    chosen = {"logit_bias": {"5": -1}, "stop": ["a"], "seed": -1, "n": 2, "temperature": 0.5}
    asked: list[dict[str, Any]] = [
        {"model": "m", "messages": messages, "tools": [tool], "tool_choice": "required", "logprobs": True},
        {"model": "m", "messages": hello, "chat_template_kwargs": template, "stream": True, "stream_options": {}},
        {"model": "m", "messages": hello, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"model": "m", "messages": hello, "structured_outputs": {"choice": ["a", "b"]}, "max_completion_tokens": 3},
        {"model": "m", "prompt": [[1, 2], [3]], "guided_regex": "a+", **chosen},
        {"messages": hello, "intrinsics": ["guard"], "parameters": {"a": [1, None, {"b": "c"}]}},
    ]
    return [json.dumps(body).encode() for body in asked]


TARGETS: Final[dict[str, Target]] = {
    "http-requests": Target(http_requests, _bodies()),
    "tool-calls": Target(
        tool_calls,
        [
            f"Let me see. {_CALL} Done.".encode(),
            f'{_CALL}<tool_call>[{{"name": "clock"}}]</tool_call>'.encode(),
            f"{_CALL[:-12]} <tool".encode(),
        ],
    ),
}
