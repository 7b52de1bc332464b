"""A request's messages, documents, tools and arguments, checked and turned into the variables of a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alora_serve.errors import FieldViolation, InvalidRequestError
from alora_serve.types import DOCUMENT_ROLE, ROLES, ChatMessage, Document, ToolCall, is_role

Mark = Callable[[str], str]
"""Applied to every string that a user wrote before the template sees it (see ``template_guard``)."""


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """What a chat template renders, as the request gave it."""

    messages: tuple[ChatMessage, ...]
    documents: tuple[Document, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def variables(self, mark: Mark, known_keys: frozenset[str]) -> dict[str, Any]:
        """Keyword arguments for ``apply_chat_template``, in the shapes that templates of the field expect.

        Keys of the user's mappings are marked like values, but for ``known_keys``: those that the template looks up,
        and would not find marked.
        """
        marker = _Marker(mark, known_keys)
        return {
            "conversation": [marker.message(message) for message in self.messages],
            "documents": [marker.document(document) for document in self.documents] or None,
            "tools": [marker.value(tool) for tool in self.tools] or None,
            **{name: marker.value(value) for name, value in self.arguments.items()},
        }


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise :class:`~alora_serve.errors.InvalidRequestError` naming every field of the messages that is malformed."""
    violations: list[FieldViolation] = []
    for index, message in enumerate(messages):
        path = f"prompt.messages[{index}]"
        if not is_role(message.role):
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
        FieldViolation(f"prompt.template_arguments_json[{name}]", "is set by the server; choose another name")
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


@dataclass(frozen=True, slots=True)
class _Marker:
    mark: Mark
    known_keys: frozenset[str]

    def message(self, message: ChatMessage) -> dict[str, Any]:
        variables: dict[str, Any] = {"role": self.role(message.role), "content": self.mark(message.content)}
        if message.name:
            variables["name"] = self.mark(message.name)
        if message.tool_call_id:
            variables["tool_call_id"] = self.mark(message.tool_call_id)
        if message.tool_calls:
            variables["tool_calls"] = [self.tool_call(call) for call in message.tool_calls]
        return variables

    def role(self, role: str) -> str:
        """A role of ours, or that of a document, whose name is the user's."""
        return role if role in ROLES else DOCUMENT_ROLE + self.mark(role.removeprefix(DOCUMENT_ROLE))

    def tool_call(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": self.mark(call.name), "arguments": self.value(json.loads(call.arguments_json))}
        return {"type": "function", "function": function} | ({"id": self.mark(call.id)} if call.id else {})

    def document(self, document: Document) -> dict[str, str]:
        variables = {"title": self.mark(document.title), "text": self.mark(document.text)}
        return variables | ({"doc_id": self.mark(document.doc_id)} if document.doc_id else {})

    def value(self, value: Any) -> Any:
        """``value`` with every string in it marked. Numbers, booleans and None stay as they are."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {key if key in self.known_keys else self.mark(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value
