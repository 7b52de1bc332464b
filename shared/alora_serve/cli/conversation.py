"""From what a person types, pipes or saved, to the prompt of a request."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from alora_serve.cli.output import to_json
from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.convert import handle_from_proto, handle_to_proto
from alora_serve.types import ChatMessage, Document, PrefixHandle, Prompt, ToolCall
from alora_serve.v1 import types_pb2

STANDARD_INPUT: Final = Path("-")

FORMAT: Final = (
    'a list of {"role", "content"}, or {"messages": [...]} with optional "documents", "tools" and "template_arguments"'
)


def read_prompt(
    *,
    messages: Sequence[str] = (),
    system: str | None = None,
    file: Path | None = None,
    handle_file: Path | None = None,
) -> Prompt:
    """Put a prompt together: the file's conversation (or standard input's), then the messages typed.

    Each typed message is the user's, or the assistant's where it follows a turn of the user. Standard input is read
    when ``file`` is ``-``, and when nothing else is given and it is not a terminal. It holds a conversation as a file
    does, or else plain text: one turn of the user.

    Raises:
        InvalidRequestError: there is nothing to continue, or a file cannot be read or understood; names it.
    """
    given = _from_file(file) if file is not None else {}
    if not (messages or system or file or handle_file) and not sys.stdin.isatty():
        given = _from_file(STANDARD_INPUT)
    turns = [_message(turn, index) for index, turn in enumerate(_list(given, "messages"))]
    if system is not None:
        turns.insert(0, ChatMessage("system", system))
    for text in messages:
        follows_user = bool(turns) and turns[-1].role == "user"
        turns.append(ChatMessage("assistant" if follows_user else "user", text))
    handle = load_handle(handle_file) if handle_file is not None else None
    if not turns and handle is None:
        raise InvalidRequestError.of(
            "prompt", "there is nothing to continue: give --message, --file, --handle or standard input"
        )
    return Prompt(
        messages=tuple(turns),
        handle=handle,
        documents=tuple(_document(document, index) for index, document in enumerate(_list(given, "documents"))),
        tools=tuple(_list(given, "tools")),
        template_arguments=given.get("template_arguments", {}),
    )


def conversation_to_json(prompt: Prompt) -> dict[str, Any]:
    """A prompt's conversation as :func:`read_prompt` takes it; its handle is no part of it."""
    fields = {
        "messages": [_without_empty(to_json(message)) for message in prompt.messages],
        "documents": [_without_empty(to_json(document)) for document in prompt.documents],
        "tools": to_json(prompt.tools),
        "template_arguments": to_json(prompt.template_arguments),
    }
    return {name: value for name, value in fields.items() if value or name == "messages"}


def save_handle(handle: PrefixHandle, file: Path) -> None:
    """Write a handle as the serialized ``alora_serve.v1.PrefixHandle``, which any client can read.

    Raises:
        InvalidRequestError: the file cannot be written.
    """
    try:
        file.write_bytes(handle_to_proto(handle).SerializeToString())
    except OSError as error:
        raise InvalidRequestError.of("save", f"cannot write {file}: {error.strerror}") from error


def handle_text(handle: PrefixHandle) -> str:
    """What :func:`save_handle` writes, as base64 for JSON."""
    return base64.b64encode(handle_to_proto(handle).SerializeToString()).decode()


def load_handle(file: Path) -> PrefixHandle:
    """Read what :func:`save_handle` wrote.

    Raises:
        InvalidRequestError: the file cannot be read, or holds something else.
    """
    try:
        return handle_from_proto(types_pb2.PrefixHandle.FromString(file.read_bytes()))
    except OSError as error:
        raise InvalidRequestError.of("handle", f"cannot read {file}: {error.strerror}") from error
    except (DecodeError, InvalidRequestError) as error:
        raise InvalidRequestError.of("handle", f"{file} holds no handle: {error}") from error


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value or name in ("content", "text")}


def _from_file(file: Path) -> Mapping[str, Any]:
    try:
        text = sys.stdin.read() if file == STANDARD_INPUT else file.read_text()
    except OSError as error:
        raise InvalidRequestError.of("file", f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError.of("file", f"{file} is not UTF-8 text: {error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if file != STANDARD_INPUT:
            raise InvalidRequestError.of("file", f"{file} is not JSON ({error}); it must hold {FORMAT}") from error
        value = text
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, dict) and "messages" in value:
        return value
    if file != STANDARD_INPUT:
        raise InvalidRequestError.of("file", f"{file} must hold {FORMAT}")
    return {"messages": [{"role": "user", "content": text.strip()}]} if text.strip() else {}


def _list(given: Mapping[str, Any], field: str) -> list[Any]:
    value = given.get(field, [])
    if not isinstance(value, list):
        raise InvalidRequestError.of(field, f"is not a list but {value!r}")
    return value


def _message(turn: Any, index: int) -> ChatMessage:
    calls = turn.get("tool_calls") or () if isinstance(turn, dict) else ()
    try:
        return ChatMessage(
            role=turn["role"],
            content=turn["content"] or "",
            tool_calls=tuple(ToolCall(call["id"], call["name"], call["arguments_json"]) for call in calls),
            tool_call_id=turn.get("tool_call_id", ""),
            name=turn.get("name", ""),
        )
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"is not {{role, content}}: {turn!r} ({type(error).__name__} {error})"
        raise InvalidRequestError.of(f"messages[{index}]", problem) from error


def _document(document: Any, index: int) -> Document:
    try:
        return Document(document.get("title", ""), document["text"], document.get("doc_id", ""))
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"is not {{title, text}}: {document!r}"
        raise InvalidRequestError.of(f"documents[{index}]", problem) from error
