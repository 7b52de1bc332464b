"""Prompts and their parts: messages, documents, template values and handles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.convert.json_text import object_to_text, read_object
from alora_serve.rpc.convert.text import sendable_texts
from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids
from alora_serve.rpc.convert.violations import Violations
from alora_serve.types import ROLES, ChatMessage, Document, PrefixHandle, Prompt, PromptKind, ToolCall, is_role
from alora_serve.v1 import types_pb2

_KINDS: Final[Mapping[PromptKind, types_pb2.PromptKind.ValueType]] = {
    PromptKind.CONVERSATION: types_pb2.PROMPT_KIND_CONVERSATION,
    PromptKind.TOKENS: types_pb2.PROMPT_KIND_TOKENS,
}
_KINDS_FROM_PROTO: Final = {number: kind for kind, number in _KINDS.items()}


def prompt_from_proto(message: types_pb2.Prompt, *, field: str = "prompt") -> Prompt:
    """The checked prompt; ``field`` is the path of the message in its request. Does not verify the handle's MAC.

    Raises:
        InvalidRequestError: with every bad field; also for a combination that :class:`Prompt` does not allow.
    """
    violations = Violations()
    prompt = read_prompt(message, violations, field=field)
    violations.raise_if_any()
    return prompt


def read_prompt(message: types_pb2.Prompt, violations: Violations, *, field: str) -> Prompt:
    """As :func:`prompt_from_proto`, but notes what is wrong instead of raising."""
    has_handle, arguments = message.HasField("handle"), message.template_arguments_json
    _check_combination(message, violations, field)
    _check_messages(message, violations, field)
    return Prompt(
        messages=tuple(_message_from_proto(turn) for turn in message.messages),
        token_ids=_read_tokens(message.token_ids, violations, f"{field}.token_ids"),
        handle=_read_handle(message.handle, violations, f"{field}.handle") if has_handle else None,
        documents=tuple(Document(given.title, given.text, given.doc_id) for given in message.documents),
        template_arguments=read_object(arguments, violations, f"{field}.template_arguments_json") if arguments else {},
        tools=tuple(
            read_object(tool, violations, f"{field}.tools_json[{index}]")
            for index, tool in enumerate(message.tools_json)
        ),
        text=message.text,
    )


def _check_combination(message: types_pb2.Prompt, violations: Violations, field: str) -> None:
    has_handle, has_messages = message.HasField("handle"), bool(message.messages)
    complete = [name for name in ("token_ids", "text") if getattr(message, name)]
    if not (has_handle or has_messages or complete):
        violations.add(field, "is empty: give messages, token_ids, text, a handle, or a handle and new messages")
    if has_handle or has_messages or len(complete) > 1:
        for name in complete:
            violations.add(f"{field}.{name}", "is a complete prompt and goes with no other part of one")
    # What the template would never see must not be dropped in silence.
    if not has_messages:
        violations.require(not message.template_arguments_json, f"{field}.template_arguments_json", "needs messages")
    if not has_messages or has_handle:
        problem = "needs messages and no handle: it stands before the first turn, which a handle has fixed already"
        violations.require(not message.documents, f"{field}.documents", problem)
        violations.require(not message.tools_json, f"{field}.tools_json", problem)


def _check_messages(message: types_pb2.Prompt, violations: Violations, field: str) -> None:
    for index, turn in enumerate(message.messages):
        path = f"{field}.messages[{index}]"
        violations.require(is_role(turn.role), f"{path}.role", f"{turn.role[:40]!r} is none of {', '.join(ROLES)}")
        violations.require(
            not turn.tool_calls or turn.role == "assistant", f"{path}.tool_calls", "only an assistant calls tools"
        )
        for call_index, call in enumerate(turn.tool_calls):
            violations.require(
                _is_json_object(call.arguments_json),
                f"{path}.tool_calls[{call_index}].arguments_json",
                "is not a JSON object",
            )


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _message_from_proto(turn: types_pb2.Message) -> ChatMessage:
    return ChatMessage(
        role=turn.role,
        content=turn.content,
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments_json) for call in turn.tool_calls),
        tool_call_id=turn.tool_call_id,
        name=turn.name,
    )


def _read_tokens(packed: bytes, violations: Violations, field: str) -> tuple[int, ...]:
    try:
        return unpack_token_ids(packed, field)
    except InvalidRequestError as error:
        for violation in error.violations:
            violations.add(violation.field, violation.description)
        return ()


def handle_from_proto(message: types_pb2.PrefixHandle, *, field: str = "handle") -> PrefixHandle:
    """The handle as it came: its form is checked, its MAC is not.

    Raises:
        InvalidRequestError: tokens that are not packed tokens, or no kind.
    """
    violations = Violations()
    handle = _read_handle(message, violations, field)
    violations.raise_if_any()
    return handle


def _read_handle(message: types_pb2.PrefixHandle, violations: Violations, field: str) -> PrefixHandle:
    kind = _KINDS_FROM_PROTO.get(message.kind)
    violations.require(kind is not None, f"{field}.kind", f"{message.kind} is no kind this server knows")
    return PrefixHandle(
        model_digest=message.model_digest,
        storage_digest=message.storage_digest,
        prefix_tokens=_read_tokens(message.prefix_token_ids, violations, f"{field}.prefix_token_ids"),
        generation_prompt_tokens=_read_tokens(
            message.generation_prompt_token_ids, violations, f"{field}.generation_prompt_token_ids"
        ),
        kind=kind or PromptKind.CONVERSATION,
        last_role=message.last_role,
        open_turn=message.open_turn,
        expires_unix_seconds=message.expires_unix_seconds,
        mac=message.mac,
    )


@sendable_texts("prompt")
def prompt_to_proto(prompt: Prompt) -> types_pb2.Prompt:
    """The whole prompt.

    Raises:
        InvalidRequestError: a template argument or tool holds a value that is not JSON, or a text is not UTF-8.
    """
    return types_pb2.Prompt(
        handle=handle_to_proto(prompt.handle) if prompt.handle else None,
        messages=[_message_to_proto(turn, f"prompt.messages[{index}]") for index, turn in enumerate(prompt.messages)],
        documents=[
            _document_to_proto(given, f"prompt.documents[{index}]") for index, given in enumerate(prompt.documents)
        ],
        template_arguments_json=object_to_text(prompt.template_arguments, "prompt.template_arguments_json")
        if prompt.template_arguments
        else "",
        tools_json=[object_to_text(tool, f"prompt.tools_json[{index}]") for index, tool in enumerate(prompt.tools)],
        token_ids=pack_token_ids(prompt.token_ids),
        text=prompt.text,
    )


def _message_to_proto(turn: ChatMessage, field: str) -> types_pb2.Message:
    with sendable_texts(field):
        return types_pb2.Message(
            role=turn.role,
            content=turn.content,
            tool_calls=[
                types_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
                for call in turn.tool_calls
            ],
            tool_call_id=turn.tool_call_id,
            name=turn.name,
        )


def _document_to_proto(given: Document, field: str) -> types_pb2.Document:
    with sendable_texts(field):
        return types_pb2.Document(title=given.title, text=given.text, doc_id=given.doc_id)


def handle_to_proto(handle: PrefixHandle) -> types_pb2.PrefixHandle:
    """The handle with its MAC."""
    return types_pb2.PrefixHandle(
        model_digest=handle.model_digest,
        storage_digest=handle.storage_digest,
        prefix_token_ids=pack_token_ids(handle.prefix_tokens),
        generation_prompt_token_ids=pack_token_ids(handle.generation_prompt_tokens),
        kind=_KINDS[handle.kind],
        last_role=handle.last_role,
        open_turn=handle.open_turn,
        expires_unix_seconds=handle.expires_unix_seconds,
        mac=handle.mac,
    )
