"""A request's messages, documents, tools and arguments, checked and turned into the variables of a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alora_serve.errors import FieldViolation, InvalidRequestError
from alora_serve.types import ChatMessage, Document, ToolCall

ROLES = ("system", "user", "assistant", "tool")

Mark = Callable[[str], str]
"""Applied to every string that a user wrote before the template sees it (see ``template_guard``)."""

_SCHEMA_WORDS = frozenset(
    {"type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "return"}
)
"""Keys that templates look up in a tool's description; marked, they would not be found."""


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """What a chat template renders, as the request gave it."""

    messages: tuple[ChatMessage, ...]
    documents: tuple[Document, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def variables(self, mark: Mark) -> dict[str, Any]:
        """Keyword arguments for ``apply_chat_template``, in the shapes that templates of the field expect."""
        return {
            "conversation": [_message(message, mark) for message in self.messages],
            "documents": [_document(document, mark) for document in self.documents] or None,
            "tools": [_marked(tool, mark) for tool in self.tools] or None,
            **{name: _marked(value, mark) for name, value in self.arguments.items()},
        }


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise :class:`~alora_serve.errors.InvalidRequestError` naming every field of the messages that is malformed."""
    violations: list[FieldViolation] = []
    for index, message in enumerate(messages):
        path = f"prompt.messages[{index}]"
        if message.role not in ROLES:
            violations.append(FieldViolation(f"{path}.role", f"is {message.role!r}, not one of {', '.join(ROLES)}"))
        if not isinstance(message.content, str):
            violations.append(FieldViolation(f"{path}.content", f"is {type(message.content).__name__}, not text"))
        if message.tool_calls and message.role != "assistant":
            violations.append(FieldViolation(f"{path}.tool_calls", "belong to an assistant's turn"))
        for call_index, call in enumerate(message.tool_calls):
            problem = _arguments_problem(call)
            if problem:
                violations.append(FieldViolation(f"{path}.tool_calls[{call_index}].arguments_json", problem))
    if violations:
        raise InvalidRequestError("; ".join(f"{v.field} {v.description}" for v in violations), violations=violations)


def check_arguments(arguments: Mapping[str, Any], reserved: frozenset[str]) -> None:
    """Raise :class:`~alora_serve.errors.InvalidRequestError` when an argument would replace a variable of ours."""
    violations = [
        FieldViolation(f"prompt.template_arguments[{name}]", "is set by the server; choose another name")
        for name in arguments
        if name in reserved
    ]
    if violations:
        raise InvalidRequestError("; ".join(f"{v.field} {v.description}" for v in violations), violations=violations)


def _arguments_problem(call: ToolCall) -> str:
    try:
        value = json.loads(call.arguments_json)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return "" if isinstance(value, dict) else "is JSON, but not an object"


def _message(message: ChatMessage, mark: Mark) -> dict[str, Any]:
    variables: dict[str, Any] = {"role": message.role, "content": mark(message.content)}
    if message.name:
        variables["name"] = mark(message.name)
    if message.tool_call_id:
        variables["tool_call_id"] = mark(message.tool_call_id)
    if message.tool_calls:
        variables["tool_calls"] = [_tool_call(call, mark) for call in message.tool_calls]
    return variables


def _tool_call(call: ToolCall, mark: Mark) -> dict[str, Any]:
    function = {"name": mark(call.name), "arguments": _marked(json.loads(call.arguments_json), mark)}
    return {"type": "function", "function": function} | ({"id": mark(call.id)} if call.id else {})


def _document(document: Document, mark: Mark) -> dict[str, str]:
    variables = {"title": mark(document.title), "text": mark(document.text)}
    return variables | ({"doc_id": mark(document.doc_id)} if document.doc_id else {})


def _marked(value: Any, mark: Mark) -> Any:
    """``value`` with every string in it marked, keys too. Numbers, booleans and None stay as they are."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {key if key in _SCHEMA_WORDS else mark(key): _marked(item, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, mark) for item in value]
    return value
